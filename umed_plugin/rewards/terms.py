"""The three rewards of the paper, relevance, localization (ALR) and vision relevance (VRR), and a shaped localization."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

from umed_plugin.grounding.boxes import DISTANCE_SHARE, set_iou, shaped_iou_matrix
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import score_answer
from umed_plugin.registry import Registry
from umed_plugin.rewards.judges.lexical import lexical_relevance

Reward = Callable[..., "list[Optional[float]]"]
REWARDS: Registry[Reward] = Registry("reward")

relevance = REWARDS.register("relevance")(lexical_relevance)


@REWARDS.register("localization")
def localization(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    record: Sequence[Mapping[str, Any]],
    geometry: Sequence[ImageGeometry],
    **columns: Any,
) -> list[float | None]:
    """Abnormal Localization Reward: IoU of predicted and true boxes, in 0..1.

    Several lesions are matched one to one (Hungarian) and unmatched boxes count against; a study without abnormality scores 1
    for no box and 0 otherwise.
    """
    return [score_answer(text, item, place).set_iou for text, item, place in zip(completions, record, geometry)]


@REWARDS.register("localization_diou")
def localization_diou(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    record: Sequence[Mapping[str, Any]],
    geometry: Sequence[ImageGeometry],
    **columns: Any,
) -> list[float | None]:
    """Localization with a share for boxes that draw near without overlap (`boxes.shaped_iou_matrix`), in 0..1.

    For a start where most candidates miss and IoU is 0 for all of them. Boxes are matched on the same measure; unmatched boxes
    and studies without abnormality count as in `localization`. Dividing by the maximum would give the best of candidates that
    all miss the 1 of a perfect one, so the maximum is taken for at least twice what a miss can score: a miss stays below 0.5.
    """
    scores = [score_answer(text, item, place) for text, item, place in zip(completions, record, geometry)]
    return [set_iou(score.predicted01, score.true01, shaped_iou_matrix) for score in scores]


@REWARDS.register("vision_relevance")
def vision_relevance(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    record: Sequence[Mapping[str, Any]],
    attention_on_lesion: Sequence[float | None],
    **columns: Any,
) -> list[float | None]:
    """Vision Relevance Reward: attention on the lesion's patches by the tokens that name the abnormality, in 0..1.

    0 when no token names it. ``None`` for a study without abnormality: there is no patch to look at.
    """
    return [value if item["objects"]["bbox"] else None for value, item in zip(attention_on_lesion, record)]


localization.max_normalised = True  # type: ignore[attr-defined]
localization_diou.max_normalised = True  # type: ignore[attr-defined]
localization_diou.least_maximum = 2 * DISTANCE_SHARE  # type: ignore[attr-defined]
vision_relevance.max_normalised = True  # type: ignore[attr-defined]
