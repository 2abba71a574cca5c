"""Where a text repeats the words of a phrase, such as "small left basal effusion"."""

from __future__ import annotations

import re

# Words that mean nothing without the others.
_FUNCTION_WORDS = frozenset(
    (
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "by",
        "for",
        "from",
        "has",
        "have",
        "in",
        "into",
        "is",
        "it",
        "its",
    )
) | {"no", "not", "of", "on", "or", "that", "the", "there", "this", "to", "was", "were", "with"}
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")


def phrase_spans(text: str, phrase: str) -> list[tuple[int, int]]:
    """Spans ``[start, end)`` of ``text`` with a word of the phrase, in any case; "the", "of" and the like do not count.

    Example:
        >>> phrase_spans("The effusion is at [0.10, 0.20, 0.30, 0.40].", "Small left effusion of the lung.")
        [(4, 12)]
    """
    wanted = {word.lower() for word in _WORD.findall(phrase)} - _FUNCTION_WORDS
    return [match.span() for match in _WORD.finditer(text) if match.group().lower() in wanted]
