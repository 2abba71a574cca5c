"""BLEU, ROUGE-L and METEOR of captions against one reference each, and their mean as Med-GRIT-270k reports it (mBMR).

Texts are lower-cased and split into words and numbers; punctuation is dropped, as in COCO's caption evaluation. Departures from
it, whose tools need Java: a regular expression splits the words, not the Stanford tokenizer, and METEOR matches equal words only,
without stems, WordNet and paraphrases (Banerjee and Lavie 2005, the "exact" module). METEOR is therefore lower than METEOR 1.5,
and mBMR, of which it is a sixth, slightly lower: compare checkpoints with it, not with published tables.

BLEU is computed over the whole set, from sums over captions, and so are its resamples: each caption contributes its counts.
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
# Columns from which the BLEU of a set is computed.
BLEU_COLUMNS = tuple(f"{kind}_{n}" for n in ORDERS for kind in ("ngrams_shared", "ngrams_said")) + (
    "words_said",
    "words_wanted",
)
_WORD = re.compile(r"\d+(?:\.\d+)?|\w+(?:['\u2019-]\w+)*")


def words(text: str) -> list[str]:
    """The words and numbers of a text in lower case, without its boxes, tags and punctuation."""
    return _WORD.findall(re.sub(r"<[^<>]*>", " ", blot_boxes(text, " ")).lower())


def bleu_counts(candidate: Sequence[str], reference: Sequence[str]) -> dict[str, float]:
    """One caption's part in BLEU (Papineni et al. 2002): clipped and all n-grams for n = 1..4, and both lengths."""
    counts: dict[str, float] = {"words_said": len(candidate), "words_wanted": len(reference)}
    for n in ORDERS:
        answered, expected = _ngrams(candidate, n), _ngrams(reference, n)
        counts[f"ngrams_shared_{n}"] = sum((answered & expected).values())
        counts[f"ngrams_said_{n}"] = sum(answered.values())
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
    total = np.array([counts[f"ngrams_said_{n}"].sum() for n in ORDERS[:order]], dtype=float)
    if not shared.all():
        return 0.0
    length, reference_length = counts["words_said"].sum(), counts["words_wanted"].sum()
    brevity = 1.0 if length > reference_length else float(np.exp(1 - reference_length / length))
    return float(brevity * np.exp(np.log(shared / total).mean()))


def rouge_l(candidate: Sequence[str], reference: Sequence[str], beta: float = 1.2) -> float:
    """ROUGE-L (Lin 2004), 0-1: F of the longest common subsequence, (1 + beta^2) P R / (R + beta^2 P).

    COCO's caption evaluation takes ``beta`` 1.2; the plain F1 is ``beta`` 1.
    """
    common = _longest_common_subsequence(candidate, reference)
    if not common:
        return 0.0
    precision, recall = common / len(candidate), common / len(reference)
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


def meteor(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """METEOR with equal words alone (Banerjee and Lavie 2005), 0-1: F (1 - 0.5 (chunks / matches)^3), F = 10 P R / (R + 9 P).

    Words are aligned in the longest runs that both texts share, longest first, which keeps the number of chunks low.
    """
    runs = _shared_runs(list(candidate), list(reference))
    matches = sum(runs)
    if not matches:
        return 0.0
    precision, recall = matches / len(candidate), matches / len(reference)
    f_mean = 10 * precision * recall / (recall + 9 * precision)
    return f_mean * (1 - 0.5 * (len(runs) / matches) ** 3)


def _shared_runs(candidate: list[str], reference: list[str]) -> list[int]:
    """Lengths of the runs of an alignment. Aligned words are replaced by a mark of their own side, so that they match nothing."""
    runs: list[int] = []
    while True:
        length, start, reference_start = _longest_shared_run(candidate, reference)
        if not length:
            return runs
        runs.append(length)
        candidate[start : start + length] = ["<candidate>"] * length
        reference[reference_start : reference_start + length] = ["<reference>"] * length


def _longest_shared_run(first: Sequence[str], second: Sequence[str]) -> tuple[int, int, int]:
    """(length, start in first, start in second) of the longest run of words that both have; length 0 if there is none."""
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
    """The columns of one caption: BLEU's counts, ``rouge_l`` and ``meteor``."""
    pair = words(answer), words(reference)
    return {**bleu_counts(*pair), "rouge_l": rouge_l(*pair), "meteor": meteor(*pair)}


def mbmr(columns: Mapping[str, np.ndarray]) -> float:
    """Mean of BLEU-1 to -4, METEOR and ROUGE-L, 0-1 (BiRD, arXiv 2406.18146; ClinKD)."""
    parts = [bleu(columns, order) for order in ORDERS]
    return float((sum(parts) + columns["meteor"].mean() + columns["rouge_l"].mean()) / 6)
