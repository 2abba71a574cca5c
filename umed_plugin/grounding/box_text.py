"""Boxes in text: which numbers of an answer are a box, and which are an attempt at one that cannot be read.

`scan` walks over the tokens of a text once, so its time grows as the text does. It finds:

- boxes: four numbers in brackets or ``<box>`` tags, two pairs ``(x1,y1),(x2,y2)``, named numbers (``x1=..``, ``"xmin": ..``), and
  the bins of other models (``<loc_160>``, ``<x16>``, ``<patch_index_0044>``);
- attempts: a bracket with too few or too many numbers, one that is cut off, named numbers of which some are missing, ``nan`` or
  names in place of numbers. An attempt is a box without area: what cannot be read is not an absence;
- bare numbers: four numbers that prose has for another reason, such as ``see (1, 2, 3, 4)``. They are no box, and are only
  counted.

A box that stands behind a word such as "at" or "bbox", in a tag, in a pair of pairs or under names is `explicit`. Four bare
numbers in brackets are a box if they fit the unit of the dialect (`umed_plugin.grounding.written_box.WrittenBox.is_box`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from umed_plugin.grounding.box_bins import BINNED, bin_kind
from umed_plugin.grounding.box_tokens import (
    ANGLE,
    BETWEEN,
    CUT_TAG,
    GROUP,
    JOINS,
    KINDS,
    NAMES,
    NAN,
    NOT_NUMBERS,
    PLACES,
    PLAIN,
    TOKEN,
    UNITS,
    WORTH_A_LOOK,
    are_placeholders,
    decimal_commas,
    is_all,
    is_share,
    name_a_box,
    number_of,
    three_of_a_box,
    value_of,
)
from umed_plugin.grounding.written_box import WrittenBox

_LONGEST_BOX = 160  # characters between two brackets
_FAR = 12  # tokens after which a named number no longer belongs to the one before


@dataclass
class _Frame:
    """An open bracket or tag: the numbers right in it, and the pairs of numbers in brackets of their own."""

    start: int
    opener: str
    explicit: bool
    numbers: list[re.Match[str]] = field(default_factory=list)
    pairs: list[_Frame] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # words right in it
    nans: int = 0
    end: int = 0  # of a pair
    readable: bool = True  # nothing but numbers and separators
    has_words: bool = False
    has_box: bool = False


def scan(text: str) -> tuple[WrittenBox, ...]:
    """Boxes, attempts and bare numbers of a text, in order."""
    return _scan(text) if WORTH_A_LOOK.search(text) else ()


@lru_cache(maxsize=512)
def _scan(text: str) -> tuple[WrittenBox, ...]:
    plain = text.translate(PLAIN)
    characters = list(plain)
    for angle in ANGLE.finditer(plain):
        characters[angle.start()] = "("
        if angle[1]:
            characters[angle.end(1) - 1] = ")"
    return tuple(sorted(_Scanner("".join(characters)).found, key=lambda box: box.start))


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.found = text, []  # type: tuple[str, list[WrittenBox]]
        self.frames = [_Frame(0, "", False)]
        self.place = False  # whether a word of place stands before the next token
        self.bins: list[re.Match[str]] = []
        self.named: dict[str, re.Match[str]] = {}
        self.named_age = 0
        self.open_tags = 0
        self.placeholders: list[WrittenBox] = []  # beside a box they only say how it is written
        for token in TOKEN.finditer(text):
            self._take(token)
        self._end()

    def _take(self, token: re.Match[str]) -> None:
        kind = next(name for name in KINDS if token[name] is not None)
        if kind != "bin":
            self._flush_bins()
        self.named_age += 1
        if self.named and self.named_age > _FAR:
            self._flush_named()
        getattr(self, f"_{kind}")(token)
        if kind not in ("word", "quote", "separator") and token[0] not in ":=":
            self.place = False

    # Tokens

    def _number(self, token: re.Match[str]) -> None:
        frame = self.frames[-1]
        if not frame.opener and not frame.numbers:
            frame.explicit = self.place
        if frame.opener and frame.has_words:
            return
        frame.numbers.append(token)

    def _word(self, token: re.Match[str]) -> None:
        word, frame = token[0].lower(), self.frames[-1]
        if frame.opener and not frame.has_words and word in NOT_NUMBERS:
            frame.readable = False
            frame.nans += word in NAN
            return
        if frame.opener:
            frame.names.append(word)
        if not (frame.pairs and word in JOINS):
            self._broken(frame, token.start(), word)
        self.place = word in PLACES or (self.place and word in BETWEEN)

    def _broken(self, frame: _Frame, end: int, word: str) -> None:
        """A word among the numbers: what was there so far is no box, but may have been meant as one."""
        if frame.numbers and word not in UNITS:
            self._weigh(frame, end, closed=False)
        self._drop_pairs(frame)
        frame.numbers = []
        frame.readable, frame.has_words = not frame.opener, True

    def _other(self, token: re.Match[str]) -> None:
        frame = self.frames[-1]
        if not frame.opener:
            self._root_run(token.start())
            if token[0] not in "-:":
                self._drop_pairs(frame)
        elif token[0] not in "<>":
            frame.readable = False

    def _separator(self, token: re.Match[str]) -> None:
        pass

    _quote = _separator

    def _open(self, token: re.Match[str]) -> None:
        parent = self.frames[-1]
        if not parent.opener:
            self._root_run(token.start(), keep_pairs=True)
        nested = token[0] == parent.opener == "[" and not parent.has_words
        self.frames.append(_Frame(token.start(), token[0], self.place or parent.explicit or nested))

    def _close(self, token: re.Match[str]) -> None:
        if self.frames[-1].opener in ("", "tag"):
            return
        self._close_frame(token.end())

    def _close_frame(self, end: int) -> None:
        frame, parent = self.frames.pop(), self.frames[-1]
        if frame.explicit and are_placeholders(frame.names):
            self.placeholders.append(WrittenBox(frame.start, end, None, "none", True))
        if len(frame.numbers) == 2 and frame.readable and not frame.pairs and frame.opener != "tag":
            frame.end = end
            parent.pairs.append(frame)
            if not parent.opener or parent.has_words:
                self._pair_up(parent)
            return
        if len(frame.pairs) == 2 and frame.readable and not frame.numbers:
            self._box(frame.start, end, frame.pairs[0].numbers + frame.pairs[1].numbers, explicit=True)
            parent.has_box = True
        else:
            parent.has_box |= self._weigh(frame, end, closed=True) or frame.has_box
        self._drop_pairs(parent)

    def _pair_up(self, frame: _Frame) -> None:
        """The second of two corners that follow each other outside of a bracket of their own."""
        if len(frame.pairs) == 2:
            first, second = frame.pairs
            self._box(first.start, second.end, first.numbers + second.numbers, explicit=True)
            frame.pairs = []

    def _drop_pairs(self, frame: _Frame) -> None:
        """A corner that no second one follows, as in "at (0.1, 0.2)", was meant as a box."""
        for pair in frame.pairs:
            if pair.explicit and all(map(is_share, pair.numbers)):
                self.found.append(WrittenBox(pair.start, pair.end, None, "none", True))
        frame.pairs = []

    def _tag(self, token: re.Match[str]) -> None:
        closes = bool(token[GROUP["slash"]] or token[GROUP["end"]])
        if not closes:
            self.open_tags += 1
            self.frames.append(_Frame(token.start(), "tag", True))
        elif self.open_tags:
            self.open_tags -= 1
            while self.frames[-1].opener != "tag":
                cut = self.frames.pop()
                self._cut(cut, token.start(), self.frames[-1])
            self._close_frame(token.end())

    def _bin(self, token: re.Match[str]) -> None:
        if self.bins and bin_kind(self.bins[0]) != bin_kind(token):
            self._flush_bins()
        self.bins.append(token)

    def _named(self, token: re.Match[str]) -> None:
        frame = self.frames[-1]
        frame.readable = not frame.opener
        frame.has_box = True
        name = token[GROUP["name"]].lower().replace("_", "")
        if name in self.named:
            self._flush_named()
        self.named[name], self.named_age = token, 0
        for names, order in NAMES:
            if all(part in self.named for part in names):
                ordered = [self.named[part] for part in names]
                start, end = min(t.start() for t in ordered), max(t.end() for t in ordered)
                self._emit(start, end, list(map(number_of, ordered)), True, order)
                self.named = {}
                break

    # What a run of tokens amounts to

    def _root_run(self, end: int, keep_pairs: bool = False) -> None:
        """Numbers outside of brackets end here."""
        frame = self.frames[0]
        if frame.numbers:
            self._weigh(frame, end, closed=False)
            frame.numbers = []
        if not keep_pairs:
            frame.has_words = False

    def _flush_bins(self) -> None:
        if not self.bins:
            return
        tokens, self.bins = self.bins, []
        kind = bin_kind(tokens[0])
        size, read = BINNED[kind]
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            numbers = None
            axes = "".join(t[GROUP["axis"]] or "" for t in part).lower()
            if len(part) == size and axes in ("", "xyxy"):
                numbers = read([int("".join(filter(str.isdigit, t[0]))) for t in part])
            self.found.append(WrittenBox(part[0].start(), part[-1].end(), numbers, "bins" if numbers else "none", True))
        self.frames[-1].has_box = True

    def _flush_named(self, cut: bool = False) -> None:
        """Named numbers of which some are missing."""
        if name_a_box(self.named, self.text, cut):
            places = sorted(place for token in self.named.values() for place in token.span())
            self.found.append(WrittenBox(places[0], places[-1], None, "none", True))
        self.named = {}

    def _weigh(self, frame: _Frame, end: int, *, closed: bool) -> bool:
        """Numbers of a bracket that ends here: a box, an attempt, bare numbers or nothing. Whether one of the first two."""
        tokens, start = frame.numbers, frame.start
        if not frame.opener and tokens:
            start, end = tokens[0].start(), tokens[-1].end()
            closed = False
        if frame.has_box and not tokens:
            return False
        if closed and frame.readable and end - start <= _LONGEST_BOX:
            numbers = decimal_commas(self.text[start + 1 : end - 1]) if 4 < len(tokens) <= 8 else None
            texts = numbers or [token[0] for token in tokens]
            if len(texts) == 4:
                return self._emit(start, end, texts, frame.explicit)
        if self._is_attempt(frame, end, closed):
            self.found.append(WrittenBox(start, end, None, "none", True))
            return True
        if len(tokens) >= 4:
            self.found.append(WrittenBox(start, end, None, "none", False))
        return False

    def _is_attempt(self, frame: _Frame, end: int, closed: bool) -> bool:
        tokens = [*frame.numbers, *(token for pair in frame.pairs for token in pair.numbers)]
        shares = sum(map(is_share, tokens))
        if frame.opener == "tag":
            return bool(tokens)
        if not frame.opener:
            if len(tokens) == 3:
                return frame.explicit and three_of_a_box(self.text, tokens)
            return len(tokens) >= 4 and shares >= 4 and (frame.explicit or is_all(self.text, tokens[0].start(), end))
        if frame.explicit:
            return len(tokens) + frame.nans >= 2
        if frame.opener == "[":
            return shares >= 3 or frame.nans >= 3
        if closed and frame.readable and frame.opener == "(":
            return three_of_a_box(self.text, tokens, frame.start)
        return not closed and shares >= 4

    def _cut(self, frame: _Frame, end: int, parent: _Frame) -> bool:
        """A bracket that is never closed, because the answer was cut off."""
        if frame.has_words or frame.has_box:
            return False
        tokens = [*frame.numbers, *(token for pair in frame.pairs for token in pair.numbers)]
        shares, sizes = sum(map(is_share, tokens)), [abs(value_of(token[0])) for token in tokens]
        meant = frame.explicit and frame.opener != "{"
        if frame.opener == "[":
            # No list of references begins with 0, and nearly every box does.
            meant |= not tokens or shares >= 1 or (len(tokens) >= 2 and max(sizes) >= 100) or not any(sizes)
        elif frame.opener in "({":
            meant |= shares >= 2
        if meant:
            self.found.append(WrittenBox(frame.start, end, None, "none", True))
            parent.has_box = True
        elif len(tokens) >= 4:
            self.found.append(WrittenBox(frame.start, end, None, "none", False))
        return meant

    def _end(self) -> None:
        self._flush_bins()
        self._flush_named(cut=any(frame.opener == "{" for frame in self.frames))
        end = len(self.text.rstrip())
        cut_tag = CUT_TAG.search(self.text, max(0, end - 24), end)
        if cut_tag and not any(box.end == cut_tag.start() and not box.numbers for box in self.found[-1:]):
            self.found.append(WrittenBox(cut_tag.start(), end, None, "none", True))
        while len(self.frames) > 1:
            frame = self.frames.pop()
            if self._cut(frame, end, self.frames[-1]) or frame.has_box:
                break  # brackets around it are the same attempt
            if frame.has_words and not self.frames[-1].numbers:
                break  # and around prose they are prose, unless numbers stand before it
        root = self.frames[0]
        self._root_run(end)
        self._drop_pairs(root)
        self.found += self.placeholders if not any(box.numbers or box.explicit for box in self.found) else []

    def _box(self, start: int, end: int, tokens: Sequence[re.Match[str]], explicit: bool) -> None:
        self._emit(start, end, [token[0] for token in tokens], explicit)

    def _emit(self, start: int, end: int, texts: Sequence[str], explicit: bool, order: str | None = None) -> bool:
        a, b, c, d = map(value_of, texts)
        if any("%" in text for text in texts):
            a, b, c, d, kind = a / 100, b / 100, c / 100, d / 100, "percent"
        else:
            whole = all(value.is_integer() for value in (a, b, c, d))
            kind = "whole" if whole and (max(a, b, c, d) > 1 or "." not in "".join(texts)) else "decimal"
        self.found.append(WrittenBox(start, end, (a, b, c, d), kind, explicit, order))
        return True
