"""Figures of grounded diagnoses, as asked of MAU and of any recipe: diagnosis, boxes, attention; by source and by lesion size.

``accuracy`` over the sources of MAU is printed by the paper for each source and as their plain mean, which is
``accuracy_average``: a source with few studies weighs as much as one with many. Studies without a lesion count for accuracy; of
boxes they are asked only whether one was drawn.

Intervals draw patients, where records name them: slices of one patient are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence

from umed_plugin.evaluation.metrics.figures import Figure, Row, by_group, mean, mean_of_groups, means, ratio
from umed_plugin.evaluation.metrics.grounding import SIZES, lesion_overlaps, overlaps_by_size, points_at
from umed_plugin.grounding.scoring import AnswerScore


def case_values(
    score: AnswerScore, vision_relevance: float | None, attention_hit: float | None = None
) -> dict[str, float]:
    """The columns of one study.

    Args:
        score: of the answer.
        vision_relevance: 0-1; None where it was not measured.
        attention_hit: 1.0 where the attention of the abnormality's name is highest in a lesion, else 0.0; None as above.
    """
    if not score.true01:
        boxes = len(score.predicted01)
        return {"accuracy": score.accuracy, "false_boxes": float(boxes), "false_box_rate": float(boxes > 0)}
    overlaps = lesion_overlaps(score.predicted01, score.true01)
    values = {
        "accuracy": score.accuracy,
        "mean_iou": score.set_iou,
        "acc_at_25": float(score.set_iou >= 0.25),
        "acc_at_50": float(score.set_iou >= 0.5),
        "pointing_game": points_at(score.predicted01, score.true01),
        **overlaps_by_size(overlaps, score.true01),
    }
    looked = {"vision_relevance": vision_relevance, "pointing_game_attention": attention_hit}
    return {**values, **{name: value for name, value in looked.items() if value is not None}}


def mau_figures(rows: Sequence[Row]) -> list[Figure]:
    """Accuracy (over all, by source, and the sources' mean), boxes, attention, negatives, and lesions by size.

    ``lesion_iou/small`` is the mean IoU of the small lesions, each with the box that it is matched to; ``lesions_found/small``
    the share of them with an IoU of at least 0.5. Sizes are those of `umed_plugin.evaluation.metrics.grounding`.
    """
    several = len({row.groups["source"] for row in rows}) > 1
    accuracy, iou, found = means("accuracy", "mean_iou", "acc_at_50")
    figures = [accuracy]
    if several:
        figures += by_group(accuracy, "source", rows)
        figures += [Figure("accuracy_average", mean_of_groups("accuracy", "source"), ("accuracy", "source"))]
    figures += [iou, *means("acc_at_25"), found, *means("pointing_game", "pointing_game_attention", "vision_relevance")]
    if several:
        figures += [*by_group(iou, "source", rows), *by_group(found, "source", rows)]
    figures += [*means("false_box_rate"), Figure("false_boxes_per_negative", mean("false_boxes"), ("false_boxes",))]
    for size in SIZES:
        lesions = f"lesions_{size}"
        for name in ("lesion_iou", "lesions_found"):
            figures.append(Figure(f"{name}/{size}", ratio(f"{name}_{size}", lesions), (f"{name}_{size}", lesions)))
    return figures
