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

Confidence intervals resample patients where records name them, else image files: slices of one patient are not independent. A
patient who is called as the file is (``provenance.patient`` "file name") is not known.

``accuracy`` is also reported by source and, as the paper prints MAU's, as the unweighted mean of the sources
(``accuracy_average``): a source with few studies weighs as much as one with many.

How to run: ``umed evaluate CKPT --benchmark RECIPE_OR_JSON``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from umed_plugin.checkpoints.folder import UMED_TEMPLATES
from umed_plugin.data.records import FILE_NAME, Record, box_decimals, true_boxes, with_pseudo_boxes
from umed_plugin.errors import UmedError, note
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion
from umed_plugin.evaluation.benchmarks.recipe_cases import details
from umed_plugin.evaluation.benchmarks.recipe_scoring import (
    HELD_OUT,
    NAME,
    SEEN,
    geometry_of,
    look,
    metrics,
    score,
    scored,
)
from umed_plugin.evaluation.metrics.metric import Metric, Row
from umed_plugin.grounding.answer_types import PROBE, asks_for_names
from umed_plugin.grounding.boxes import format_box, is_degenerate
from umed_plugin.grounding.dialects import LLAVA
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer


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
    provenance, part_of = record.get("provenance") or {}, ""
    if provenance.get("patient") == FILE_NAME:  # files of one name in two folders are two images, and no one's patient
        patient, part_of = "", f"{source}/{provenance['original']}" if "original" in provenance else ""
    return BenchmarkQuestion(
        id=str(record["id"]),
        image=os.path.join(image_folder, record["image"]),
        text=human.replace("<image>", "").strip(),
        truth=reference,
        groups={"source": source, **({} if held_out is None else {"training": held_out})},
        about={"record": record},
        patient=f"{source}/{patient}" if patient else "",
        part_of=part_of,
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
    skipped: list[UmedError] = []

    def questions(_root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
        from umed_plugin.data.build import build_records
        from umed_plugin.data.prepared import has_pseudo_boxes
        from umed_plugin.data.recipes.recipe import load_recipe
        from umed_plugin.data.records import load_records

        skipped.clear()
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
                skipped=skipped,
            )
        asked = [record for record in records if record["split"] == split and record["answer_type"] != PROBE]
        return record_questions(asked, folder, pseudo_boxes=pseudo_boxes)

    return replace(GIVEN_BOX if give_box else RECIPE, questions=questions, left_out=lambda: len(skipped))


def _mau(root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
    return recipe_benchmark("mau", data_root=root).questions(root, split, work)


# MAU's studies, or with `recipe_benchmark` those of any recipe or JSON. All have one name in files: records may come either way.


RECIPE = Benchmark(
    name=NAME,
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

    Those about other studies are left out: there is no box to give, and that none is given would tell the answer. Phrases are
    left out too, and that is said: they ask for boxes alone.

    Raises:
        UmedError: the checkpoint sees images in another way, writes boxes in another form than LLaVA's, nothing is left, or a
            record does not say properly how many decimals it has.
    """
    if scorer.dialect != LLAVA:
        raise UmedError(
            "--give-box gives boxes in LLaVA's form, and this checkpoint has another (--boxes). Remove one of them."
        )
    asked = []
    diagnoses = [one for one in check_aspect_ratio(questions, scorer) if asks_for_names(one.about["record"])]
    for question in diagnoses:
        record = question.about["record"]
        boxes = [box for box in geometry_of(record, scorer).to_square(true_boxes(record)) if not is_degenerate(box)]
        if boxes:
            given = "region is" if len(boxes) == 1 else "regions are"
            # With the decimals that the model has been trained on.
            written = ", ".join(format_box(box, box_decimals(record)) for box in boxes)
            asked.append(replace(question, text=f"{question.text} The abnormal {given} at {written}."))
    phrases = len(questions) - len(diagnoses)
    told = f"{phrases} of {len(questions)} questions are phrases, which ask for boxes and for no diagnosis"
    if not asked:
        raise UmedError(
            "--give-box: none of the studies has a lesion that the model can see, so there is no box to give."
            + (f" {told}." if phrases else "")
        )
    if phrases:
        note(f"--give-box: {told}. They are left out.")
    return asked


def _score_of_diagnosis(question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> dict[str, float]:
    return {"accuracy": scored(question, answer, scorer).accuracy}


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
