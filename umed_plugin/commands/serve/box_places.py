"""Where the boxes stand in an answer's text, and where something was meant as a box and cannot be read.

The page shows the sentence of a box and the box together. Numbers of which half a box is left, as in ``visible.40.49, 0.38, 0.49,
0.54]``, are marked. Scoring is stricter: it counts only what `umed_plugin.grounding.box_text` calls an attempt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Optional

from umed_plugin.grounding.box_text import scan
from umed_plugin.grounding.boxes import Box, is_inside
from umed_plugin.grounding.geometry import ImageGeometry

_DECIMAL = r"\d{0,3}\.\d+"
# The end of a box whose beginning is missing: decimal numbers, and a bracket that nothing opened.
_HALF = re.compile(rf"(?:{_DECIMAL}){{1,2}}(?:\s*[,;]\s*{_DECIMAL}){{1,3}}\s*[\])]")
_BRACKET = re.compile(r"[\[\](){}]")


class Place(NamedTuple):
    """A part of a text that holds a box, or an attempt at one.

    Attributes:
        start, end: its characters.
        box: index of the box among those of the text; None if it cannot be read.
    """

    start: int
    end: int
    box: Optional[int]


def box_places(text: str) -> list[Place]:
    """The boxes of a text in LLaVA's dialect, and what could not be read as one, in the order of the text."""
    places: list[Place] = []
    boxes = 0
    for written in scan(text):
        if written.is_box():
            places.append(Place(written.start, written.end, boxes))
            boxes += 1
        elif written.is_attempt():
            places.append(Place(written.start, written.end, None))
    for half in _HALF.finditer(text):
        apart = all(half.end() <= place.start or half.start() >= place.end for place in places)
        if apart and not _is_in_brackets(text, half.start()):
            places.append(Place(half.start(), half.end(), None))
    return sorted(places)


def boxes_on_picture(boxes01: Sequence[Box], geometry: ImageGeometry) -> list[Optional[Box]]:
    """The boxes in pixels of the picture, without their parts in the padding.

    Args:
        boxes01: of the model's square.
        geometry: maps between the picture and the square.

    Returns:
        one entry per box; None for one that is malformed, leaves the square, or lies in the padding alone.
    """
    boxes = zip(boxes01, geometry.from_square(boxes01))
    return [_clipped(box, geometry.width, geometry.height) if is_inside(box01) else None for box01, box in boxes]


def _clipped(box: Box, width: int, height: int) -> Optional[Box]:
    x1, y1, x2, y2 = box
    clipped = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    return clipped if is_inside(clipped, width, height) else None


def _is_in_brackets(text: str, position: int) -> bool:
    """Whether the last bracket before a position opens, so that the text there is a remark in brackets."""
    brackets = _BRACKET.findall(text[:position])
    return bool(brackets) and brackets[-1] in "[({"
