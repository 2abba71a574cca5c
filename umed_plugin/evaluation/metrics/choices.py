"""Multiple choice: which option an answer stands for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"
# "B", "B.", "(B)", "B: text", "The answer is B", "Option B": a letter by itself, at the start or behind such words.
_LETTER = re.compile(
    r"\s*(?:(?:the\s+)?(?:correct\s+|best\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*)?"
    r"[(\[*\"']*([A-J])(?:[)\]*\"':.,;]|\s*$|\s+[-\u2013])",
    re.IGNORECASE,
)


def nearest_option(answer: str, options: Sequence[str]) -> int | None:
    """Index of the option with the highest ``difflib`` ratio to the answer, the first of equals; None if all are 0.

    The QA score of OmniMedVQA (arXiv 2402.09181) and the choice accuracy of PMC-VQA (arXiv 2305.10415) use it. The ratio is
    not symmetric: as there, it is that of ``SequenceMatcher(None, option, answer)``.
    """
    ratios = [difflib.SequenceMatcher(None, option, answer).ratio() for option in options]
    best = max(ratios, default=0.0)
    return ratios.index(best) if best > 0 else None


def named_letter(answer: str, options: int) -> int | None:
    """Index of the option whose letter the answer begins with (``B``, ``B: ..``, ``(B)``, ``The answer is B.``), or None.

    Args:
        answer: of the model.
        options: how many there are; a letter beyond them does not count.
    """
    match = _LETTER.match(answer)
    index = LETTERS.index(match[1].upper()) if match else options
    return index if index < options else None


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """Index of the option that an answer stands for: by its letter if it begins with one, else by the nearest text."""
    letter = named_letter(answer, len(options))
    return letter if letter is not None else nearest_option(answer, options)


def lowest(losses: Sequence[float]) -> int:
    """Index of the lowest loss, the first of equals: the option that is most likely (OmniMedVQA's prefix score)."""
    return min(range(len(losses)), key=losses.__getitem__)
