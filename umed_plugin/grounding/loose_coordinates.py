"""Coordinates in a text that are in no box: "centre (0.36, 0.33)", ``<bin_25><bin_22>``, "bbox: 0.25 0.22 0.47 0.44".

Whoever moves the image can move the boxes of `umed_plugin.grounding.boxes`, and not these. Sizes, ratios and the like are numbers
too, and no coordinates: a unit stands behind them, or a word of measure or a comparison before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from umed_plugin.grounding.box_text import scan
from umed_plugin.grounding.box_tokens import PLAIN, UNITS
from umed_plugin.grounding.boxes import is_degenerate, rewrite_boxes
from umed_plugin.grounding.written_box import WrittenBox

_NUMBER = r"\d+(?:\.\d+)?"
_EDGE = r"(?:left|right|top|bottom|upper|lower|edge|border|side)"
_PLACE = (
    r"\b(?:cent(?:re|er)(?:ed)?|midpoint|(?<!time\s)(?<!\d\s)points?|pixels?|position|coordinates?|coords?|locat(?:ion|ed)|corner"
    r"|b(?:ounding\s*)?box(?:es)?|at)\b"
)
_OF_PLACE = r"(?:[\s:=,]|\b(?:is|was|lies|of|about|around|approximately|near|pixels?|its)\b){0,12}"
# What is a coordinate by its form alone, whatever the number.
_BY_FORM = re.compile(
    # Tokens of a grid: <bin_25>, <loc0256>, <25><22>. <image1> is a picture.
    r"<(?!\s*(?:image|img|frame|slice))\s*[a-z_]{1,20}[ _-]?\d+(?:\.\d+)?\s*>|<\s*\d+\s*>\s*<\s*\d+\s*>"
    rf"|{_PLACE}{_OF_PLACE}[\[(]\s*{_NUMBER}\s*[,;]\s*{_NUMBER}\s*[\])]"
    rf"|[\[(]\s*{_NUMBER}\s*%\s*[,;]\s*{_NUMBER}\s*%\s*[\])]"
    rf"|\d\s*(?:%|per\s?cent|px|pixels?)\s+(?:from|across|along|down)\s+(?:the\s+)?(?:(?:image|picture|frame)(?:'s)?\s+)?{_EDGE}"
    rf"|\d\s*(?:%|per\s?cent)\s+of\s+the\s+(?:(?:image|picture|frame)(?:'s)?\s+)?(?:width|height)"
    rf"|\bc?[xy]\s*[:=]\s*{_NUMBER}[^.\n]{{0,12}}\bc?[xy]\s*[:=]\s*{_NUMBER}",
    re.I,
)
# How coordinates are to be written is no coordinate: "between 0.0 and 1.0", "[0, 1]", "(0, 0) is the top left corner".
_FORM = re.compile(
    r"[\[(]?\s*(?<![\d.,])0(?:\.0+)?\s*(?:[-\u2013,;]|to|and|through|bis|und)\s*1(?:\.0+)?(?![\d.,]*\d)\s*[\])]?"
    r"|[\[(]\s*([01])(?:\.0+)?\s*[,;]\s*\1(?:\.0+)?\s*[\])]",
    re.I,
)
# Numbers in 0-1 with a decimal point or comma; no part of a date, a version, a list of digits or a thousand.
_SHARE = r"(?<![\w.,])(?<!\s-)(?:0?\.\d+|0,\d+|1\.0+|1,00?)(?![.,]?\d)"
_JOIN = r"\s*(?:[-/,;x*\u00d7\u2013\u00b1]|and|to|or|by|und|bis|et|y|e)\s*"
# Joined ones share their unit: "0.5 x 1.2 cm".
_CHAIN = re.compile(rf"{_SHARE}(?:{_JOIN}{_SHARE})*(?:{_JOIN}{_NUMBER})?", re.I)
_TIGHT = re.compile(r"(?<=\d),(?=[01]?\.\d)")  # "0.36,0.33"
_MORE_UNITS = (
    r"\u00b5m|um|nm|inch(?:es)?|(?:milli|centi)met(?:re|er)s?|m?l|dl|m?gy|t|tesla|sec(?:onds)?|min(?:utes)?|hours|days|weeks|months|years"
    r"|per\s?cent|points?|fold|times|sd|m?mol|iu|mci|mbq|pack|kpa|m?hz"
)
_UNIT = re.compile(
    rf"\s*[)\]]?[\s-]*(?:[%\u2030\u00b0]|(?:{'|'.join(sorted(UNITS))}|{_MORE_UNITS})(?:[\u00b2\u00b3]|\b|\d))", re.I
)
_MEASURE = re.compile(
    r"(?:[<>\u2264\u2265\u00b1~\u2248]\s*|\b(?:p|r|kappa|ratios?|scores?|probabilit(?:y|ies)|confidence|likelihood|dice|iou|auc|index|indices"
    r"|values?|suv(?:max|mean|peak)?|adc|threshold|levels?|dose|density|fraction|factor|coefficient|ph|inr|tsh|psa|creatinine|lactate|crp"
    r"|rate|range|mean|median|average|difference|deviation|weights?|sensitivity|specificity|accuracy|diameters?|thickness|length"
    r"|size[sd]?|volumes?|ci|hr|measur(?:es?|ed|ing|ements?))\b[\s:=(]*"
    r"(?:(?:of|is|was|are|were|max|mean|about|around|approximately|approx\.?|up\s+to|nearly|only|equals?|between|from|over|under)[\s:=(]*"
    r"){0,3})$",
    re.I,
)
_BEFORE = 60  # characters before a number in which a word of measure is looked for
# Bare numbers in 0-1 are more often ratios, indices and lengths. A word beside them, or their number, makes them coordinates.
_CUE_BEFORE = re.compile(rf"{_PLACE}{_OF_PLACE}[\[(]?(?:{_SHARE}\s+)?$", re.I)
_CUE_BEHIND = re.compile(
    rf"\s*(?:across|down\b|from\s+the\s+{_EDGE}|in\s+[xy]\b|of\s+the\s+(?:image'?s?\s+)?(?:width|height))", re.I
)
_IN_BRACKETS = re.compile(rf"[\[(]\s*{_SHARE}(?:\s*[,;]\s*|\s+){_SHARE}\s*[\])]")
_FOUR = re.compile(rf"{_SHARE}(?:(?:{_JOIN}|\s+){_SHARE}){{3}}", re.I)


def has_loose_coordinates(texts: Iterable[str]) -> bool:
    """Whether texts of one conversation have coordinates beside the boxes that `parse_boxes` reads.

    One is enough whose form tells it: a token of a grid, an attempt at a box, a pair in brackets after "centre" or "at". So are
    two numbers in 0-1 in brackets, and four in a row. Other numbers in 0-1 need a word of place beside them, such as "across",
    and it takes two.

    Example:
        >>> from umed_plugin.grounding.loose_coordinates import has_loose_coordinates
        >>> has_loose_coordinates(["A cyst at [0.25, 0.22, 0.47, 0.44], of 0.5 x 0.7 cm."])
        False
        >>> has_loose_coordinates(["A cyst, 0.36 across and 0.33 down."])
        True
    """
    numbers = 0
    for text in texts:
        rest = rewrite_boxes(text, lambda _: " [] ").translate(PLAIN)
        rest = _FORM.sub(" ", _TIGHT.sub(", ", rest))
        if _BY_FORM.search(rest) or any(_stays(text, found) for found in scan(text)):
            return True
        if any(_is_no_measure(rest, found) for form in (_IN_BRACKETS, _FOUR) for found in form.finditer(rest)):
            return True
        numbers += sum(_count(rest, chain) for chain in _CHAIN.finditer(rest))
    return numbers >= 2


def _stays(text: str, found: WrittenBox) -> bool:
    """Whether what `scan` found was meant as a place, and is no box: an attempt, or percent such as [25, 22, 47, 44]."""
    if found.is_box():
        return False
    written = text[found.start : found.end]
    if found.is_attempt():
        return re.search(r"(?<![^\W\d])\d", written) is not None  # [x1, y1, x2, y2] says how to write one
    return written.startswith("[") and found.is_box("100") and not is_degenerate(found.corners())


def _count(text: str, chain: re.Match[str]) -> int:
    """How many numbers of a chain such as "0.36 and 0.33" are coordinates by the words beside it."""
    before = text[max(0, chain.start() - _BEFORE) : chain.start()]
    cued = _CUE_BEFORE.search(before) or _CUE_BEHIND.match(text, chain.end())
    return len(re.findall(_SHARE, chain[0])) if cued and _is_no_measure(text, chain) else 0


def _is_no_measure(text: str, found: re.Match[str]) -> bool:
    """Whether neither a unit stands behind the numbers nor a word of measure before them."""
    measured = _UNIT.match(text, found.end()) or _MEASURE.search(text, max(0, found.start() - _BEFORE), found.start())
    return measured is None
