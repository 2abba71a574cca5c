"""What a report shows of a recipe's evaluation: one case a study, and the headline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from umed_plugin.evaluation.benchmarks.benchmark import BenchmarkQuestion
from umed_plugin.evaluation.benchmarks.recipe_scoring import HEADLINE, NAME, scored
from umed_plugin.evaluation.results import Evaluation, Prediction
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer


def details(question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> dict[str, Any]:
    """What a report draws: classes and boxes in pixels of the image file, and how the image was read. See `Case`."""
    record, scores = question.about["record"], scored(question, answer, scorer)
    return {
        "true_classes": list(record["objects"]["ref"]),
        "true_boxes": [list(map(float, box)) for box in record["objects"]["bbox"]],
        "boxes": [[round(float(value), 3) for value in box] for box in scores.boxes],
        "set_iou": scores.set_iou,
        "modality": str(record.get("modality") or ""),
        "image_aspect_ratio": record["provenance"]["image_aspect_ratio"],
        "reading": record.get("reading"),
        "answer_type": record["answer_type"],
        "image_size": [int(side) for side in record["image_size"]],
    }


@dataclass(frozen=True)
class Case:
    """One study for a report: question, answer and truth, and how the answer scores.

    Attributes:
        image: path of the image file.
        true_boxes: xyxy in pixels of the image file.
        boxes: predicted, in the same pixels; a malformed box is all zeros.
        accuracy: 1.0 if exactly the true classes are named, else 0.0; None for a phrase, which asks for none.
        set_iou: 0-1; for a study without a lesion 1.0 for no box, else 0.0.
        vision_relevance: 0-1; None for a study without a lesion.
        source: the recipe that the record came from.
        modality: of the record.
        image_aspect_ratio: how the model sees the image: ``pad`` or ``square``.
        reading: arguments of `umed_plugin.data.images.load_image` for a DICOM or NIfTI file; else None.
        heat: where the name of the abnormality looks (`umed_plugin.model.heat_map`); None if the answer names none.
        truth: the reference answer; empty in files of earlier versions.
        answer_type: what the record asks for (`umed_plugin.grounding.answer_types`); empty in files of earlier versions.
        image_size: width and height of the image, in pixels; None in files of earlier versions.
    """

    id: str
    image: str
    question: str
    answer: str
    true_classes: list[str]
    true_boxes: list[list[float]]
    boxes: list[list[float]]
    accuracy: float | None
    set_iou: float
    vision_relevance: float | None
    source: str = ""
    modality: str = ""
    image_aspect_ratio: str = "pad"
    reading: dict[str, Any] | None = None
    heat: dict[str, Any] | None = None
    truth: str = ""
    answer_type: str = ""
    image_size: list[int] | None = None


# Lines of a later version may hold more.
_DRAWN = {
    *("true_classes", "true_boxes", "boxes", "set_iou", "modality", "image_aspect_ratio", "reading", "answer_type"),
    "image_size",
}


def cases_of(evaluation: Evaluation) -> list[Case]:
    """The studies of an evaluation, in the order of its questions; none if it is not of a recipe's records."""
    if evaluation.benchmark != NAME:
        return []
    return [_case(prediction) for prediction in evaluation.predictions]


def _case(prediction: Prediction) -> Case:
    return Case(
        id=prediction.id,
        image=prediction.image,
        question=prediction.question,
        answer=prediction.answer,
        truth=prediction.truth,
        accuracy=prediction.values.get("accuracy"),
        vision_relevance=prediction.values.get("vision_relevance"),
        source=prediction.groups["source"],
        heat=(prediction.examined or {}).get("heat"),
        **{name: value for name, value in prediction.details.items() if name in _DRAWN},
    )


def headline(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation in short, as ``summary.json`` holds it: each metric of `HEADLINE`, its ``<name>_ci95``, and counts.

    ``n`` counts studies, ``n_with_lesion`` those with a lesion that the model can see. ``intervals`` says of each metric what its
    interval was computed from and how, as `umed_plugin.evaluation.metrics.metric.measure` does; ``unit`` what was resampled.
    """
    summary: dict[str, Any] = {}
    for name in HEADLINE:
        measured = evaluation.metrics.get(name, {})
        summary[name], summary[f"{name}_ci95"] = measured.get("value"), measured.get("ci95")
    counts = {"n": len(evaluation.predictions), "n_with_lesion": evaluation.metrics["mean_iou"]["n"]}
    shown = ("n", "units", "interval")
    about = {name: {key: evaluation.metrics.get(name, {}).get(key) for key in shown} for name in HEADLINE}
    return {**summary, **counts, "unit": evaluation.unit, "intervals": about}
