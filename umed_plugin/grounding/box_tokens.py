"""What a text is cut into before `umed_plugin.grounding.box_text` looks for boxes: tokens, and the words that tell of a box."""

from __future__ import annotations

import re

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
NOT_NUMBERS = {"nan", "inf", "infinity", "none", "null"}
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
