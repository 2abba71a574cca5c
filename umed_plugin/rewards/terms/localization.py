"""Abnormal Localization Reward (ALR) of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from umed_plugin.grounding.answer_types import asks_for_boxes
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import score_answer
from umed_plugin.rewards.contract import register_reward


@register_reward("localization", max_normalised=True, applies_to=asks_for_boxes)
def localization(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    record: Sequence[Mapping[str, Any]],
    geometry: Sequence[ImageGeometry],
    **columns: Any,
) -> list[float | None]:
    """IoU of predicted and true boxes, in 0..1.

    Several lesions are matched one to one (Hungarian), and unmatched boxes lower the score. A study without abnormality scores 1
    for no box and 0 otherwise. A report has ``None``: nobody knows where its findings lie.
    """
    scored = zip(completions, record, geometry)
    return [score_answer(text, study, in_square).set_iou for text, study, in_square in scored]
