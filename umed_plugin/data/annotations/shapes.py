"""Boxes around the shapes that annotation tools write: polygons, turned rectangles, ellipses, and regions of masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from umed_plugin.grounding.boxes import Box

Point = tuple[float, float]
_MOST = 1e9  # of a coordinate, in pixels or percent; the area of a box must stay a number


def number(value: Any) -> Optional[float]:
    """A number that can be a coordinate, from a number or a text of one; None for anything else, such as NaN or 1e300."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if abs(found) < _MOST else None


def numbers(values: Sequence[Any]) -> Optional[list[float]]:
    """All values as finite numbers; None if one is none."""
    found = [number(value) for value in values]
    return [value for value in found if value is not None] if None not in found else None


def points_of(values: Any) -> Optional[list[Point]]:
    """A list of pairs of numbers as points; None for anything else, and for an empty list."""
    if not isinstance(values, list) or not values:
        return None
    pairs = [numbers(pair) if isinstance(pair, (list, tuple)) and len(pair) == 2 else None for pair in values]
    return [(pair[0], pair[1]) for pair in pairs if pair is not None] if None not in pairs else None


def extent(points: Sequence[Point]) -> Box:
    """The smallest box around points."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return min(xs), min(ys), max(xs), max(ys)


def turned_rectangle(box: Box, degrees: float, about: Point) -> Box:
    """The smallest box around a rectangle that is turned clockwise, as seen on the screen, about a point. In pixels."""
    x1, y1, x2, y2 = box
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    if degrees % 90 == 0:  # exact, so that a box that is only laid on its side keeps whole pixels
        sine, cosine = float(round(sine)), float(round(cosine))
    a, b = about
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    return extent([(a + (x - a) * cosine - (y - b) * sine, b + (x - a) * sine + (y - b) * cosine) for x, y in corners])


def turned_about_centre(box: Box, degrees: float) -> Box:
    """The smallest box around a rectangle that is turned about its centre, as CVAT states its ``rotation``. In pixels."""
    return turned_rectangle(box, degrees, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))


def ellipse(centre: Point, radii: Point, degrees: float = 0.0) -> Box:
    """The smallest box around an ellipse that is turned about its centre. In pixels."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    width = math.hypot(radii[0] * cosine, radii[1] * sine)
    height = math.hypot(radii[0] * sine, radii[1] * cosine)
    return centre[0] - width, centre[1] - height, centre[0] + width, centre[1] + height


def regions(layer: np.ndarray) -> list[tuple[Box, int]]:
    """Box and number of pixels of every connected region (8 neighbours) of a layer ``[row, column]`` of true and false."""
    from scipy.ndimage import find_objects, label

    numbered, _ = label(layer, structure=np.ones((3, 3)))
    found: list[tuple[Box, int]] = []
    for index, part in enumerate(find_objects(numbered), start=1):
        rows, columns = part
        box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
        found.append((box, int((numbered[part] == index).sum())))
    return found
