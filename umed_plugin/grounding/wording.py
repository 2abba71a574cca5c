"""Whether a text reads like language: words that are none, and text that comes twice. Boxes do not count as text.

Without a language model this can only be told from the outside. Two sources are used:

- the form of a word: letters mixed with digits (``there0``), words run together at a full stop (``tumor.c2``), a single letter,
  no vowel, a letter three times in a row, a bracket that is never closed, a small letter after a full stop;
- the wording of the references, if they are given (`Wording`): a word with three letters in a row that no word of a reference
  has (``isain``), and pairs of words that no reference has, for words in an order that means nothing.

A word of the references has no faulty form, so ``pT2N0`` may stand in an answer where it may stand in a reference.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from umed_plugin.grounding.boxes import blot_boxes, rewrite_boxes

# A text with at least this share of faulty words reads like no language at all.
GARBLED = 0.25
# Share of pairs of neighbouring words that a text in the references' language shares with them. Words in random order share
# about a tenth, new sentences about the same findings more than half.
FAMILIAR = 0.3

_BOX = "\x00"
_OUTSIDE = "\"'`*_.,;:!?()[]{}<>\u2018\u2019\u201c\u201d\u2026\u2013\u2014-/"
_PLAIN = re.compile(
    r"""
    [^\W\d_]+(?:['\u2019/-][^\W\d_]+)*                   # a word, also with hyphens
    | [+-]?\d+(?:[.,]\d+)*(?:st|nd|rd|th)?(?:%|[cm]m|ml|kg)?  # a number, an ordinal, a size
    | (?:[^\W\d_]\.)+[^\W\d_]                             # e.g
    | [A-Z]{1,3}\d{1,2}(?:[-/](?:[A-Z]{0,3}\d{1,2}|[^\W\d_]+))?  # T2, C5-C6, T2-weighted
    | \d+(?:-|\s?x\s?|\u00d7)[\dA-Za-z]+                  # 3-cm, 3x4
    """,
    re.X,
)
_NO_VOWEL = re.compile(r"[b-df-hj-np-tv-xz]{4,}", re.I)
_THRICE = re.compile(r"([a-z])\1\1", re.I)
_LETTERS = re.compile(r"[^\W\d_]+")
_ABBREVIATIONS = {"approx.", "ca.", "cf.", "dr.", "fig.", "no.", "resp.", "vs."}
_BRACKET = re.compile(r"[()\[\]{}]")
_ENUMERATED = re.compile(r"(?<!\S)\w{1,2}\)$")  # "1)" and "b)" close nothing
_PAIRS = {")": "(", "]": "[", "}": "{"}


@dataclass(frozen=True)
class Wording:
    """What the references of a data set are written with.

    Attributes:
        words: their words, in lower case.
        parts: three letters in a row of these words, with a space for a word's beginning and end.
        pairs: neighbouring words; a box and a number count as one word each.
    """

    words: frozenset[str]
    parts: frozenset[str]
    pairs: frozenset[tuple[str, str]]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Wording:
        """The wording of some references.

        Example:
            >>> wording = Wording.of(["A nodule lies at [0.10, 0.20, 0.30, 0.40]."])
            >>> sorted(wording.words), ("a", "nodule") in wording.pairs
            (['a', 'at', 'lies', 'nodule'], True)
        """
        words: set[str] = set()
        pairs: set[tuple[str, str]] = set()
        for text in texts:
            row = _row(text)
            pairs.update(zip(row, row[1:]))
            words.update(word for chunk in _chunks(text) for word in (chunk.lower(), *_LETTERS.findall(chunk.lower())))
        words.discard("")
        parts = frozenset(part for word in words for part in _parts(word))
        return cls(frozenset(words - {_BOX}), parts, frozenset(pairs))

    def familiar(self, text: str) -> float:
        """0-1: 1 if at least `FAMILIAR` of the text's pairs of words stand in a reference, less in proportion."""
        row = _row(text)
        known = sum(pair in self.pairs for pair in zip(row, row[1:]))
        return min(1.0, known / (FAMILIAR * (len(row) - 1))) if len(row) > 2 else 1.0


def language(text: str, known: Collection[str] = (), wording: Wording | None = None) -> float:
    """How much a text reads like language, 0-1; 0 for a text without words.

    Args:
        text: with or without boxes.
        known: further words whose form is not faulty, in lower case, such as those of the study's own reference.
        wording: of the references.

    Example:
        >>> language("A nodule lies at [0.10, 0.20, 0.30, 0.40].")
        1.0
        >>> language("r with areain t there0. The at [0. tumor. b isain tumor.c2 occupies:m], in the right centre.")
        0.0
    """
    total = sum(chunk != _BOX for chunk in _chunks(text))
    if not total:
        return 0.0
    clean = max(0.0, 1 - len(faulty_words(text, known, wording)) / (GARBLED * total))
    return clean * (1.0 if wording is None else wording.familiar(text))


def language_beside(text: str, reference: str, known: Collection[str] = ()) -> float:
    """How much an answer reads like language where its reference does, 0-1: 1 if it has no more faults than the reference.

    The rules know the writing of European languages. A reference in which they find no language says that they do not fit here:
    then every answer has 1. A reference that breaks a rule, such as by small letters after a full stop, allows answers to do so.

    Args:
        text, reference: with or without boxes.
        known: as for `language`.

    Example:
        >>> language_beside("A nodule.", "There is a nodule."), language_beside("no2 d[ule b there0", "There is a nodule.")
        (1.0, 0.0)
        >>> language_beside("肺部有结节。", "左肺有结节。")
        1.0
    """
    least = language(reference)
    return min(1.0, language(text, known) / least) if least else 1.0


def known_words(record: Mapping[str, Any]) -> frozenset[str]:
    """Words whose form is right in an answer to a record: those of its question, its reference and its names."""
    texts = [str(turn.get("value", "")) for turn in record["conversations"][:2]]
    texts += [name for names in record["terms"].values() for name in names]
    return Wording.of(texts).words


def faulty_words(text: str, known: Collection[str] = (), wording: Wording | None = None) -> list[str]:
    """The words of a text that are none, and its brackets without a counterpart, in order; arguments as for `language`."""
    faulty, begins, blotted = [], False, _blotted(text)
    for written in blotted.split():
        chunk = written.strip(_OUTSIDE)
        if chunk and chunk != _BOX and not _ENUMERATED.fullmatch(written):
            strange = _is_faulty(chunk) or (wording is not None and _is_strange(chunk, wording))
            if (begins and chunk[0].islower()) or (strange and not _is_known(chunk, known, wording)):
                faulty.append(written.replace(_BOX, "[box]"))
        begins = written[-1] in ".!?" and written.lower() not in _ABBREVIATIONS and not _LISTED.fullmatch(written)
    return faulty + _unmatched_brackets(blotted)


# The number or letter of a list ("1.", "a."), and an abbreviation with a full stop in it ("e.g.").
_LISTED = re.compile(r"\(?\d{1,2}[.)]|[a-zA-Z][.)]|(?:[^\W\d_]\.){2,}")


def repeated_words(text: str, times: int = 1) -> int:
    """Number of words of a text that only repeat others: right after them, or as a sentence that was there before.

    Args:
        text: with or without boxes; two boxes are the same word if their numbers are the same.
        times: how often a sentence may come, such as once for each finding.

    Example:
        >>> repeated_words("tumor. tumor. tumor.")
        2
        >>> repeated_words("The first is a nodule. The second is a nodule.")
        0
    """
    words = [chunk.lower() for chunk in _chunks(text, keep_boxes=True)]
    return max(_repeated_at_once(words), _repeated_sentences(text, times))


def _repeated_at_once(words: list[str]) -> int:
    """Words in runs of up to 20 that repeat the run of the same length right before them."""
    repeated = bytearray(len(words))
    for size in range(1, min(20, len(words) // 2) + 1):
        same = 0
        for place in range(size, len(words)):
            same = same + 1 if words[place] == words[place - size] else 0
            if same >= size and not (size == 1 and words[place][0].isdigit()):
                repeated[place - size + 1 : place + 1] = b"\1" * size
    return sum(repeated)


def _repeated_sentences(text: str, times: int) -> int:
    seen: dict[str, int] = {}
    repeated = 0
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", _blotted(text).lower()):
        words = sentence.replace(_BOX, " ").split()
        key = " ".join(words)
        seen[key] = seen.get(key, 0) + 1
        repeated += len(words) if seen[key] > times else 0
    return repeated


def count_words(text: str) -> int:
    """Number of words; a box is one."""
    return len(_chunks(text))


def _is_known(chunk: str, known: Collection[str], wording: Wording | None) -> bool:
    lowered = chunk.lower()
    return lowered in known or (wording is not None and lowered in wording.words)


def _is_faulty(chunk: str) -> bool:
    """Whether a word has a form that no word has."""
    if not _PLAIN.fullmatch(chunk) or _THRICE.search(chunk):
        return True
    if len(chunk) == 1 and chunk.isascii() and chunk.islower() and chunk not in "ax":
        return True
    return chunk.islower() and bool(_NO_VOWEL.fullmatch(chunk.replace("y", "a")))


def _is_strange(chunk: str, wording: Wording) -> bool:
    """Whether a word has letters next to each other that no word of a reference has."""
    return any(part not in wording.parts for word in _LETTERS.findall(chunk.lower()) for part in _parts(word))


def _unmatched_brackets(blotted: str) -> list[str]:
    opened: list[str] = []
    unmatched: list[str] = []
    for bracket in _BRACKET.finditer(blotted):
        if bracket[0] in "([{":
            opened.append(bracket[0])
        elif opened and opened[-1] == _PAIRS[bracket[0]]:
            opened.pop()
        elif not _ENUMERATED.search(blotted, 0, bracket.end()):
            unmatched.append(bracket[0])
    return unmatched + opened


def _parts(word: str) -> list[str]:
    padded = f" {word} "
    return [padded[i : i + 3] for i in range(len(padded) - 2)]


def _row(text: str) -> list[str]:
    """The words of a text in lower case, numbers as one word."""
    return ["0" if chunk[0].isdigit() else chunk.lower() for chunk in _chunks(text)]


@lru_cache(maxsize=512)
def _blotted(text: str) -> str:
    return blot_boxes(text.replace(_BOX, " "), f" {_BOX} ")


def _chunks(text: str, keep_boxes: bool = False) -> list[str]:
    """What stands between spaces, without the punctuation around it; each box is one, `_BOX` or its numbers."""
    written = rewrite_boxes(text, lambda box: f" {_BOX}{box} ".replace(", ", ",")) if keep_boxes else _blotted(text)
    return [chunk for chunk in (part.strip(_OUTSIDE) for part in written.split()) if chunk]
