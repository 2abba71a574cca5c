"""Localization that also ranks the boxes that miss; use it instead of `localization`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from umed_plugin.grounding.answer_types import asks_for_boxes
from umed_plugin.grounding.boxes import DISTANCE_SHARE, set_iou, shaped_iou_matrix
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import score_answer
from umed_plugin.rewards.contract import register_reward


@register_reward("localization_diou", max_normalised=True, least_maximum=2 * DISTANCE_SHARE, applies_to=asks_for_boxes)
def localization_diou(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    record: Sequence[Mapping[str, Any]],
    geometry: Sequence[ImageGeometry],
    **columns: Any,
) -> list[float | None]:
    """IoU with a share for boxes that come near without overlap (`boxes.shaped_iou_matrix`), in 0..1.

    For a start where most candidates miss, so that IoU is 0 for all of them. Boxes are matched on the same measure. Unmatched
    boxes and studies without abnormality count as in `localization`.

    Among candidates that all miss, division by the maximum would give the best one the 1 of a perfect answer. So the maximum
    counts as at least twice the highest score of a miss: a miss stays below 0.5.
    """
    scores = [score_answer(text, study, in_square) for text, study, in_square in zip(completions, record, geometry)]
    return [set_iou(score.predicted01, score.true01, shaped_iou_matrix) for score in scores]
