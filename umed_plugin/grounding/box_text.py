"""Boxes in text: which numbers of an answer are a box, and which are an attempt at one that cannot be read.

`scan` walks over the tokens of a text once, so its time grows as the text does. It finds:

- boxes: four numbers in brackets or ``<box>`` tags, two pairs ``(x1,y1),(x2,y2)``, named numbers (``x1=..``, ``"xmin": ..``), and
  the bins of other models (``<loc_160>``, ``<x16>``, ``<patch_index_0044>``);
- attempts: a bracket with too few or too many numbers, one that is cut off, named numbers of which some are missing. An attempt
  is a box without area: what cannot be read is not an absence;
- bare numbers: four numbers that prose has for another reason, such as ``see (1, 2, 3, 4)``. They are no box, and are only
  counted.

A box that stands behind a word such as "at" or "bbox", in a tag, in a pair of pairs or under names is `explicit`. Four bare
numbers in brackets are a box if they fit the unit of the dialect (`WrittenBox.is_box`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from umed_plugin.grounding.box_bins import BINNED, Box, bin_kind

# Full-width and other forms of the characters that boxes are written with, one for one, so that places in the text stay.
_PLAIN = str.maketrans("，、،；．٫％（）［］【】｛｝〔〕⟨⟩〈〉《》：＝＜＞＋－−", ",,,;..%()[][]{}[]()()():=<>+--")

_NUMBER = r"(?:(?<![\d.])[+-])?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]\d{1,3})?"
_AXIS = r"[xy]_?(?:min|max|[0-2])"
_NAME = rf"{_AXIS}|c[xy]|[xywh]|left|top|right|bottom|width|height"
_TOKEN = re.compile(
    rf"""
    (?P<named> \b({_NAME})["'`]?\s{{0,3}}[:=]\s{{0,3}}["'`]?({_NUMBER})(?:\s?%)? )
    | (?P<bin> <(?:(loc_)(\d{{1,4}})|(loc)(\d{{4}})|([xy])(\d{{1,4}})|(patch_index_)(\d{{1,4}}))> )
    | (?P<tag> <(/|\|/)?\|?(?:(?:begin_of_|bounding_?)?b?box(?:es)?(?:_start)?|(end_of_box|box_end)|det)\|?> )
    | (?P<number> {_NUMBER}(?:\s?%)? )
    | (?P<word> [^\W\d]\w* )
    | (?P<open> [\[(\{{] )
    | (?P<close> [\])\}}] )
    | (?P<separator> [,;] )
    | (?P<quote> ["'`$*\\|_] )
    | (?P<other> \S )
    """,
    re.X | re.I,
)
# Text in which nothing can be found has no digit, and no bracket or tag at its end.
_WORTH_A_LOOK = re.compile(r"\d|[\[(<{]|box", re.I)
# Numbers in angle brackets, closed or cut off; a single one ("< 5 mm") is a comparison.
_ANGLE = re.compile(rf"<(?=\s{{0,3}}{_NUMBER}%?(?:\s{{0,3}}[,;]\s{{0,3}}{_NUMBER}%?){{1,7}}[\s,;.]{{0,3}}(>|$))")
_CUT_TAG = re.compile(r"<\|?(?:box\w*|bbox|loc_?\d{0,4}|patch_index_\d{0,4}|[xy]\d{1,4})\|?$", re.I)

# Words before numbers that make them a box, and words that may stand between.
_PLACES = {
    *(
        "at",
        "box",
        "boxes",
        "bbox",
        "bboxes",
        "bbox_2d",
        "box_2d",
        "bounding_box",
        "coordinate",
        "coordinates",
        "coords",
    ),
    *("located", "location", "position", "region", "area", "roi", "rectangle"),
}
_BETWEEN = {"is", "are", "was", "were", "be", "here"}
# Words between the two corners of a box.
_JOINS = {"to", "and", "through", "corner", "lower", "upper", "top", "bottom", "left", "right"}
_UNITS = {"cm", "mm", "m", "ml", "cc", "mg", "g", "kg", "hu", "suv", "ms", "s", "ng", "pg", "mmhg"}
_NOT_NUMBERS = {"nan", "inf", "infinity", "none", "null"}
_NAMES = (
    (("x1", "y1", "x2", "y2"), "xyxy"),
    (("x0", "y0", "x1", "y1"), "xyxy"),
    (("xmin", "ymin", "xmax", "ymax"), "xyxy"),
    (("left", "top", "right", "bottom"), "xyxy"),
    (("left", "top", "width", "height"), "xywh"),
    (("x", "y", "w", "h"), "xywh"),
    (("x", "y", "width", "height"), "xywh"),
    (("cx", "cy", "w", "h"), "cxcywh"),
    (("cx", "cy", "width", "height"), "cxcywh"),
)
_LONGEST_BOX = 160  # characters between two brackets
_FAR = 12  # tokens after which a named number no longer belongs to the one before


@dataclass(frozen=True)
class WrittenBox:
    """A box, an attempt at one, or four bare numbers, as a text has them.

    Attributes:
        start, end: its characters in the text.
        numbers: four numbers as written; of ``percent`` and ``bins`` in 0-1. None if it cannot be read.
        kind: ``whole`` or ``decimal`` numbers, ``percent``, ``bins``, or ``none`` if it cannot be read.
        explicit: whether something beside the numbers says that they are a box.
        order: of the numbers, where the text names them; None: the dialect's.
    """

    start: int
    end: int
    numbers: Box | None
    kind: str
    explicit: bool
    order: str | None = None

    def is_box(self, unit: str = "auto") -> bool:
        """Whether the numbers are a box in a dialect of this unit; False for an attempt that cannot be read."""
        if self.numbers is None:
            return False
        if self.explicit or self.kind in ("percent", "bins"):
            return True
        steps = {round(after - before, 9) for before, after in zip(self.numbers, self.numbers[1:])}
        largest = max(map(abs, self.numbers))
        if largest > 1 and len(steps) == 1 and 0 < next(iter(steps)) < 10:
            return False  # an enumeration: "images (1, 2, 3, 4)"
        if unit not in ("auto", "1"):
            return True
        if self.kind == "whole":
            return largest <= 1 or largest >= 100
        return largest <= 2 or sum(0 <= value <= 1 for value in self.numbers) >= 2

    def corners(self, order: str = "xyxy") -> Box:
        """The numbers as x1, y1, x2, y2, in their own unit.

        Args:
            order: of the dialect, where the text does not name the numbers: ``xyxy``, ``yxyx``, ``xywh`` or ``cxcywh``.

        Raises:
            ValueError: it cannot be read.
        """
        if self.numbers is None:
            raise ValueError("an attempt at a box has no corners")
        a, b, c, d = self.numbers
        return {
            "xyxy": (a, b, c, d),
            "yxyx": (b, a, d, c),
            "xywh": (a, b, a + c, b + d),
            "cxcywh": (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
        }[self.order or order]

    def is_attempt(self) -> bool:
        """Whether it was meant as a box, and cannot be read."""
        return self.numbers is None and self.explicit


@dataclass
class _Frame:
    """An open bracket or tag: the numbers right in it, and the pairs of numbers in brackets of their own."""

    start: int
    opener: str
    explicit: bool
    numbers: list[re.Match[str]] = field(default_factory=list)
    pairs: list[_Frame] = field(default_factory=list)
    end: int = 0  # of a pair
    readable: bool = True  # nothing but numbers and separators
    has_words: bool = False
    has_box: bool = False


def scan(text: str) -> tuple[WrittenBox, ...]:
    """Boxes, attempts and bare numbers of a text, in order."""
    return _scan(text) if _WORTH_A_LOOK.search(text) else ()


@lru_cache(maxsize=512)
def _scan(text: str) -> tuple[WrittenBox, ...]:
    plain = text.translate(_PLAIN)
    characters = list(plain)
    for angle in _ANGLE.finditer(plain):
        characters[angle.start()] = "("
        if angle[1]:
            characters[angle.end(1) - 1] = ")"
    return tuple(sorted(_Scanner("".join(characters)).found, key=lambda box: box.start))


def _value(number: str) -> float:
    return float(number.rstrip("%").rstrip())


def _is_share(number: re.Match[str]) -> bool:
    """Whether a number token is a decimal number in 0-1."""
    return "." in number[0] and "%" not in number[0] and 0 <= _value(number[0]) <= 1


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.found = text, []  # type: tuple[str, list[WrittenBox]]
        self.frames = [_Frame(0, "", False)]
        self.place = False  # whether a word of place stands before the next token
        self.bins: list[re.Match[str]] = []
        self.named: dict[str, re.Match[str]] = {}
        self.named_age = 0
        self.open_tags = 0
        for token in _TOKEN.finditer(text):
            self._take(token)
        self._end()

    def _take(self, token: re.Match[str]) -> None:
        kind = next(name for name in _KINDS if token[name] is not None)
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
        if frame.opener and not frame.has_words and word in _NOT_NUMBERS:
            frame.readable = False
            return
        if not (frame.pairs and word in _JOINS):
            self._broken(frame, token.start(), word)
        self.place = word in _PLACES or (self.place and word in _BETWEEN)

    def _broken(self, frame: _Frame, end: int, word: str) -> None:
        """A word among the numbers: what was there so far is no box, but may have been meant as one."""
        if frame.numbers and word not in _UNITS:
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
            if pair.explicit and all(map(_is_share, pair.numbers)):
                self.found.append(WrittenBox(pair.start, pair.end, None, "none", True))
        frame.pairs = []

    def _tag(self, token: re.Match[str]) -> None:
        closes = bool(token[_GROUP["slash"]] or token[_GROUP["end"]])
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
        name = token[_GROUP["name"]].lower().replace("_", "")
        if name in self.named:
            self._flush_named()
        self.named[name], self.named_age = token, 0
        for names, order in _NAMES:
            if all(part in self.named for part in names):
                ordered = [self.named[part] for part in names]
                start, end = min(t.start() for t in ordered), max(t.end() for t in ordered)
                self._emit(
                    start, end, [t[0].split(":")[-1].split("=")[-1].strip("\"'` ") for t in ordered], True, order
                )
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
            axes = "".join(t[_GROUP["axis"]] or "" for t in part).lower()
            if len(part) == size and axes in ("", "xyxy"):
                numbers = read([int("".join(filter(str.isdigit, t[0]))) for t in part])
            self.found.append(WrittenBox(part[0].start(), part[-1].end(), numbers, "bins" if numbers else "none", True))
        self.frames[-1].has_box = True

    def _flush_named(self, least: int = 2) -> None:
        """Named numbers of which some are missing. Only names such as x1 or ymin tell that a box was meant."""
        tokens = [token for name, token in self.named.items() if len(name) > 1 and re.fullmatch(_AXIS, name)]
        if len(tokens) >= least:
            self.found.append(
                WrittenBox(min(t.start() for t in tokens), max(t.end() for t in tokens), None, "none", True)
            )
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
            numbers = _decimal_commas(self.text[start + 1 : end - 1]) if 4 < len(tokens) <= 8 else None
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
        shares = sum(map(_is_share, tokens))
        if frame.opener == "tag":
            return bool(tokens)
        if not frame.opener:
            return len(tokens) >= 4 and shares >= 4 and (frame.explicit or self._is_all(tokens[0].start(), end))
        if frame.explicit:
            return len(tokens) >= 2
        if frame.opener == "[":
            return shares >= 3
        return not closed and shares >= 4

    def _is_all(self, start: int, end: int) -> bool:
        """Whether the text holds nothing beside this."""
        return not self.text[:start].strip() if start < 8 and not self.text[end:].strip(" .\n") else False

    def _cut(self, frame: _Frame, end: int, parent: _Frame) -> bool:
        """A bracket that is never closed, because the answer was cut off."""
        if frame.has_words or frame.has_box:
            return False
        tokens = [*frame.numbers, *(token for pair in frame.pairs for token in pair.numbers)]
        shares, sizes = sum(map(_is_share, tokens)), [abs(_value(token[0])) for token in tokens]
        meant = frame.explicit and frame.opener != "{"
        if frame.opener == "[":
            meant |= not tokens or shares >= 1 or (len(tokens) >= 2 and max(sizes) >= 100)
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
        self._flush_named(least=1 if any(frame.opener == "{" for frame in self.frames) else 2)
        end = len(self.text.rstrip())
        cut_tag = _CUT_TAG.search(self.text, max(0, end - 24), end)
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

    def _box(self, start: int, end: int, tokens: Sequence[re.Match[str]], explicit: bool) -> None:
        self._emit(start, end, [token[0] for token in tokens], explicit)

    def _emit(self, start: int, end: int, texts: Sequence[str], explicit: bool, order: str | None = None) -> bool:
        a, b, c, d = map(_value, texts)
        if any("%" in text for text in texts):
            a, b, c, d, kind = a / 100, b / 100, c / 100, d / 100, "percent"
        else:
            whole = all(value.is_integer() for value in (a, b, c, d))
            kind = "whole" if whole and (max(a, b, c, d) > 1 or "." not in "".join(texts)) else "decimal"
        self.found.append(WrittenBox(start, end, (a, b, c, d), kind, explicit, order))
        return True


_KINDS = ("named", "bin", "tag", "number", "word", "open", "close", "separator", "quote", "other")
# Places of the groups without a name in _TOKEN.
_GROUP = {
    "name": _TOKEN.groupindex["named"] + 1,
    "axis": _TOKEN.groupindex["bin"] + 5,
    "slash": _TOKEN.groupindex["tag"] + 1,
    "end": _TOKEN.groupindex["tag"] + 2,
}


def _decimal_commas(inner: str) -> list[str] | None:
    """Four numbers in 0-1 with decimal commas (``0,16, 0,28``), as texts with full stops; None if it is not that."""
    parts = re.split(r";\s*|,\s+|\s+", inner.strip("\"' ,;"))
    if len(parts) == 1:
        digits = parts[0].split(",")
        parts = [f"{digits[i]},{digits[i + 1]}" for i in range(0, 8, 2)] if len(digits) == 8 else []
    if len(parts) != 4 or not all(re.fullmatch(r"[+-]?0,\d+|1,0+|[01]", part) for part in parts):
        return None
    return [part.replace(",", ".") for part in parts]
