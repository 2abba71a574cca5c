"""Boxes as numbers and as text: overlap, one-to-one matching, writing and parsing.

One form inside: ``(x1, y1, x2, y2)`` floats, half-open, x to the right and y down. ``box01`` is such a box in 0-1 of the
square that the model sees, the unit in which boxes stand in text: ``[0.61, 0.36, 0.92, 0.83]`` (LLaVA-1.5's dialect).
Parsing is lenient about form, scoring is strict: a box that is degenerate or leaves the square stays in the list, overlaps
nothing, and so counts against the answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Box = tuple[float, float, float, float]
Boxes = Sequence[Sequence[float]]
Measure = Callable[[Boxes, Boxes], "np.ndarray"]

# Part of `shaped_iou_matrix` that does not ask for overlap: two boxes that do not overlap score below it.
DISTANCE_SHARE = 0.25


def is_degenerate(box: Sequence[float]) -> bool:
    """True when the box has no area or a coordinate that is not a finite number."""
    return not all(math.isfinite(value) for value in box) or box[2] <= box[0] or box[3] <= box[1]


def is_inside(box: Sequence[float], width: float = 1.0, height: float = 1.0) -> bool:
    """True when a box with area lies in ``[0, width] x [0, height]`` (default: the unit square of box01)."""
    return not is_degenerate(box) and box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height


def iou_matrix(a: Boxes, b: Boxes) -> np.ndarray:
    """Intersection over union of every box of ``a`` with every box of ``b``, both in the same unit.

    Returns:
        float64 ``[len(a), len(b)]`` in 0-1; the row or column of a degenerate box is 0.
    """
    return _of_proper_boxes(_iou, a, b)


def shaped_iou_matrix(a: Boxes, b: Boxes) -> np.ndarray:
    """IoU with a share that grows as boxes draw near, so that boxes that do not overlap are told apart too.

    With the distance term of DIoU (arXiv 1911.08287, eq. 6-7), where rho is the distance of the centres, c the diagonal of the
    smallest box around both, A the areas, and w = `DISTANCE_SHARE`:

        (1 - w) * IoU + w * min(A_a, A_b) / max(A_a, A_b) * (1 - rho^2 / c^2)

    Departure from DIoU, whose usual ``(1 + DIoU) / 2`` gives a box over the whole image 0.375 or more wherever the lesion lies,
    as its centre is never far: the ratio of the areas takes that away. As IoU is at most that ratio, and equal to it when one
    box holds the other, a box around a lesion never scores above its IoU: hedging gains no more than with IoU alone. Concentric
    boxes of which one holds the other score their IoU, equal boxes 1.

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
    one, other = _area(first)[:, None], _area(second)
    alike = np.minimum(one, other) / np.maximum(one, other)
    return (1 - DISTANCE_SHARE) * _iou(first, second) + DISTANCE_SHARE * alike * nearness


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).prod(axis=-1)


def _of_proper_boxes(measure: Callable[[np.ndarray, np.ndarray], np.ndarray], a: Boxes, b: Boxes) -> np.ndarray:
    """``measure`` of float64 arrays [N, 4] and [M, 4] for the boxes that have an area, 0 for the others."""
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
    """Pair boxes one to one so that the sum of their ``measure`` (by default IoU) is largest (Hungarian method).

    Returns:
        ``pairs`` of (index in predicted, index in true) whose value is above 0, in order of the first, and these values.
    """
    from scipy.optimize import linear_sum_assignment

    overlap = measure(predicted, true)
    chosen = zip(*linear_sum_assignment(overlap, maximize=True))
    pairs = [(int(i), int(j)) for i, j in chosen if overlap[i, j] > 0]
    return pairs, [float(overlap[i, j]) for i, j in pairs]


def set_iou(predicted: Boxes, true: Boxes, measure: Measure = iou_matrix) -> float:
    """Sum of matched IoU over ``max(len(predicted), len(true))``, in 0-1: every unmatched box on either side counts against.

    Another ``measure`` in 0-1 of pairs takes the IoU's place, in the matching too.

    Both empty is 1.0 (a negative image without a box), one empty is 0.0.

    Example:
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


def round_box(box01: Sequence[float], decimals: int = 2) -> Box:
    """The box on the grid that ``decimals`` allow, within 0-1; an edge pair that would fall together is set one step apart."""
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
        >>> format_box((0.614, 0.36, 0.92, 0.8349))
        '[0.61, 0.36, 0.92, 0.83]'
    """
    return "[" + ", ".join(f"{value:.{decimals}f}" for value in round_box(box01, decimals)) + "]"


def best_iou_for_decimals(box01: Sequence[float], decimals: int) -> float:
    """The best IoU that an answer with this many decimals can reach: the box against its rounded self."""
    return float(iou_matrix([box01], [round_box(box01, decimals)])[0, 0])


_NUMBER = r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*"
_FOUR = r"[,;\s]".join([_NUMBER] * 4)
_CORNERS = rf"\({_NUMBER},{_NUMBER}\)\s*,?\s*\({_NUMBER},{_NUMBER}\)"
_BINS = r"<x(\d+)>\s*<y(\d+)>\s*<x(\d+)>\s*<y(\d+)>"
_CELLS = r"<patch_index_(\d+)>\s*<patch_index_(\d+)>"
_PLACES = r"\s*".join([r"<loc(\d{4})>"] * 4)
_BOX_TEXT = re.compile(
    rf"\[{_FOUR}\]|\({_FOUR}\)|<box>{_FOUR}</box>|{_CORNERS}|(?P<maira>{_BINS})|(?P<kosmos>{_CELLS})|(?P<pali>{_PLACES})"
)
_KOSMOS_CELLS = 32  # on a side


def parse_boxes(text: str) -> list[Box]:
    """Read every box in ``text``, in order of appearance, as box01; never raises, whatever the text.

    Understood: ``[a, b, c, d]``, also nested, ``(a, b, c, d)``, ``<box>..</box>`` around any of them, Qwen-VL's
    ``(x1,y1),(x2,y2)``, MAIRA-2's bins ``<x55><y45><x70><y56>`` (bin n is ``(n + 0.5) / 100``), Kosmos-2's cells
    ``<patch_index_0044><patch_index_0863>`` and PaliGemma's places ``<loc0123>``. Four whole numbers of which one is above 1
    are read as 0-1000. Values are not clipped or reordered: a box outside 0-1 is the answer's fault, and `is_inside` tells.
    Numbers in another order or unit: `umed_plugin.grounding.dialects`.

    Example:
        >>> parse_boxes("A nodule at [0.61, 0.36, 0.92, 0.83].")
        [(0.61, 0.36, 0.92, 0.83)]
        >>> parse_boxes("<box>(610,360),(920,830)</box>")
        [(0.61, 0.36, 0.92, 0.83)]
    """
    return [box for _, box in find_boxes(text)]


def find_boxes(text: str) -> list[tuple[int, Box]]:
    """The boxes that :func:`parse_boxes` reads, each with the place at which it begins."""
    return [(found.start(), _read(found)) for found in _BOX_TEXT.finditer(text)]


def written_boxes(text: str) -> list[tuple[Box, str]]:
    """The boxes of a text as written: their four numbers with ``whole`` or ``decimal``, or box01 with ``bins``."""
    return [_written(found) for found in _BOX_TEXT.finditer(text)]


def _read(found: re.Match[str]) -> Box:
    box, kind = _written(found)
    if kind == "whole" and max(box) > 1:
        return box[0] / 1000, box[1] / 1000, box[2] / 1000, box[3] / 1000
    return box


def _written(found: re.Match[str]) -> tuple[Box, str]:
    written = [group for group in found.groups() if group is not None]
    if found.lastgroup is not None:
        return _BINNED[found.lastgroup]([int(number) for number in written[1:]]), "bins"
    a, b, c, d = (float(number) for number in written)
    return (a, b, c, d), "decimal" if "." in "".join(written) else "whole"


def _maira(bins: Sequence[int]) -> Box:
    x1, y1, x2, y2 = ((number + 0.5) / 100 for number in bins)
    return x1, y1, x2, y2


def _kosmos(cells: Sequence[int]) -> Box:
    """From the middle of the first cell to that of the last; cells in one row or column are taken whole."""
    (top, left), (bottom, right) = (divmod(cell, _KOSMOS_CELLS) for cell in cells)
    whole = top == bottom or left == right
    near, far = (0.0, 1.0) if whole else (0.5, 0.5)
    edges = (left + near, top + near, right + far, bottom + far)
    x1, y1, x2, y2 = (edge / _KOSMOS_CELLS for edge in edges)
    return x1, y1, x2, y2


def _pali(places: Sequence[int]) -> Box:
    y1, x1, y2, x2 = (place / 1024 for place in places)
    return x1, y1, x2, y2


_BINNED = {"maira": _maira, "kosmos": _kosmos, "pali": _pali}


def rewrite_boxes(text: str, write: Callable[[Box], str]) -> str:
    """``text`` with every box that :func:`parse_boxes` reads replaced by what ``write`` makes of it."""
    return _BOX_TEXT.sub(lambda found: write(_read(found)), text)


def blot_boxes(text: str, mark: str = "[box]") -> str:
    """``text`` with ``mark`` in place of every box that :func:`parse_boxes` reads."""
    return _BOX_TEXT.sub(mark, text)
