"""Figures of phrase grounding: IoU, Dice and accuracy at thresholds, in our arithmetic and in that of PFMVG's authors.

Ours: boxes are areas, in 0-1 of the square that the model sees. Boxes that only touch have an IoU of 0.

Theirs (PFMVG, arXiv 2410.23822; the code is PeFoMed's): coordinates are whole numbers 0-100 of the image squeezed to a square,
cut off after the decimal point. A box from 10 to 20 is 11 pixels wide, so boxes that touch overlap. Their figures are higher for
small boxes and must not be put beside ours.

Departure in both: an answer with several boxes, or a phrase with several, is scored one to one as in
`umed_plugin.grounding.boxes.set_iou`. The authors score one box of one phrase.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from umed_plugin.evaluation.metrics.metric import Metric, Row, means
from umed_plugin.grounding.boxes import Boxes, iou_matrix, is_degenerate, set_iou
from umed_plugin.grounding.scoring import AnswerScore

if TYPE_CHECKING:
    import numpy as np

THRESHOLDS = (0.1, 0.3, 0.5, 0.7)
_STEPS = 100  # of the authors' coordinates
_ROUNDING = 1e-6  # 0.29 * 100 is 28.999999999999996


def dice_matrix(first: Boxes, second: Boxes) -> np.ndarray:
    """[n, m] Dice 2 I / (A + B) of each pair of boxes in one unit, 0-1; it is 2 IoU / (1 + IoU)."""
    overlap: np.ndarray = iou_matrix(first, second)
    return 2 * overlap / (1 + overlap)


def integer_iou_matrix(first: Boxes, second: Boxes) -> np.ndarray:
    """[n, m] IoU of boxes of whole numbers, each of which is a pixel that belongs to the box.

    A box without area is one that could not be read, and overlaps nothing.

    Example:
        >>> integer_iou_matrix([(10, 10, 20, 20)], [(20, 10, 30, 20)]).round(4).tolist()  # 11 / 231
        [[0.0476]]
    """
    import numpy as np

    a, b = (np.asarray(boxes, dtype=float).reshape(-1, 4) for boxes in (first, second))
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low + 1, 0, None).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2] + 1).prod(axis=1) for boxes in (a, b)]
    overlap = shared / (areas[0][:, None] + areas[1][None, :] - shared)
    readable = (a[:, 2:] > a[:, :2]).all(axis=1)
    return np.where(readable[:, None], overlap, 0.0)


def integer_dice_matrix(first: Boxes, second: Boxes) -> np.ndarray:
    """[n, m] Dice of the same boxes: 2 IoU / (1 + IoU)."""
    overlap = integer_iou_matrix(first, second)
    return 2 * overlap / (1 + overlap)


def whole_numbers(boxes_px: Boxes, size: Sequence[int]) -> list[tuple[float, float, float, float]]:
    """Boxes in pixels of an image as the authors write them: 0-100 of each side, cut off after the decimal point.

    Args:
        boxes_px: xyxy.
        size: width and height of the image, in pixels.

    Example:
        >>> whole_numbers([(58, 10, 116, 99)], (200, 100))
        [(29.0, 10.0, 58.0, 99.0)]
    """
    sides = (size[0], size[1], size[0], size[1])
    found = []
    for box in boxes_px:
        numbers = [float(int(value / side * _STEPS + _ROUNDING)) for value, side in zip(box, sides)]
        a, b, c, d = (min(max(value, 0.0), float(_STEPS)) for value in numbers)
        found.append((a, b, c, d))
    return found


def phrase_values(score: AnswerScore, true_px: Boxes, size: Sequence[int]) -> dict[str, float]:
    """The columns of one phrase.

    Args:
        score: of the answer.
        true_px: true boxes in pixels of the image.
        size: width and height of the image, in pixels.
    """
    ours = score.set_iou
    readable = [box for box, seen in zip(score.boxes, score.predicted01) if not is_degenerate(seen)]
    unread = [(0.0, 0.0, 0.0, 0.0)] * (len(score.boxes) - len(readable))
    said, true = [*whole_numbers(readable, size), *unread], whole_numbers(true_px, size)
    theirs = set_iou(said, true, integer_iou_matrix)
    values = {
        "mean_iou": ours,
        "mean_dice": set_iou(score.predicted01, score.true01, dice_matrix),
        "integer_iou": theirs,
        "integer_dice": set_iou(said, true, integer_dice_matrix),
        "without_box": float(len(score.boxes) == score.unread),
    }
    for threshold in THRESHOLDS:
        percent = round(100 * threshold)
        values[f"acc_at_{percent}"] = float(ours >= threshold)
        values[f"integer_acc_at_{percent}"] = float(theirs >= threshold)
    return values


def phrase_metrics(rows: Sequence[Row]) -> list[Metric]:
    """The metrics of `phrase_values` that a diagnosis does not have; none where no row is a phrase.

    ``without_box`` is the share of answers without a box that can be read; its n is the number of phrases.
    """
    from dataclasses import replace

    if not any("without_box" in row.values for row in rows):
        return []
    names = ["mean_dice", *(f"acc_at_{round(100 * threshold)}" for threshold in THRESHOLDS if threshold != 0.5)]
    names += ["integer_iou", "integer_dice", *(f"integer_acc_at_{round(100 * threshold)}" for threshold in THRESHOLDS)]
    (without,) = means("without_box")
    return [*means(*names), replace(without, lower_is_better=True)]
