"""Grounded diagnoses: the records of a recipe (``mau``, any other, or a JSON), scored by diagnosis, boxes and attention.

All metrics are 0-1. The four that every stage of a run is summarised by (`HEADLINE`):

- ``accuracy``: share of studies whose answer names exactly the true classes (for one without a lesion: no class and no box).
- ``mean_iou``: mean set IoU over the studies with a lesion; unmatched boxes, true or predicted, count as 0.
- ``acc_at_50``: share of the studies with a lesion whose set IoU is at least 0.5.
- ``vision_relevance``: mean attention of the tokens that name the abnormality on the lesion's patches, over the studies with a
  lesion; 0 where the answer does not name it.

Studies without a lesion are left out of the last three, where "no box" would score 1 without a look at the image. A box drawn on
one of them costs accuracy. So are studies whose lesions LLaVA's centre crop has cut away.

A record of a phrase (``answer_type`` "phrase") is scored by its boxes alone, in two arithmetics: see
`umed_plugin.evaluation.metrics.phrases`. A report is scored by the findings that it names; its text is scored by the benchmark
``report:RECIPE``.

Confidence intervals resample patients where records name them, else images: slices of one patient are not independent.

``accuracy`` is also reported by source and, as the paper prints MAU's, as the unweighted mean of the sources
(``accuracy_average``): a source with few studies weighs as much as one with many.

How to run: ``umed evaluate CKPT --benchmark RECIPE_OR_JSON``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umed_plugin.checkpoints.folder import UMED_TEMPLATES
from umed_plugin.data.records import Record, record_geometry, true_boxes, with_pseudo_boxes
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion
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
from umed_plugin.evaluation.results import Evaluation, Prediction
from umed_plugin.grounding.answer_types import PROBE, asks_for_boxes, asks_for_names
from umed_plugin.grounding.boxes import format_box, is_degenerate
from umed_plugin.grounding.consistency import consistency_of
from umed_plugin.grounding.dialects import LLAVA
from umed_plugin.grounding.phrases import phrase_spans
from umed_plugin.grounding.scoring import AnswerScore, Scorer, score_answer
from umed_plugin.grounding.terms import named_classes
from umed_plugin.model.answerer import ModelAnswer

if TYPE_CHECKING:
    from umed_plugin.model.answerer import Answerer
    from umed_plugin.model.forward import Candidates, PromptBatch

HEADLINE = ("accuracy", "mean_iou", "acc_at_50", "vision_relevance")
# Whether training could see what the study shows: only where a recipe holds something out.
HELD_OUT, SEEN = "held_out", "seen"


def record_questions(
    records: Sequence[Record], image_folder: Path | str = "", *, pseudo_boxes: bool = False
) -> list[BenchmarkQuestion]:
    """One question for each record.

    Args:
        records: built for the checkpoint's ``image_aspect_ratio``.
        image_folder: goes before the records' relative image paths.
        pseudo_boxes: measure against boxes that an anomaly map drew, too.

    Raises:
        UmedError: records have such boxes, and ``pseudo_boxes`` is False.
    """
    pseudo = with_pseudo_boxes(records)
    if pseudo and not pseudo_boxes:
        raise UmedError(
            f"{len(pseudo)} of {len(records)} records, the first {pseudo[0]['id']!r}, would be measured against boxes that no "
            "person drew (provenance.boxes is 'pseudo'). Evaluate on a recipe with true boxes. To measure agreement with the "
            "anomaly map all the same: --pseudo-boxes"
        )
    some = any(record.get("held_out") for record in records)
    names = {True: HELD_OUT, False: SEEN}
    return [
        _question(record, image_folder, names[bool(record.get("held_out"))] if some else None) for record in records
    ]


def _question(record: Record, image_folder: Path | str, held_out: str | None) -> BenchmarkQuestion:
    human, reference = (turn["value"] for turn in record["conversations"][:2])
    source, patient = str(record.get("source", "")), str(record.get("patient") or "")
    return BenchmarkQuestion(
        id=str(record["id"]),
        image=os.path.join(image_folder, record["image"]),
        text=human.replace("<image>", "").strip(),
        truth=reference,
        groups={"source": source, **({} if held_out is None else {"training": held_out})},
        about={"record": record},
        patient=f"{source}/{patient}" if patient else "",
        reading=record.get("reading"),
    )


def check_aspect_ratio(questions: Sequence[BenchmarkQuestion], scorer: Scorer) -> list[BenchmarkQuestion]:
    """The questions as they are.

    Raises:
        UmedError: records were built for another ``image_aspect_ratio`` than the checkpoint's.
    """
    modes = {question.id: question.about["record"]["provenance"]["image_aspect_ratio"] for question in questions}
    others = [identity for identity, mode in modes.items() if mode != scorer.mode]
    if others:
        raise UmedError(
            f"the checkpoint sees images as {scorer.mode!r} (image_aspect_ratio in config.json), but {len(others)} of "
            f"{len(modes)} records, the first {others[0]!r}, were built for {modes[others[0]]!r}: their boxes would be in the "
            f"wrong place. Build them with: umed recipe build RECIPE --image-aspect-ratio {scorer.mode} --out FILE"
        )
    return list(questions)


def look(
    answerer: Answerer, questions: Sequence[BenchmarkQuestion], prompts: PromptBatch, answers: Candidates
) -> list[dict[str, Any]]:
    """The attention pass, an `ExamineHook`: ``vision_relevance`` 0-1, and ``heat`` (`umed_plugin.model.heat_map`) or None."""
    from umed_plugin.model.heat_map import relevance_and_heat_maps

    records = [question.about["record"] for question in questions]
    geometries = [_geometry(record, answerer.scorer()) for record in records]
    looked = relevance_and_heat_maps(answerer.model, answerer.tokenizer, prompts, answers, records, geometries)
    return [{"vision_relevance": relevance, "heat": heat} for relevance, heat in looked]


def _geometry(record: Record, scorer: Scorer) -> Any:
    return record_geometry(record, scorer.image_size, scorer.patch_size)


def _scored(question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> AnswerScore:
    record = question.about["record"]
    return score_answer(answer.text, record, _geometry(record, scorer), scorer.dialect)


def score(question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> dict[str, float]:
    """The columns of one study; those of attention only where the answer was examined."""
    scores, record = _scored(question, answer, scorer), question.about["record"]
    if not asks_for_boxes(record):
        return {"accuracy": scores.accuracy, **finding_values(answer.text, record)}
    if not asks_for_names(record):
        return _phrase_values(scores, record, answer)
    if answer.examined is None:
        values = case_values(scores, None)
    else:
        hit = _attention_hit(answer.examined["heat"], scores)
        values = case_values(scores, answer.examined["vision_relevance"], hit)
    agrees = consistency_of(answer.text, record, _geometry(record, scorer), scorer.dialect)
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


def details(question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> dict[str, Any]:
    """What a report draws: classes and boxes in pixels of the image file, and how the image was read. See `Case`."""
    record, scores = question.about["record"], _scored(question, answer, scorer)
    return {
        "true_classes": list(record["objects"]["ref"]),
        "true_boxes": [list(map(float, box)) for box in record["objects"]["bbox"]],
        "boxes": [[round(float(value), 3) for value in box] for box in scores.boxes],
        "set_iou": scores.set_iou,
        "modality": str(record.get("modality") or ""),
        "image_aspect_ratio": record["provenance"]["image_aspect_ratio"],
        "reading": record.get("reading"),
        "answer_type": record["answer_type"],
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


# Lines of a later version may hold more.
_DRAWN = {"true_classes", "true_boxes", "boxes", "set_iou", "modality", "image_aspect_ratio", "reading", "answer_type"}


def cases_of(evaluation: Evaluation) -> list[Case]:
    """The studies of an evaluation, in the order of its questions; none if it is not of a recipe's records."""
    if evaluation.benchmark != RECIPE.name:
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


def recipe_benchmark(
    recipe: str,
    *,
    data_root: Path | None = None,
    image_aspect_ratio: str = "pad",
    on_bad_image: str = "stop",
    render: bool = True,
    give_box: bool = False,
    pseudo_boxes: bool = False,
) -> Benchmark:
    """The benchmark of a recipe (name or YAML) or of a JSON that ``umed recipe build`` wrote.

    Args:
        data_root: folder of the recipe's files; None: as the recipe says. Images of a JSON are looked for beside it.
        image_aspect_ratio: ``pad`` or ``square``, as the checkpoint sees images.
        on_bad_image: ``stop`` at unreadable images, or ``skip`` them.
        render: write DICOM and NIfTI files as PNG. Without it they are read where they lie.
        give_box: give the true boxes in the question, and judge the diagnosis alone (`GIVEN_BOX`).
        pseudo_boxes: measure against pseudo-boxes too.
    """

    def questions(_root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
        from umed_plugin.data.build import build_records
        from umed_plugin.data.prepared import has_pseudo_boxes
        from umed_plugin.data.recipes.recipe import load_recipe
        from umed_plugin.data.records import load_records

        if recipe.endswith(".json"):
            records, folder = load_records(recipe, split=split), Path(recipe).resolve().parent
        else:
            folder, loaded = work, load_recipe(recipe)
            if has_pseudo_boxes(loaded) and not pseudo_boxes:
                raise UmedError(
                    f"{loaded.path}: has pseudo_boxes, so its studies would be measured against boxes that no person drew. "
                    "Evaluate on a recipe with true boxes"
                )
            records = build_records(
                loaded,
                out_dir=work,
                image_aspect_ratio=image_aspect_ratio,
                split=split,
                data_root=data_root,
                on_bad_image=on_bad_image,
                render=render,
            )
        asked = [record for record in records if record["split"] == split and record["answer_type"] != PROBE]
        return record_questions(asked, folder, pseudo_boxes=pseudo_boxes)

    return replace(GIVEN_BOX if give_box else RECIPE, questions=questions)


def _mau(root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
    return recipe_benchmark("mau", data_root=root).questions(root, split, work)


# MAU's studies, or with `recipe_benchmark` those of any recipe or JSON. All have one name in files: records may come either way.
RECIPE = Benchmark(
    name="recipe",
    title="the test split's studies",
    needs="the recipe's data set",
    url="",
    reported="accuracy by source and their mean, IoU, IoU at least 0.25 and 0.5, pointing game of boxes and of attention, vision "
    "relevance, false boxes on negatives, boxes that could not be read, answers that agree with themselves, lesions by size",
    questions=_mau,
    score=score,
    metrics=metrics,
    splits=("test", "val", "train"),
    templates=UMED_TEMPLATES,
    adapt=check_aspect_ratio,
    examine=look,
    details=details,
    reads_boxes=True,
)


def with_true_boxes(questions: Sequence[BenchmarkQuestion], scorer: Scorer) -> list[BenchmarkQuestion]:
    """The questions about studies with a lesion, each with the true boxes behind its text.

    Those about other studies are left out: there is no box to give, and that none is given would tell the answer.

    Raises:
        UmedError: the checkpoint sees images in another way, or writes boxes in another form than LLaVA's.
    """
    if scorer.dialect != LLAVA:
        raise UmedError(
            "--give-box gives boxes in LLaVA's form, and this checkpoint has another (--boxes). Remove one of them."
        )
    asked = []
    for question in check_aspect_ratio(questions, scorer):
        record = question.about["record"]
        boxes = [box for box in _geometry(record, scorer).to_square(true_boxes(record)) if not is_degenerate(box)]
        if boxes:
            given = "region is" if len(boxes) == 1 else "regions are"
            text = f"{question.text} The abnormal {given} at {', '.join(map(format_box, boxes))}."
            asked.append(replace(question, text=text))
    if not asked:
        raise UmedError(
            "--give-box: none of the studies has a lesion that the model can see, so there is no box to give."
        )
    return asked


def _score_of_diagnosis(question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> dict[str, float]:
    return {"accuracy": _scored(question, answer, scorer).accuracy}


def _metrics_of_diagnosis(rows: Sequence[Row]) -> list[Metric]:
    """Those of `metrics` that are of the diagnosis alone."""
    return [metric for metric in metrics(rows) if metric.of[0] == "accuracy"]


# The bound above which no better box can lift the diagnosis. The paper gives GPT-4V the true box in the same way (.31 -> .72).
GIVEN_BOX = replace(
    RECIPE,
    name="recipe_given_box",
    title="the test split's studies with a lesion, whose true boxes are given in the question",
    reported="accuracy by source and their mean",
    score=_score_of_diagnosis,
    metrics=_metrics_of_diagnosis,
    adapt=with_true_boxes,
    examine=None,
    reads_boxes=False,
)
