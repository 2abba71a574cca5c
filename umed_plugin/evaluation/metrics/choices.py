"""Multiple choice: which option an answer stands for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from umed_plugin.evaluation.metrics.answers import called_answer, in_tags, plain, words

LETTERS = "ABCDEFGHIJ"
# Plain text that begins with a letter by itself: "B", "(B)", "B: text", "The answer is B", "Option B", "B because A is wrong".
# Not "A nodule" or "B cells": behind the letter must stand a mark, a dash, the end, or a word that no option goes on with.
_LETTER = re.compile(
    r"(?:(?:the )?(?:(?:final|correct|best|right) )?(?:answer|option|choice)(?: is)? ?:? ?)?(?:option |choice )?"
    r"[(\[{]?([A-J])"
    r"(?:[)\]}:.,;!?]|$| [-\u2013\u2014(]| (?:because|since|as|due|which|seems|is(?! (?:not|wrong|false|in|un)))\b)",
    re.IGNORECASE,
)
# "B is correct" anywhere; the last one counts.
_RIGHT = re.compile(r"(?<!\w)\(?([A-J])\)? (?:is|seems|must be|would be) (?:the )?(?:correct|right|best|true)\b")
_CHOSEN = re.compile(r"\b(?:choose|select|pick|go with) (?:option |choice |answer )?(?=[(\[{]?[A-J]\b)")
# A letter and, behind a mark, a text.
_TRUTH = re.compile(r"\s*\(?([A-Za-z])\)?(?:\s*[:.)]\s*|\s*$)(.*)", re.DOTALL)
_ALONE = re.compile(r"(?:^|\. |: )[(\[{]?([A-J])[)\]}]?\.?$")


def nearest_option(answer: str, options: Sequence[str]) -> int | None:
    """Index of the option with the highest ``difflib`` ratio to the answer, the first of equals; None if all are 0.

    The QA score of OmniMedVQA (arXiv 2402.09181) and the choice accuracy of PMC-VQA (arXiv 2305.10415) use it. The ratio is
    not symmetric: as there, it is that of ``SequenceMatcher(None, option, answer)``.
    """
    ratios = [difflib.SequenceMatcher(None, option, answer).ratio() for option in options]
    best = max(ratios, default=0.0)
    return ratios.index(best) if best > 0 else None


def named_letter(answer: str, options: int) -> int | None:
    """Index of the option whose letter the answer states (``B``, ``B: ..``, ``(B)``, ``**B**``, ``The answer is B.``), or None.

    The final answer counts: what stands in answer tags, else behind the last "answer is", else "B is correct", else a letter at
    the start, else one alone at the end.

    Args:
        answer: of the model.
        options: how many there are; a letter beyond them does not count.
    """
    text = plain(in_tags(answer))
    chosen = [match.end() for match in _CHOSEN.finditer(text)]
    behind = [called_answer(text), text[chosen[-1] :] if chosen else None]
    found = [match for part in behind if part is not None and (match := _LETTER.match(part))]
    found += [*_RIGHT.finditer(text)][-1:] + [match for match in (_LETTER.match(text), _ALONE.search(text)) if match]
    indices = [LETTERS.index(match[1].upper()) for match in found]
    return next((index for index in indices if index < options), None)


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """Index of the option that an answer stands for: by its letter if it states one, else by the nearest text."""
    letter = named_letter(answer, len(options))
    return letter if letter is not None else nearest_option(in_tags(answer), options)


def right_option(truth: str, options: Sequence[str]) -> int | None:
    """Index of the option that a benchmark's own answer names (``C``, ``C: text``, ``text``), or None if it fits none.

    A letter is never trusted over a text behind it: "a: cyst" is the option "cyst", whichever letter that has. If no option has
    this very text, the letter counts only if its option begins with the text, or is the one that is most like it.
    """
    match = _TRUTH.match(truth)
    if not match:
        return _with_text(truth, options)
    letter, text = LETTERS.find(match[1].upper()), match[2].strip()
    letter_fits = 0 <= letter < len(options)
    if not words(text):
        return letter if letter_fits else _with_text(truth, options)
    same = [index for index, option in enumerate(options) if words(option) == words(text)]
    if len(same) == 1:
        return same[0]
    begins = letter_fits and words(options[letter])[: len(words(text))] == words(text)
    return letter if letter_fits and (letter in same or begins or nearest_option(text, options) == letter) else None


def _with_text(text: str, options: Sequence[str]) -> int | None:
    same = [index for index, option in enumerate(options) if option.strip() == text.strip()]
    same = same or [index for index, option in enumerate(options) if words(text) and words(option) == words(text)]
    return same[0] if same else None


def lowest(losses: Sequence[float]) -> int:
    """Index of the lowest loss, the first of equals: the option that is most likely (OmniMedVQA's prefix score)."""
    return min(range(len(losses)), key=losses.__getitem__)
