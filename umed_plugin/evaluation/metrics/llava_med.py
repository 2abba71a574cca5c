"""LLaVA-Med's metrics of visual question answering as its scripts compute them, and a corrected closed accuracy beside them.

LLaVA-Med (arXiv 2306.00890) reports token recall for open questions and accuracy for closed ones. Both compare texts that have
gone through the normalisation of the VQA challenge (Antol et al. 2015) in its usual form, quirks included: only the first 32 full
stops go, and each punctuation mark is taken away or turned into a space depending on the whole text.

Its closed accuracy has three faults, which is why `closed_accuracy` stands beside it:

- ``run_eval.py`` asks for "yes" or "no" anywhere in the answer, and finds "no" inside "normal" and "nodule";
- an answer with "yes" or "no" that is wrong is dropped from numerator AND denominator, so wrong answers cost nothing;
- the truth is looked for as a substring, and 61 of SLAKE's 416 closed answers are neither "yes" nor "no".

``run_eval_batch.py`` has only the third. The published table does not say which of the two made it: both are reported.
"""

from __future__ import annotations

import re
from collections import Counter

# The challenge's table maps words without their apostrophe, as fast typists write them, to the proper ones. Two apostrophes: one
# or the other is missing. What cannot be told from another word (she'd, it's, let's, I'll) is not in it.
_ONE_APOSTROPHE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd "
    "it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll "
    "somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're "
    "they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've "
    "why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"
)
_TWO_APOSTROPHES = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've "
    "there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"
)
_CONTRACTIONS = {
    **{word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()},
    **{word.replace("'", "", 1): word for word in _TWO_APOSTROPHES.split()},
    **{"'".join(word.rsplit("'", 1)[:1]) + word.rsplit("'", 1)[1]: word for word in _TWO_APOSTROPHES.split()},
    # Entries of the table that follow no rule.
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBER_WORDS)}}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_MOST_FULL_STOPS = 32


def normalise(text: str) -> str:
    """A text in the form in which LLaVA-Med compares texts: lower case, numbers as digits, without articles and punctuation.

    A mark that stands beside a space somewhere in the text is taken away everywhere, any other becomes a space. With a comma
    between digits somewhere in the text, every mark is taken away.
    """
    digits_with_comma = re.search(r"\d,\d", text) is not None
    found = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_space or digits_with_comma else " ")
    found = re.sub(r"\.(?!\d)", "", found, count=_MOST_FULL_STOPS)
    words = [_NUMBERS.get(word, word) for word in found.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def token_overlap(answer: str, truth: str) -> tuple[float, float, float]:
    """Precision, recall and F1, each 0-1, of an open answer's words: LLaVA-Med's open score is the recall.

    As ``calculate_f1score`` computes it: with c(w) the count of word w in the answer and r(w) in the truth, over distinct words,
    TP = sum of c(w) where r(w) > 0, FP = sum of c(w) where r(w) = 0, FN = sum of r(w) where c(w) = 0. The counts of the answer
    are not clipped to those of the truth: a word said ten times counts ten times.

    All three are 0 when no word is shared or one of the texts has none.
    """
    said, wanted = _words(answer), _words(truth)
    hits = sum(count for word, count in said.items() if word in wanted)
    if not hits:
        return 0.0, 0.0, 0.0
    wrong = sum(count for word, count in said.items() if word not in wanted)
    missed = sum(count for word, count in wanted.items() if word not in said)
    precision, recall = hits / (hits + wrong), hits / (hits + missed)
    return precision, recall, 2 * precision * recall / (precision + recall)


def exact_match(answer: str, truth: str) -> float:
    """``calculate_exactmatch``: distinct words of the truth that are in the answer, over all words of the answer; 0-1."""
    said, wanted = _words(answer), _words(truth)
    return sum(word in said for word in wanted) / max(sum(said.values()), 1)


def _words(text: str) -> Counter[str]:
    # Normalised twice, as there: once by the caller and once by the metric. The second time may still change something.
    return Counter(normalise(normalise(text.lower())).split())


def closed_hit(answer: str, truth: str) -> tuple[float, float]:
    """(hit, counted) of a closed question in ``run_eval.py``; its accuracy is the sum of hits over the sum of counted.

    Counted are answers that hold the truth and "yes" or "no", as hits, and answers without "yes" and "no", as misses. An answer
    that holds "yes" or "no" but not the truth is not counted at all.
    """
    said, wanted = normalise(answer.lower()), normalise(truth.lower())
    if "yes" not in said and "no" not in said:
        return 0.0, 1.0
    return (1.0, 1.0) if wanted in said else (0.0, 0.0)


def closed_hit_batch(answer: str, truth: str) -> float:
    """1.0 when the answer holds the truth as a substring, as ``run_eval_batch.py`` has it; else 0.0."""
    return float(normalise(truth.lower()) in normalise(answer.lower()))


def closed_accuracy(answer: str, truth: str) -> float:
    """1.0 for a closed question that is answered right, else 0.0; each question counts.

    To a truth of "yes" or "no" an answer says what its first word says if that is one of the two, else what it says anywhere as
    a whole word; one that says neither, or both behind another first word, is wrong. To any other truth an answer is right when
    it holds the truth's words, whole and in a row.
    """
    said, wanted = normalise(answer.lower()).split(), normalise(truth.lower()).split()
    if wanted in (["yes"], ["no"]):
        found = {word for word in said if word in ("yes", "no")}
        return float(said[:1] == wanted or (said[:1] not in (["yes"], ["no"]) and found == set(wanted)))
    return holds(said, wanted)


def open_accuracy(answer: str, truth: str) -> float:
    """1.0 when an open answer holds the words of the truth, whole and in a row, else 0.0.

    LLaVA-Med reports recall instead; the UMed-LVLM paper's open scores are an accuracy, whose rule is not public.
    """
    return holds(normalise(answer.lower()).split(), normalise(truth.lower()).split())


def holds(said: list[str], wanted: list[str]) -> float:
    """1.0 when the words ``wanted``, of which there must be one at least, stand in a row in ``said``; else 0.0."""
    starts = range(len(said) - len(wanted) + 1)
    return float(bool(wanted) and any(said[start : start + len(wanted)] == wanted for start in starts))
