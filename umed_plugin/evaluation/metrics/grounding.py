"""Where an answer points: its boxes against the true ones, all in one unit (pixels, or 0-1 of a square).

IoU, matching and set IoU are those of `umed_plugin.grounding.boxes`, which the rewards use too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from umed_plugin.grounding.boxes import Boxes, iou_matrix, is_degenerate, match

if TYPE_CHECKING:
    import numpy as np

# COCO's limits of small, medium and large (areas of 32^2 and 96^2 pixels), taken in the square of 336 pixels that CLIP sees.
SIZES = {"small": 32 / 336, "medium": 96 / 336, "large": math.inf}


def points_at(predicted: Boxes, true: Boxes) -> float:
    """Pointing game (Zhang et al. 2016, arXiv 1608.00507) on boxes: 1.0 if the centre of the first box lies in a true one.

    Departure: the game's point is the maximum of a heat map; here it is the centre of the answer's first box. An answer without
    a box, or whose first box has no area, points nowhere.
    """
    if not predicted or is_degenerate(predicted[0]):
        return 0.0
    x1, y1, x2, y2 = predicted[0]
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return float(any(box[0] <= x < box[2] and box[1] <= y < box[3] for box in true))


def attention_points_at(attention: np.ndarray, covers: float, true01: Boxes) -> float:
    """Pointing game (Zhang et al. 2016) on attention: 1.0 if the centre of the patch with most attention lies in a true box.

    Departure: the game tolerates 15 pixels; here there is no tolerance, but a patch is 14 pixels wide. Raw attention has sinks:
    patches that draw most of it whatever the image shows. A model with a sink in its names' attention scores near 0 here, as the
    demo's does, even if the rest of its attention lies well.

    Args:
        attention: [rows, columns] of patches.
        covers: share of the square's side that the patches cover, from its upper left corner.
        true01: in 0-1 of that square.
    """
    rows, columns = attention.shape
    row, column = divmod(int(attention.argmax()), columns)
    x, y = (column + 0.5) / columns * covers, (row + 0.5) / rows * covers
    return float(any(box[0] <= x < box[2] and box[1] <= y < box[3] for box in true01))


def lesion_overlaps(predicted: Boxes, true: Boxes) -> list[float]:
    """IoU, 0-1, of each true box with the predicted one that it is matched to (Hungarian); 0 for an unmatched one."""
    overlaps = [0.0] * len(true)
    if predicted and true:
        for (_, index), overlap in zip(*match(predicted, true)):
            overlaps[index] = overlap
    return overlaps


def size_class(box01: Sequence[float]) -> str:
    """``small``, ``medium`` or ``large`` by the square root of the area of a box in 0-1 of the square that the model sees."""
    side = math.sqrt(max(box01[2] - box01[0], 0.0) * max(box01[3] - box01[1], 0.0))
    return next(name for name, limit in SIZES.items() if side < limit)


def overlaps_by_size(overlaps: Sequence[float], true01: Boxes) -> Mapping[str, float]:
    """Columns of one study by lesion size: for each size class the number of lesions, their summed IoU, those found at 0.5."""
    values: dict[str, float] = {}
    for overlap, box in zip(overlaps, true01):
        size = size_class(box)
        for name, amount in (("lesions", 1.0), ("lesion_iou", overlap), ("lesions_found", float(overlap >= 0.5))):
            values[f"{name}_{size}"] = values.get(f"{name}_{size}", 0.0) + amount
    return values


def recalled(predicted: Boxes, true: Boxes, threshold: float = 0.5) -> tuple[int, int]:
    """(true boxes that some predicted box overlaps by MORE than the threshold, true boxes): Med-GRIT-270k's Recall@0.5.

    As BiRD and ClinKD count: boxes are not matched one to one, one predicted box may find several true ones, and superfluous
    boxes cost nothing.
    """
    if not true:
        return 0, 0
    if not len(predicted):
        return 0, len(true)
    overlaps = iou_matrix(predicted, true)
    return int((overlaps > threshold).any(axis=0).sum()), len(true)
