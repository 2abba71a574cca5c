"""Boxes written as tokens of a grid: Florence-2, PaliGemma, MAIRA-2 and Kosmos-2. Each reader gives xyxy in 0-1 of its frame."""

from __future__ import annotations

import re
from collections.abc import Sequence

Box = tuple[float, float, float, float]


def bin_kind(token: re.Match[str]) -> str:
    """Which of `BINNED` a token such as ``<loc_160>`` belongs to."""
    name = token[0][1:].rstrip(">").rstrip("0123456789").lower()
    return "axis" if name in ("x", "y") else name


def _locations(bins: Sequence[int]) -> Box:
    """Florence-2: a thousand bins, corners."""
    x1, y1, x2, y2 = ((number + 0.5) / 1000 for number in bins)
    return x1, y1, x2, y2


def _pali(locations: Sequence[int]) -> Box:
    y1, x1, y2, x2 = (location / 1024 for location in locations)
    return x1, y1, x2, y2


def _maira(bins: Sequence[int]) -> Box:
    x1, y1, x2, y2 = ((number + 0.5) / 100 for number in bins)
    return x1, y1, x2, y2


_KOSMOS_CELLS = 32  # on a side


def _kosmos(cells: Sequence[int]) -> Box:
    """From the centre of the first cell to the centre of the last. Cells in one row or column count as whole cells."""
    (top, left), (bottom, right) = (divmod(cell, _KOSMOS_CELLS) for cell in cells)
    whole = top == bottom or left == right
    near, far = (0.0, 1.0) if whole else (0.5, 0.5)
    edges = (left + near, top + near, right + far, bottom + far)
    x1, y1, x2, y2 = (edge / _KOSMOS_CELLS for edge in edges)
    return x1, y1, x2, y2


# Form of a bin -> how many make a box, and how they are read.
BINNED = {"loc_": (4, _locations), "loc": (4, _pali), "axis": (4, _maira), "patch_index_": (2, _kosmos)}
