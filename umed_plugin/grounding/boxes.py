"""Boxes as numbers and as text: overlap, one-to-one matching, writing and parsing.

A box is ``(x1, y1, x2, y2)`` in floats, half-open, x to the right and y down. ``box01`` is a box in 0-1 of the square that the
model sees. Boxes in text have this unit: ``[0.61, 0.36, 0.92, 0.83]`` (LLaVA-1.5's dialect). Parsing is lenient about form, and
scoring is strict: a box that is degenerate or leaves the square stays in the list, overlaps nothing, and so counts against the
answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from umed_plugin.grounding.box_bins import Box as Box  # named here by all others
from umed_plugin.grounding.box_text import scan
from umed_plugin.grounding.written_box import WrittenBox

if TYPE_CHECKING:
    import numpy as np

Boxes = Sequence[Sequence[float]]
Measure = Callable[[Boxes, Boxes], "np.ndarray"]

# Weight of the distance term in `shaped_iou_matrix`. Two boxes that do not overlap score below it.
DISTANCE_SHARE = 0.25


def is_degenerate(box: Sequence[float]) -> bool:
    """True if the box has no area, or a coordinate that is not a finite number."""
    return not all(math.isfinite(value) for value in box) or box[2] <= box[0] or box[3] <= box[1]


def is_inside(box: Sequence[float], width: float = 1.0, height: float = 1.0) -> bool:
    """True if a box with area lies in ``[0, width] x [0, height]`` (default: the unit square of box01)."""
    return not is_degenerate(box) and box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height


def iou_matrix(a: Boxes, b: Boxes) -> np.ndarray:
    """Intersection over union of every box of ``a`` with every box of ``b``, both in the same unit.

    Returns:
        float64 ``[len(a), len(b)]`` in 0-1; the row or column of a degenerate box is 0.
    """
    return _of_proper_boxes(_iou, a, b)


def shaped_iou_matrix(a: Boxes, b: Boxes) -> np.ndarray:
    """IoU plus a term that grows as boxes approach each other, so that boxes without overlap are ranked too.

    With the distance term of DIoU (arXiv 1911.08287, eq. 6-7), where rho is the distance of the centres, c the diagonal of the
    smallest box around both, A the areas, and w = `DISTANCE_SHARE`:

        (1 - w) * IoU + w * min(A_a, A_b) / max(A_a, A_b) * (1 - rho^2 / c^2)

    Departure from DIoU: its usual ``(1 + DIoU) / 2`` gives a box over the whole image 0.375 or more wherever the lesion lies,
    since its centre is never far. The ratio of the areas removes this reward. IoU is at most that ratio, and equal to it if one
    box contains the other. So a box around a lesion never scores above its IoU, and hedging gains no more than with IoU alone.
    Concentric boxes of which one contains the other score their IoU; equal boxes score 1.

    Returns:
        float64 ``[len(a), len(b)]`` in 0-1, below w without overlap; the row or column of a degenerate box is 0.
    """
    return _of_proper_boxes(_shaped_iou, a, b)


def _iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    import numpy as np

    shared = np.minimum(first[:, None, 2:], second[:, 2:]) - np.maximum(first[:, None, :2], second[:, :2])
    intersection = shared.clip(min=0).prod(axis=-1)
    return intersection / (_area(first)[:, None] + _area(second) - intersection)


def _shaped_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    import numpy as np

    around = np.maximum(first[:, None, 2:], second[:, 2:]) - np.minimum(first[:, None, :2], second[:, :2])
    apart = (first[:, None, :2] + first[:, None, 2:] - second[:, :2] - second[:, 2:]) / 2
    nearness = 1 - (apart**2).sum(axis=-1) / (around**2).sum(axis=-1)
    first_areas, second_areas = _area(first)[:, None], _area(second)
    area_ratio = np.minimum(first_areas, second_areas) / np.maximum(first_areas, second_areas)
    return (1 - DISTANCE_SHARE) * _iou(first, second) + DISTANCE_SHARE * area_ratio * nearness


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).prod(axis=-1)


def _of_proper_boxes(measure: Callable[[np.ndarray, np.ndarray], np.ndarray], a: Boxes, b: Boxes) -> np.ndarray:
    """``measure`` of the boxes that have an area, as float64 arrays [N, 4] and [M, 4]; 0 for the others."""
    import numpy as np

    result = np.zeros((len(a), len(b)))
    rows = [i for i, box in enumerate(a) if not is_degenerate(box)]
    columns = [j for j, box in enumerate(b) if not is_degenerate(box)]
    if rows and columns:
        first = np.array([list(a[i]) for i in rows], dtype=float)
        second = np.array([list(b[j]) for j in columns], dtype=float)
        result[np.ix_(rows, columns)] = measure(first, second)
    return result


def match(predicted: Boxes, true: Boxes, measure: Measure = iou_matrix) -> tuple[list[tuple[int, int]], list[float]]:
    """Match boxes one to one so that the sum of their ``measure`` (default: IoU) is maximal (Hungarian method).

    Returns:
        ``pairs`` (index in predicted, index in true) whose value is above 0, in order of the first index, and these values.
    """
    from scipy.optimize import linear_sum_assignment

    overlap = measure(predicted, true)
    chosen = zip(*linear_sum_assignment(overlap, maximize=True))
    pairs = [(int(i), int(j)) for i, j in chosen if overlap[i, j] > 0]
    return pairs, [float(overlap[i, j]) for i, j in pairs]


def set_iou(predicted: Boxes, true: Boxes, measure: Measure = iou_matrix) -> float:
    """Sum of matched IoU over ``max(len(predicted), len(true))``, in 0-1. Every unmatched box on either side lowers the score.

    If both are empty (a negative image without a box) the score is 1.0; if one is empty it is 0.0.

    Args:
        predicted, true: boxes in the same unit.
        measure: pairwise measure in 0-1 that replaces the IoU, in the matching too.

    Example:
        >>> from umed_plugin import set_iou
        >>> set_iou([(0.0, 0.0, 0.5, 0.5)], [(0.0, 0.0, 0.5, 1.0)])
        0.5
        >>> set_iou([(0.0, 0.0, 0.5, 0.5)], [(0.0, 0.0, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9)])
        0.5
        >>> set_iou([], [])
        1.0
    """
    if not predicted and not true:
        return 1.0
    if not predicted or not true:
        return 0.0
    return sum(match(predicted, true, measure)[1]) / max(len(predicted), len(true))


def copies(boxes: Boxes, same: float = 0.9) -> list[int]:
    """For each box the number of boxes before it that are the same one: with an IoU above ``same``, 0-1.

    Example:
        >>> copies([(0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0), (0.0, 0.0, 0.5, 0.5)])
        [0, 0, 1]
    """
    if len(boxes) < 2:
        return [0] * len(boxes)
    overlap = iou_matrix(boxes, boxes) > same
    return [int(overlap[index, :index].sum()) for index in range(len(boxes))]


def round_box(box01: Sequence[float], decimals: int = 2) -> Box:
    """The box rounded to ``decimals`` and clipped to 0-1. Two edges that would coincide are set one step apart.

    Raises:
        ValueError: the box has no area.
    """
    if is_degenerate(box01):
        raise ValueError(f"box {tuple(box01)} has no area and cannot be written")
    scale = 10**decimals
    edges = [round(min(max(value, 0.0), 1.0) * scale) for value in box01]
    for low, high in ((0, 2), (1, 3)):
        if edges[low] == edges[high]:
            edges[low] = min(math.floor(min(max(box01[low], 0.0), 1.0) * scale), scale - 1)
            edges[high] = edges[low] + 1
    return (edges[0] / scale, edges[1] / scale, edges[2] / scale, edges[3] / scale)


def format_box(box01: Sequence[float], decimals: int = 2) -> str:
    """Write a box as LLaVA-1.5 does: ``[0.61, 0.36, 0.92, 0.83]``.

    Args:
        box01: xyxy in 0-1 of the square that the model sees.
        decimals: of each number.

    Raises:
        ValueError: the box has no area.

    Example:
        >>> from umed_plugin import format_box
        >>> format_box((0.614, 0.36, 0.92, 0.8349))
        '[0.61, 0.36, 0.92, 0.83]'
    """
    return "[" + ", ".join(f"{value:.{decimals}f}" for value in round_box(box01, decimals)) + "]"


def best_iou_for_decimals(box01: Sequence[float], decimals: int) -> float:
    """The best IoU, in 0-1, that an answer with this many decimals can reach: the box against itself rounded."""
    return float(iou_matrix([box01], [round_box(box01, decimals)])[0, 0])


def parse_boxes(text: str) -> list[Box]:
    """Read every box in ``text``, in order of appearance, as box01. Never raises, whatever the text.

    Supported forms: ``[a, b, c, d]`` (also nested), ``(a, b, c, d)``, ``<box>..</box>`` around either, Qwen-VL's
    ``(x1,y1),(x2,y2)``, percent, decimal commas, full-width characters, names (``x1=..``, ``"xmin": ..``, ``"x": .., "w": ..``),
    MAIRA-2's bins ``<x55><y45><x70><y56>`` (bin n is ``(n + 0.5) / 100``), Kosmos-2's cells
    ``<patch_index_0044><patch_index_0863>``, Florence-2's ``<loc_160>`` (thousandths) and PaliGemma's ``<loc0123>``. Four whole
    numbers of which one is above 1 are read as 0-1000; without a word such as "at" or "bbox" before them, only if one is 100 or
    more, so that "see (1, 2, 3, 4)" is no box. Values are neither clipped nor reordered: a box outside 0-1 is a mistake of the
    answer, which `is_inside` detects. For numbers in another order or unit, see `umed_plugin.grounding.dialects`. What was meant
    as a box and cannot be read is not here: `umed_plugin.grounding.box_text` finds it, and scoring counts it.

    Example:
        >>> from umed_plugin import parse_boxes
        >>> parse_boxes("A nodule at [0.61, 0.36, 0.92, 0.83].")
        [(0.61, 0.36, 0.92, 0.83)]
        >>> parse_boxes("<box>(610,360),(920,830)</box>")
        [(0.61, 0.36, 0.92, 0.83)]
    """
    return [box for _, box in find_boxes(text)]


def find_boxes(text: str) -> list[tuple[int, Box]]:
    """The boxes that :func:`parse_boxes` reads, each with the index of its first character."""
    return [(written.start, _in_01(written)) for written in scan(text) if written.is_box()]


def _in_01(written: WrittenBox) -> Box:
    a, b, c, d = written.corners()
    if written.kind == "whole" and max(a, b, c, d) > 1:
        return a / 1000, b / 1000, c / 1000, d / 1000
    return a, b, c, d


def rewrite_boxes(text: str, write: Callable[[Box], str]) -> str:
    """``text`` with every box that :func:`parse_boxes` reads replaced by ``write(box01)``."""
    return _replaced(text, [(written, write(_in_01(written))) for written in scan(text) if written.is_box()])


def blot_boxes(text: str, mark: str = "[box]") -> str:
    """``text`` with ``mark`` in place of every box that :func:`parse_boxes` reads, and of every attempt at one."""
    return _replaced(text, [(found, mark) for found in scan(text) if found.is_box() or found.is_attempt()])


def _replaced(text: str, parts: Sequence[tuple[WrittenBox, str]]) -> str:
    pieces, done = [], 0
    for found, new in parts:
        if found.start >= done:
            pieces += [text[done : found.start], new]
            done = found.end
    return "".join([*pieces, text[done:]])
