"""What a text is cut into before `umed_plugin.grounding.box_text` looks for boxes: tokens, and the words that tell of a box."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# Full-width and other forms of the characters that boxes are written with, one for one, so that places in the text stay.
PLAIN = str.maketrans("，、،；．٫％（）［］【】｛｝〔〕⟨⟩〈〉《》：＝＜＞＋－−", ",,,;..%()[][]{}[]()()():=<>+--")

_NUMBER = r"(?:(?<![\d.])[+-])?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]\d{1,3})?"
AXIS = r"[xy]_?(?:min|max|[0-2])"
_NAME = rf"{AXIS}|c[xy]|[xywh]|left|top|right|bottom|width|height"
TOKEN = re.compile(
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
KINDS = ("named", "bin", "tag", "number", "word", "open", "close", "separator", "quote", "other")
# Places of the groups without a name in TOKEN.
GROUP = {
    "name": TOKEN.groupindex["named"] + 1,
    "axis": TOKEN.groupindex["bin"] + 5,
    "slash": TOKEN.groupindex["tag"] + 1,
    "end": TOKEN.groupindex["tag"] + 2,
}
# Text in which nothing can be found has no digit, and no bracket or tag at its end.
WORTH_A_LOOK = re.compile(r"\d|[\[(<{]|box", re.I)
# Numbers in angle brackets, closed or cut off; a single one ("< 5 mm") is a comparison.
ANGLE = re.compile(rf"<(?=\s{{0,3}}{_NUMBER}%?(?:\s{{0,3}}[,;]\s{{0,3}}{_NUMBER}%?){{1,7}}[\s,;.]{{0,3}}(>|$))")
CUT_TAG = re.compile(r"<\|?(?:box\w*|bbox|loc_?\d{0,4}|patch_index_\d{0,4}|[xy]\d{1,4})\|?$", re.I)

# Words before numbers that make them a box, and words that may stand between.
PLACES = {
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
BETWEEN = {"is", "are", "was", "were", "be", "here"}
# Words between the two corners of a box.
JOINS = {"to", "and", "through", "corner", "lower", "upper", "top", "bottom", "left", "right"}
UNITS = {"cm", "mm", "m", "ml", "cc", "mg", "g", "kg", "hu", "suv", "ms", "s", "ng", "pg", "mmhg"}
NAN = {"nan", "inf", "infinity"}
NOT_NUMBERS = {*NAN, "none", "null"}  # the last two may say that there is no box
# Words before three numbers in parentheses that are something else than a box.
_MEASURES = {
    "value",
    "values",
    "ratio",
    "ratios",
    "score",
    "scores",
    "range",
    "p",
    "kappa",
    "index",
    "indices",
    "level",
    "levels",
}
_UNIT = re.compile(rf"\s?(?:{'|'.join(sorted(UNITS, key=len, reverse=True))})\b", re.I)
_SENTENCE_END = re.compile(r"\s*(?:$|[.;!?\n])")
_WORD_BEFORE = re.compile(r"([^\W\d_]+)[\s:,]*$")
NAMES = (
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


def decimal_commas(inner: str) -> list[str] | None:
    """Four numbers in 0-1 with decimal commas (``0,16, 0,28``), as texts with full stops; None if it is not that."""
    parts = re.split(r";\s*|,\s+|\s+", inner.strip("\"' ,;"))
    if len(parts) == 1:
        digits = parts[0].split(",")
        parts = [f"{digits[i]},{digits[i + 1]}" for i in range(0, 8, 2)] if len(digits) == 8 else []
    if len(parts) != 4 or not all(re.fullmatch(r"[+-]?0,\d+|1,0+|[01]", part) for part in parts):
        return None
    return [part.replace(",", ".") for part in parts]


def value_of(number: str) -> float:
    """The value of a number token; of percent the number before the sign."""
    return float(number.rstrip("%").rstrip())


def number_of(named: re.Match[str]) -> str:
    """The number of a named token, such as ``x1=0.5``."""
    return named[0].split(":")[-1].split("=")[-1].strip("\"'` ")


def _in_0_1(number: str) -> bool:
    return "." in number and "%" not in number and 0 <= value_of(number) <= 1


def is_share(number: re.Match[str]) -> bool:
    """Whether a number token is a decimal number in 0-1."""
    return _in_0_1(number[0])


def name_a_box(named: Mapping[str, re.Match[str]], text: str, cut: bool) -> bool:
    """Whether named numbers, of which some are missing, were meant as a box.

    Names such as x1 or ymin tell it. Of x, y, w, left, width and the like it takes three of one box, without units of length.

    Args:
        named: name -> token.
        text: all of it.
        cut: whether they stand in a brace that is never closed.
    """
    if sum(re.fullmatch(AXIS, name) is not None for name in named) >= (1 if cut else 2):
        return True
    most = max((len(set(names) & set(named)) for names, _ in NAMES), default=0)
    if most < (1 if cut else 3) or any(_UNIT.match(text, token.end()) for token in named.values()):
        return False
    if {"x", "y"} <= set(named) or {"cx", "cy"} <= set(named):
        return True
    return all(_in_0_1(number_of(token)) or set("\"'`") & set(token[0]) for token in named.values())


def are_placeholders(words: Sequence[str]) -> bool:
    """Whether words are the names of a box's numbers in place of the numbers, as in ``[x1, y1, x2, y2]``."""
    plain = tuple(word.replace("_", "") for word in words)
    return any(plain == names for names, _ in NAMES)


def three_of_a_box(text: str, tokens: Sequence[re.Match[str]], bracket: int | None = None) -> bool:
    """Whether three numbers are those of a box whose fourth is missing: in 0-1, with two decimals or more.

    Outside of brackets they must end a sentence; in parentheses a word must stand before, and none of a measure.

    Args:
        bracket: where the parenthesis begins; None outside of brackets.
    """
    if len(tokens) != 3 or not all(is_share(token) and len(token[0].partition(".")[2]) >= 2 for token in tokens):
        return False
    if bracket is None:
        return _SENTENCE_END.match(text, tokens[-1].end()) is not None
    before = _WORD_BEFORE.search(text, max(0, bracket - 40), bracket)
    return before is not None and before[1].lower() not in _MEASURES


def is_all(text: str, start: int, end: int) -> bool:
    """Whether the text holds nothing beside what stands from start to end."""
    return not text[:start].strip() if start < 8 and not text[end:].strip(" .\n") else False
