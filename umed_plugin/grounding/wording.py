"""Whether a text reads like language: words that are none, and text that comes twice. Boxes do not count as text.

Without a language model this can only be told from the outside. Two sources are used:

- the form of a word: letters mixed with digits (``there0``), words run together at a full stop (``tumor.c2``), a single letter,
  no vowel, a letter three times in a row, more than 30 letters, a bracket that is never closed, a small letter after a full stop;
- the wording of the references, if they are given (`Wording`): a word that is one of theirs without some of its letters
  (``consstent``), or several run together (``areain``); and words of theirs in an order that means nothing.

New words are no fault, in whatever language: the references of a few templates have some hundred words, and an answer may have
others. So neither invented words are found, nor new ones in a wrong order. A single word may look damaged by chance. Where
several do, new words count too that have three letters in a row that no reference has. A word of the references has no faulty
form, so ``pT2N0`` may stand in an answer where it may stand in a reference.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from umed_plugin.grounding.boxes import blot_boxes, rewrite_boxes

# A text with at least this share of faulty words reads like no language at all.
GARBLED = 0.25
# Of the words of a text, one in eight may look damaged, and one in any case.
DAMAGED_ALLOWED = 8
# Of the pairs of neighbouring words that the references use, a text in their language shares this share with them. Words in
# random order share about a tenth, new sentences about the same findings more than half. A few pairs may all be new.
FAMILIAR, FEWEST_PAIRS = 0.4, 6
_MOST_LETTERS = 30
_MANY_WORDS = 500  # of the references; a short word is like some of them by chance
_WORDS_OF_ONE_LETTER = "aeiouyx"  # in some languages; "x" in "3 x 4"

_BOX = "\x00"
_WIDE = (
    "\u3001\u3002\uff0c\uff0e\uff01\uff1a\uff1b\uff1f\u300c\u300d\uff08\uff09"  # punctuation without spaces: Chinese
)
_OUTSIDE = f"\"'`*_.,;:!?()[]{{}}<>\u2018\u2019\u201c\u201d\u2026\u2013\u2014-/{_WIDE}"
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
_AFTER_WIDE = re.compile(f"([{_WIDE}])")
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
        words -= {"", _BOX}
        parts = frozenset(part for word in words for part in _parts(word))
        return cls(frozenset(words), parts, frozenset(pairs))

    def familiar(self, text: str) -> float:
        """0-1: 1 if at least `FAMILIAR` of the pairs of the references' words stand in a reference, less in proportion.

        Pairs with a new word say nothing. Fewer than `FEWEST_PAIRS` others say too little.
        """
        row = _row(text)
        pairs = [pair for pair in zip(row, row[1:]) if all(map(self._has, pair))]
        known = sum(pair in self.pairs for pair in pairs)
        return min(1.0, known / (FAMILIAR * len(pairs))) if len(pairs) >= FEWEST_PAIRS else 1.0

    def is_damaged(self, chunk: str) -> bool:
        """Whether a word that no reference has is one of theirs without some of its letters, or several run together."""
        return any(_is_damaged(word, self) for word in _LETTERS.findall(chunk.lower()))

    def is_strange(self, chunk: str) -> bool:
        """Whether a word has letters next to each other that no word of a reference has."""
        return any(part not in self.parts for word in _LETTERS.findall(chunk.lower()) for part in _parts(word))

    def _has(self, word: str) -> bool:
        return word in self.words or word in (_BOX, "0")


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
    lost = len(faulty_words(text, known, wording))
    clean = max(0.0, 1 - lost / (GARBLED * total))
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
    """The words of a text that are none, its brackets without a counterpart, and then words that are probably none.

    Arguments as for `language`.
    """
    faulty: list[str] = []
    new: list[tuple[str, str]] = []  # as written, and without punctuation
    begins, blotted = False, _blotted(text)
    for written in blotted.split():
        chunk, shown = written.strip(_OUTSIDE), written.replace(_BOX, "[box]")
        if chunk and chunk != _BOX and not _ENUMERATED.fullmatch(written):
            unknown = not _is_known(chunk, known, wording)
            if (begins and chunk[0].islower()) or (unknown and _is_faulty(chunk)):
                faulty.append(shown)
            elif unknown:
                new.append((shown, chunk))
        begins = written[-1] in ".!?" and written.lower() not in _ABBREVIATIONS and not _LISTED.fullmatch(written)
    return faulty + _unmatched_brackets(blotted) + _probably_faulty(new, count_words(text), wording)


def _probably_faulty(new: Iterable[tuple[str, str]], total: int, wording: Wording | None) -> list[str]:
    """Of the new words of a text those that count as faulty; none where no more look damaged than in a clean text."""
    if wording is None:
        return []
    damaged, strange = [], []
    for shown, chunk in new:
        if wording.is_damaged(chunk):
            damaged.append(shown)
        elif wording.is_strange(chunk):
            strange.append(shown)
    return damaged + strange if len(damaged) > max(1, total // DAMAGED_ALLOWED) else []


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
    if len(chunk) == 1 and chunk.isascii() and chunk.islower() and chunk not in _WORDS_OF_ONE_LETTER:
        return True
    if any(len(word) > _MOST_LETTERS and _has_spaces(word) for word in _LETTERS.findall(chunk)):
        return True
    return chunk.islower() and bool(_NO_VOWEL.fullmatch(chunk.replace("y", "a")))


@lru_cache(maxsize=4096)
def _is_damaged(word: str, wording: Wording) -> bool:
    least = 4 if len(wording.words) < _MANY_WORDS else 5
    if word in wording.words or len(word) < least or not _has_spaces(word):
        return False
    return _lacks_letters(word, wording) or _runs_together(word, wording)


def _has_spaces(word: str) -> bool:
    """Whether words of this script stand between spaces, by its capital letters. Chinese, Japanese and Thai have neither."""
    return word.lower() != word.upper()


def _runs_together(word: str, wording: Wording) -> bool:
    """Whether words of the references, of two letters or more, make up the word; one of them may lack letters."""
    ends, damaged = {0}, set[int]()  # of what words make up from the beginning, the latter with one that lacks letters
    for end in range(2, len(word) + 1):
        for start in range(end - 1):
            part = word[start:end]
            if part in wording.words:
                ends |= {end} if start in ends else set()
                damaged |= {end} if start in damaged else set()
            elif start in ends and 4 <= len(part) < len(word) and _lacks_letters(part, wording):
                damaged.add(end)
    return len(word) in ends | damaged


def _lacks_letters(word: str, wording: Wording) -> bool:
    """Whether a longer word of the references has all its letters in this order, and not only an end more, as a plural has."""
    letters, longest = {*word}, 1.5 * len(word)
    return any(
        letters <= own and len(word) < len(other) <= longest and not other.startswith(word) and _is_within(word, other)
        for other, own in _by_beginning(wording).get(word[0], ())
    )


@lru_cache(maxsize=4)
def _by_beginning(wording: Wording) -> dict[str, list[tuple[str, frozenset[str]]]]:
    """A letter -> the references' words, with their letters, whose first or second letter it is: they may have lost the first."""
    found: dict[str, list[tuple[str, frozenset[str]]]] = {}
    for word in wording.words:
        for letter in {*word[:2]}:
            found.setdefault(letter, []).append((word, frozenset(word)))
    return found


def _is_within(word: str, other: str) -> bool:
    """Whether the letters of a word stand in the other one, in their order."""
    letters = iter(other)
    return all(letter in letters for letter in word)


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
    text = unicodedata.normalize("NFC", text)  # an accent may be a sign of its own
    return _AFTER_WIDE.sub(r"\1 ", blot_boxes(text.replace(_BOX, " "), f" {_BOX} "))


def _chunks(text: str, keep_boxes: bool = False) -> list[str]:
    """What stands between spaces, without the punctuation around it; each box is one, `_BOX` or its numbers."""
    if keep_boxes:
        written = _AFTER_WIDE.sub(r"\1 ", rewrite_boxes(text, lambda box: f" {_BOX}{box} ".replace(", ", ",")))
    else:
        written = _blotted(text)
    return [chunk for chunk in (part.strip(_OUTSIDE) for part in written.split()) if chunk]
