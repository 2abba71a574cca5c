"""LLaVA-Med's metrics of visual question answering as its scripts compute them, and a corrected closed accuracy.

LLaVA-Med (arXiv 2306.00890) reports token recall for open questions and accuracy for closed ones. Both compare texts after the
normalisation of the VQA challenge (Antol et al. 2015) in its usual form, quirks included: only the first 32 full stops are
removed, and each punctuation mark is removed or turned into a space depending on the whole text.

Its closed accuracy has three faults, which `closed_accuracy` corrects:

- ``run_eval.py`` looks for "yes" or "no" anywhere in the answer, and finds "no" inside "normal" and "nodule";
- a wrong answer with "yes" or "no" is dropped from numerator AND denominator, so wrong answers cost nothing;
- the truth is searched as a substring, and 61 of SLAKE's 416 closed answers are neither "yes" nor "no".

``run_eval_batch.py`` has only the third. The publication does not say which of the two made its table: both are reported.
"""

from __future__ import annotations

import re
from collections import Counter

from umed_plugin.evaluation.metrics.answers import called_answer, in_tags, plain, words

# The challenge's table maps words written without their apostrophe to the proper ones. With two apostrophes, one or the other is
# missing. Forms that are words of their own without it (she'd, it's, let's, I'll) are not in the table.
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

    A punctuation mark that stands beside a space somewhere in the text is removed everywhere; any other becomes a space. If there
    is a comma between digits anywhere in the text, every mark is removed.
    """
    digits_with_comma = re.search(r"\d,\d", text) is not None
    result = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or digits_with_comma else " ")
    result = re.sub(r"\.(?!\d)", "", result, count=_MOST_FULL_STOPS)
    words = [_NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def token_overlap(answer: str, truth: str) -> tuple[float, float, float]:
    """Precision, recall and F1, each 0-1, of an open answer's words. LLaVA-Med's open score is the recall.

    As ``calculate_f1score`` computes it: with c(w) the count of word w in the answer and r(w) in the truth, over distinct words,
    TP = sum of c(w) where r(w) > 0, FP = sum of c(w) where r(w) = 0, FN = sum of r(w) where c(w) = 0. The counts of the answer
    are not clipped to those of the truth: a word repeated ten times counts ten times.

    All three are 0 if no word is shared or one of the texts has none.
    """
    answered, expected = _words(answer), _words(truth)
    hits = sum(count for word, count in answered.items() if word in expected)
    if not hits:
        return 0.0, 0.0, 0.0
    wrong = sum(count for word, count in answered.items() if word not in expected)
    missed = sum(count for word, count in expected.items() if word not in answered)
    precision, recall = hits / (hits + wrong), hits / (hits + missed)
    return precision, recall, 2 * precision * recall / (precision + recall)


def exact_match(answer: str, truth: str) -> float:
    """``calculate_exactmatch``: distinct words of the truth that are in the answer, over all words of the answer; 0-1."""
    answered, expected = _words(answer), _words(truth)
    return sum(word in answered for word in expected) / max(sum(answered.values()), 1)


def _words(text: str) -> Counter[str]:
    # Normalised twice, as in LLaVA-Med: by the caller and by the metric. The second time may still change something.
    return Counter(normalise(normalise(text.lower())).split())


def closed_hit(answer: str, truth: str) -> tuple[float, float]:
    """(hit, counted) of a closed question in ``run_eval.py``; its accuracy is the sum of hits over the sum of counted.

    An answer that contains the truth and "yes" or "no" is a hit; one without "yes" and "no" is a miss. An answer that contains
    "yes" or "no" but not the truth is not counted at all.
    """
    answered, expected = normalise(answer.lower()), normalise(truth.lower())
    if "yes" not in answered and "no" not in answered:
        return 0.0, 1.0
    return (1.0, 1.0) if expected in answered else (0.0, 0.0)


def closed_hit_batch(answer: str, truth: str) -> float:
    """1.0 if the answer contains the truth as a substring, as in ``run_eval_batch.py``; else 0.0."""
    return float(normalise(truth.lower()) in normalise(answer.lower()))


# Who writes this has not decided, whatever "no" stands beside it.
_UNDECIDED = re.compile(
    r"^(?:yes no|no yes)$|\b(?:yes or no|no or yes|no idea|"
    r"no way to|not sure|uncertain|(?:do not|dont) know|(?:im|un|not )possible to|unable to|"
    r"(?:cannot|can not|cant|could not|couldnt) (?:be )?(?:tell|say|know|answer|determined?|judged?|assess(?:ed)?))\b"
)


# A verdict that is ruled out: "The answer is not yes."
_DENIED = re.compile(r"\b(?:not|isnt|never) (?:a |an |simply |just )?(?:yes\b|no$)")


def closed_accuracy(answer: str, truth: str) -> float:
    """1.0 for a closed question that is answered right, else 0.0; every question counts.

    Words are compared without markup and punctuation (`umed_plugin.evaluation.metrics.answers.words`), not in LLaVA-Med's
    normalisation. What stands in answer tags or behind the last "answer is" counts alone.

    If the truth is "yes" or "no", the answer's first word decides if it is one of the two, else the one that it contains as a
    whole word. An answer that contains neither, or both behind another first word, is wrong. So is one that says that it cannot
    tell, or only what the answer is not ("not yes"). With any other truth, an answer is right if it contains the truth's words,
    whole and in a row.
    """
    text = in_tags(answer)
    expected = words(truth)
    called = called_answer(plain(text))
    if expected not in (["yes"], ["no"]):
        return holds(words(text), expected)
    verdict = _verdict(called) if called is not None else None
    return float((verdict or _verdict(text)) == expected[0])


def _verdict(text: str) -> str | None:
    """``yes`` or ``no``, or None for an answer that says neither, or both."""
    said = words(text)
    if said[:1] in (["yes"], ["no"]) and not _UNDECIDED.match(" ".join(said)):
        return said[0]
    if _DENIED.search(" ".join(said)):
        return None  # "not yes" need not mean no
    verdicts = {word for word in said if word in ("yes", "no")}
    return verdicts.pop() if len(verdicts) == 1 and not _UNDECIDED.search(" ".join(said)) else None


def open_accuracy(answer: str, truth: str) -> float:
    """1.0 if an open answer contains the words of the truth, whole and in a row, else 0.0.

    Words as in `closed_accuracy`. LLaVA-Med reports recall instead; the UMed-LVLM paper's open scores are an accuracy, whose rule
    is not public.
    """
    return holds(words(in_tags(answer)), words(truth))


def holds(answered: list[str], expected: list[str]) -> float:
    """1.0 if the words ``expected``, at least one, stand in a row in ``answered``; else 0.0."""
    starts = range(len(answered) - len(expected) + 1)
    return float(bool(expected) and any(answered[start : start + len(expected)] == expected for start in starts))
