"""BLEU, ROUGE-L and METEOR of captions against one reference each, and their mean as Med-GRIT-270k reports it (mBMR).

Texts are lower-cased and cut into words and numbers; punctuation is dropped, as COCO's caption evaluation does. Departures from
it, whose tools need Java: words are cut by a pattern, not by the Stanford tokenizer, and METEOR matches equal words alone,
without stems, WordNet and paraphrases (Banerjee and Lavie 2005, the "exact" module). METEOR is therefore lower than that of
METEOR 1.5, and mBMR, of which it is a sixth, by a little: compare checkpoints with it, not with printed tables.

BLEU is of the whole set, from sums over captions, and so are its resamples: each caption gives its counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from umed_plugin.grounding.boxes import blot_boxes

if TYPE_CHECKING:
    import numpy as np

ORDERS = (1, 2, 3, 4)
# Columns that BLEU of a set is computed from.
BLEU_COLUMNS = tuple(f"{kind}_{n}" for n in ORDERS for kind in ("ngrams_shared", "ngrams_said")) + (
    "words_said",
    "words_wanted",
)
_WORD = re.compile(r"\d+(?:\.\d+)?|\w+(?:['\u2019-]\w+)*")


def words(text: str) -> list[str]:
    """The words and numbers of a text in lower case, without its boxes, tags and punctuation."""
    return _WORD.findall(re.sub(r"<[^<>]*>", " ", blot_boxes(text, " ")).lower())


def bleu_counts(said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """One caption's part in BLEU (Papineni et al. 2002): clipped and all n-grams for n = 1..4, and both lengths."""
    counts: dict[str, float] = {"words_said": len(said), "words_wanted": len(wanted)}
    for n in ORDERS:
        mine, reference = _ngrams(said, n), _ngrams(wanted, n)
        counts[f"ngrams_shared_{n}"] = sum((mine & reference).values())
        counts[f"ngrams_said_{n}"] = sum(mine.values())
    return counts


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def bleu(counts: Mapping[str, np.ndarray], order: int) -> float:
    """BLEU-``order`` of a set, 0-1, without smoothing: BP * exp(mean over n <= order of log p_n).

    Args:
        counts: columns as :func:`bleu_counts` names them, an array over captions each.
        order: 1 to 4.
    """
    import numpy as np

    shared = np.array([counts[f"ngrams_shared_{n}"].sum() for n in ORDERS[:order]], dtype=float)
    said = np.array([counts[f"ngrams_said_{n}"].sum() for n in ORDERS[:order]], dtype=float)
    if not shared.all():
        return 0.0
    mine, reference = counts["words_said"].sum(), counts["words_wanted"].sum()
    brevity = 1.0 if mine > reference else float(np.exp(1 - reference / mine))
    return float(brevity * np.exp(np.log(shared / said).mean()))


def rouge_l(said: Sequence[str], wanted: Sequence[str], beta: float = 1.2) -> float:
    """ROUGE-L (Lin 2004), 0-1: F of the longest common subsequence, (1 + beta^2) P R / (R + beta^2 P).

    COCO's caption evaluation takes ``beta`` 1.2; the plain F1 is ``beta`` 1.
    """
    common = _longest_common_subsequence(said, wanted)
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    longest = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for column, other in enumerate(second, start=1):
            above = longest[column]
            longest[column] = before + 1 if word == other else max(above, longest[column - 1])
            before = above
    return longest[-1]


def meteor(said: Sequence[str], wanted: Sequence[str]) -> float:
    """METEOR with equal words alone (Banerjee and Lavie 2005), 0-1: F (1 - 0.5 (chunks / matches)^3), F = 10 P R / (R + 9 P).

    Words are aligned in the longest runs that both texts share, longest first, which keeps the number of chunks low.
    """
    runs = _shared_runs(list(said), list(wanted))
    matches = sum(runs)
    if not matches:
        return 0.0
    precision, recall = matches / len(said), matches / len(wanted)
    f_mean = 10 * precision * recall / (recall + 9 * precision)
    return f_mean * (1 - 0.5 * (len(runs) / matches) ** 3)


def _shared_runs(said: list[str], wanted: list[str]) -> list[int]:
    """Lengths of the runs of an alignment. Aligned words are blotted out, on each side with another mark."""
    runs: list[int] = []
    while True:
        length, mine, other = _longest_shared_run(said, wanted)
        if not length:
            return runs
        runs.append(length)
        said[mine : mine + length] = ["<said>"] * length
        wanted[other : other + length] = ["<wanted>"] * length


def _longest_shared_run(first: Sequence[str], second: Sequence[str]) -> tuple[int, int, int]:
    """(length, start in first, start in second) of the longest run of words that both have; length 0 when there is none."""
    best, above = (0, 0, 0), [0] * (len(second) + 1)
    for row, word in enumerate(first):
        here = [0] * (len(second) + 1)
        for column, other in enumerate(second):
            if word == other:
                length = here[column + 1] = above[column] + 1
                if length > best[0]:
                    best = (length, row - length + 1, column - length + 1)
        above = here
    return best


def caption_values(answer: str, reference: str) -> dict[str, float]:
    """All that the figures of one caption need: BLEU's counts, ``rouge_l`` and ``meteor``."""
    said, wanted = words(answer), words(reference)
    return {**bleu_counts(said, wanted), "rouge_l": rouge_l(said, wanted), "meteor": meteor(said, wanted)}


def mbmr(columns: Mapping[str, np.ndarray]) -> float:
    """Mean of BLEU-1 to -4, METEOR and ROUGE-L, 0-1 (BiRD, arXiv 2406.18146; ClinKD)."""
    parts = [bleu(columns, order) for order in ORDERS]
    return float((sum(parts) + columns["meteor"].mean() + columns["rouge_l"].mean()) / 6)
