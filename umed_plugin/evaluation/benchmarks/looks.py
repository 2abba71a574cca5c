"""``--benchmark looks:RECIPE``: does it help to say what a class looks like? Boxes for the bare name and for its description.

Each study of one class whose recipe has ``classes.NAME.looks`` is asked twice: ``Find: NAME.`` and ``Find: NAME, that is LOOKS.``
Studies without a lesion, and of several classes, are left out: the question says that there is a finding, and which.

How to run: ``umed evaluate CKPT --benchmark looks:RECIPE --data-root DIR``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from umed_plugin.checkpoints.folder import UMED_TEMPLATES
from umed_plugin.data.looks import find_question
from umed_plugin.data.records import record_geometry
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion, OfRecipe, no_questions
from umed_plugin.evaluation.benchmarks.recipe import check_aspect_ratio
from umed_plugin.evaluation.metrics.metric import Columns, Metric, Row, by_group, means
from umed_plugin.grounding.answer_types import asks_for_diagnosis
from umed_plugin.grounding.scoring import Scorer, score_answer
from umed_plugin.model.answerer import ModelAnswer

BARE, DESCRIBED = "bare", "described"


def looks_questions(studies: Sequence[BenchmarkQuestion]) -> list[BenchmarkQuestion]:
    """Both questions about each study of one class that has looks.

    Raises:
        UmedError: there is none.
    """
    asked = []
    for study in studies:
        record = study.about["record"]
        names = {record["terms"][ref][0] for ref in record["objects"]["ref"]}
        name = next(iter(names)) if len(names) == 1 else ""
        looks = record.get("looks", {}).get(name)
        if looks and asks_for_diagnosis(record):
            groups = {**study.groups, "class": name}
            for form, text in ((BARE, find_question(name)), (DESCRIBED, find_question(name, looks))):
                asked.append(replace(study, id=f"{study.id}/{form}", text=text, groups={**groups, "part": form}))
    if not asked:
        raise UmedError(
            f"none of the {len(studies)} studies shows one class that the recipe describes. Give classes.NAME.looks."
        )
    return asked


def score(question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> dict[str, float]:
    """The set IoU of the boxes, 0-1, and whether it is at least 0.5."""
    record = question.about["record"]
    geometry = record_geometry(record, scorer.image_size, scorer.patch_size)
    overlap = score_answer(answer.text, record, geometry, scorer.dialect).set_iou
    described = float(question.groups["part"] == DESCRIBED)
    return {"mean_iou": overlap, "acc_at_50": float(overlap >= 0.5), "described": described}


def metrics(rows: Sequence[Row]) -> list[Metric]:
    """IoU of both forms, ``iou_gain`` (described minus bare, paired), and the gain of each class."""
    iou, at_50 = means("mean_iou", "acc_at_50")
    gain = Metric("iou_gain", _gain, ("mean_iou", "described"))
    return [*by_group(iou, "part", rows), *by_group(at_50, "part", rows), gain, *by_group(gain, "class", rows)]


def _gain(columns: Columns) -> float:
    described = columns["described"] == 1
    if described.all() or not described.any():
        return float("nan")
    return float(columns["mean_iou"][described].mean() - columns["mean_iou"][~described].mean())


OF_RECIPE = OfRecipe(
    Benchmark(
        name="looks",
        title="each class by its name, and by what it looks like",
        needs="the recipe's data set, and `classes.NAME.looks`",
        url="",
        reported="IoU and IoU at least 0.5 of both forms of the question; their difference, over all classes and of each",
        questions=no_questions("looks"),
        score=score,
        metrics=metrics,
        order=2,
        splits=("test", "val", "train"),
        templates=UMED_TEMPLATES,
        adapt=check_aspect_ratio,
        reads_boxes=True,
    ),
    looks_questions,
)
