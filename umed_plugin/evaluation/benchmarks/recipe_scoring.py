"""How an answer about a recipe's study is scored, and the metrics of all answers.

`umed_plugin.evaluation.benchmarks.recipe` says what the metrics are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from umed_plugin.data.records import Record, record_geometry
from umed_plugin.evaluation.benchmarks.benchmark import BenchmarkQuestion
from umed_plugin.evaluation.metrics.grounding import (
    SIZES,
    attention_points_at,
    lesion_overlaps,
    overlaps_by_size,
    points_at,
)
from umed_plugin.evaluation.metrics.metric import (
    RATE,
    Columns,
    Metric,
    Row,
    by_group,
    mean,
    mean_of_groups,
    means,
    ratio,
)
from umed_plugin.evaluation.metrics.phrases import phrase_metrics, phrase_values
from umed_plugin.grounding.answer_types import asks_for_boxes, asks_for_names
from umed_plugin.grounding.consistency import consistency_of
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.phrases import phrase_spans
from umed_plugin.grounding.scoring import AnswerScore, Scorer, score_answer
from umed_plugin.grounding.terms import named_classes
from umed_plugin.model.answerer import ModelAnswer

if TYPE_CHECKING:
    from umed_plugin.model.answerer import Answerer
    from umed_plugin.model.forward import Candidates, PromptBatch

# Of the benchmark, in the files of an evaluation.
NAME = "recipe"
# The metrics that every stage of a run is summarised by.
HEADLINE = ("accuracy", "mean_iou", "acc_at_50", "vision_relevance")
# Whether training could see what the study shows: only where a recipe holds something out.
HELD_OUT, SEEN = "held_out", "seen"


def look(
    answerer: Answerer, questions: Sequence[BenchmarkQuestion], prompts: PromptBatch, answers: Candidates
) -> list[dict[str, Any]]:
    """The attention pass, an `ExamineHook`: ``vision_relevance`` 0-1, and ``heat`` (`umed_plugin.model.heat_map`) or None."""
    from umed_plugin.model.heat_map import relevance_and_heat_maps

    records = [question.about["record"] for question in questions]
    geometries = [geometry_of(record, answerer.scorer()) for record in records]
    looked = relevance_and_heat_maps(answerer.model, answerer.tokenizer, prompts, answers, records, geometries)
    return [{"vision_relevance": relevance, "heat": heat} for relevance, heat in looked]


def geometry_of(record: Record, scorer: Scorer) -> ImageGeometry:
    """How the scored model sees the record's image."""
    return record_geometry(record, scorer.image_size, scorer.patch_size)


def scored(question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> AnswerScore:
    """Classes and boxes of an answer beside the true ones."""
    record = question.about["record"]
    return score_answer(answer.text, record, geometry_of(record, scorer), scorer.dialect)


def score(question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> dict[str, float]:
    """The columns of one study; those of attention only where the answer was examined."""
    scores, record = scored(question, answer, scorer), question.about["record"]
    if not asks_for_boxes(record):
        return {"accuracy": scores.accuracy, **finding_values(answer.text, record)}
    if not asks_for_names(record):
        return _phrase_values(scores, record, answer)
    if answer.examined is None:
        values = case_values(scores, None)
    else:
        hit = _attention_hit(answer.examined["heat"], scores)
        values = case_values(scores, answer.examined["vision_relevance"], hit)
    agrees = consistency_of(answer.text, record, geometry_of(record, scorer), scorer.dialect)
    return values if agrees is None else {**values, "consistent_answers": float(agrees == 1)}


def _phrase_values(scores: AnswerScore, record: Record, answer: ModelAnswer) -> dict[str, float]:
    """The columns of a phrase; vision relevance only of an answer that repeats its words."""
    values = case_values(scores, None)
    del values["accuracy"]
    if scores.true01:
        values |= phrase_values(scores, record["objects"]["bbox"], record["image_size"])
    if answer.examined is not None and phrase_spans(answer.text, record["phrase"]):
        values["vision_relevance"] = answer.examined["vision_relevance"]
    return values


def finding_values(text: str, record: Record) -> dict[str, float]:
    """Counts of one report: findings that its text names, that the reference names, and both."""
    said, true = named_classes(text, record["terms"]), set(record["objects"]["ref"])
    return {"findings_said": len(said), "findings_true": len(true), "findings_right": len(said & true)}


def finding_metrics(rows: Sequence[Row]) -> list[Metric]:
    """Precision, recall and F1 of the findings that reports name, over all of them; none where no row is a report."""
    if not any("findings_true" in row.values for row in rows):
        return []
    right, said, true = "findings_right", "findings_said", "findings_true"

    def f1(columns: Columns) -> float:
        total = columns[said].sum() + columns[true].sum()
        return float(2 * columns[right].sum() / total) if total else float("nan")

    return [
        Metric("findings_precision", ratio(right, said), (right, said), limits=RATE),
        Metric("findings_recall", ratio(right, true), (right, true), limits=RATE),
        Metric("findings_f1", f1, (right, said, true), limits=RATE),
    ]


def _attention_hit(heat: dict[str, Any] | None, score: AnswerScore) -> float:
    """1.0 if the name of an abnormality that is present gets most of its attention from a lesion's patch.

    0.0 otherwise, and if the answer names none.
    """
    from umed_plugin.model.heat_map import decode_heat_map

    if heat is None or not heat["of_true_name"]:
        return 0.0
    return attention_points_at(decode_heat_map(heat), heat["covers"], score.true01)


def case_values(
    score: AnswerScore, vision_relevance: float | None, attention_hit: float | None = None
) -> dict[str, float]:
    """The columns of one study.

    Args:
        score: of the answer.
        vision_relevance: 0-1; None if it was not measured.
        attention_hit: 1.0 if the attention of the abnormality's name is highest in a lesion, else 0.0; None as above.
    """
    if not score.true01:
        boxes = len(score.predicted01)
        values = {"accuracy": score.accuracy, "false_boxes": float(boxes), "false_box_rate": float(boxes > 0)}
        return {**values, "unread_boxes": float(score.unread)}
    overlaps = lesion_overlaps(score.predicted01, score.true01)
    values = {
        "accuracy": score.accuracy,
        "mean_iou": score.set_iou,
        "acc_at_25": float(score.set_iou >= 0.25),
        "acc_at_50": float(score.set_iou >= 0.5),
        "pointing_game": points_at(score.predicted01, score.true01),
        **overlaps_by_size(overlaps, score.true01),
        "unread_boxes": float(score.unread),
    }
    attention = {"vision_relevance": vision_relevance, "pointing_game_attention": attention_hit}
    return {**values, **{name: value for name, value in attention.items() if value is not None}}


def metrics(rows: Sequence[Row]) -> list[Metric]:
    """Accuracy (of all studies, by source, and the sources' mean), boxes, attention, negatives, and lesions by size.

    ``lesion_iou/small`` is the mean IoU of the small lesions, each with the box that it is matched to. ``lesions_found/small``
    is the share of them with an IoU of at least 0.5. Sizes are those of `umed_plugin.evaluation.metrics.grounding`.
    ``consistent_answers`` is the share of answers that agree with themselves in all that applies (`checks` of
    `umed_plugin.grounding.consistency`), of the answers to which some of it applies.
    Records of phrases and reports add `phrase_metrics` and `finding_metrics`.
    ``unread_boxes`` is the mean number of boxes in an answer that could not be read; each counts as a box without area.
    ``held_out_accuracy`` and ``seen_accuracy``, and the same of IoU: of the studies that the recipe's ``hold_out`` kept from
    training, and of all others; where it keeps none, they are left out.
    """
    several = len({row.groups["source"] for row in rows}) > 1
    accuracy, iou, at_50 = means("accuracy", "mean_iou", "acc_at_50")
    reported = [accuracy]
    if several:
        reported += by_group(accuracy, "source", rows)
        reported += [Metric("accuracy_average", mean_of_groups("accuracy", "source"), ("accuracy", "source"))]
    reported += [iou, *means("acc_at_25"), at_50]
    reported += means("pointing_game", "pointing_game_attention", "vision_relevance")
    if several:
        reported += [*by_group(iou, "source", rows), *by_group(at_50, "source", rows)]
    (false_box_rate,) = means("false_box_rate")
    per_negative = Metric("false_boxes_per_negative", mean("false_boxes"), ("false_boxes",))
    of_less = [false_box_rate, per_negative]
    if any("unread_boxes" in row.values for row in rows):  # evaluations of earlier versions did not count them
        of_less += means("unread_boxes", limits=None)
    reported += [replace(metric, lower_is_better=True) for metric in of_less]
    if any("consistent_answers" in row.values for row in rows):  # nor did they look at this
        # A constant answer may agree with itself.
        reported += [replace(metric, rates=False) for metric in means("consistent_answers")]
    for group in (HELD_OUT, SEEN):
        if any(row.groups.get("training") == group for row in rows):
            reported += [replace(m, name=f"{group}_{m.name}", where={"training": group}) for m in (accuracy, iou)]
    for size in SIZES:
        lesions = f"lesions_{size}"
        for name in ("lesion_iou", "lesions_found"):
            of = (f"{name}_{size}", lesions)
            reported.append(Metric(f"{name}/{size}", ratio(*of), of, limits=RATE))
    others = [*phrase_metrics(rows), *finding_metrics(rows)]
    if not others:
        return reported
    # Of phrases and reports much of this is not asked; what the summary of a run needs is always there.
    return [
        metric for metric in (*reported, *others) if metric.name in HEADLINE or any(metric.takes(row) for row in rows)
    ]
