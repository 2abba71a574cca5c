"""Med-GRIT-270k: visual grounding (Recall@0.5), and captions and interpretations (mBMR).

Huang et al. (BiRD, arXiv 2406.18146), and ClinKD. Test files are JSON lists of ``{"id": "ct_....", "conversations": [[question,
answer]]}``, one for each task. The file's name holds the task: VG (grounding), RO (what is at this box), GC (grounded caption),
MII (interpretation). Images are ``<id>.png``; the first part of the id is the modality. Questions name the image in ``<img>``
tags and write ``<ref>object</ref><box>(x1,y1),(x2,y2)</box>`` in thousandths of the image.

Boxes in questions are rewritten in LLaVA's form, 0-1 of the square that the model sees, and the ``<img>`` tag is dropped. Boxes
in answers are read as ``--boxes`` says and compared in that square.

Each metric is reported by modality and as the unweighted mean over modalities:

- ``recall_at_50``: share of true boxes that some box of the answer overlaps with an IoU above 0.5.
- ``mbmr``: mean of BLEU-1 to -4, METEOR and ROUGE-L, for MII and GC. Departures that make it differ from printed numbers:
  `umed_plugin.evaluation.metrics.captions`.
- ``referring_accuracy``: share of RO answers that contain every word of the truth, as substrings.

File names, keys and metrics are those of the authors' ``infer.py`` and ``eval_*_score_modality.py`` (ShawnHuang497/BiRD at
b588ecb). As there, a grounding row without a box counts for nothing. Departure: a modality without rows is left out of the mean;
there it counts as 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import (
    Benchmark,
    BenchmarkQuestion,
    existing_image,
    field_of,
    files_matching,
    find_one,
    numbered,
    questions_of_rows,
    read_records,
    text_of,
)
from umed_plugin.evaluation.metrics.captions import BLEU_COLUMNS, caption_values, mbmr
from umed_plugin.evaluation.metrics.grounding import recalled
from umed_plugin.evaluation.metrics.metric import RATE, Columns, Metric, Row, Statistic, by_group, mean, ratio
from umed_plugin.grounding.boxes import Box, format_box, rewrite_boxes
from umed_plugin.grounding.dialects import DIALECTS
from umed_plugin.grounding.scoring import Scorer, boxes_in_square
from umed_plugin.model.answerer import ModelAnswer

TASKS = ("VG", "RO", "GC", "MII")
_CAPTION = (*BLEU_COLUMNS, "rouge_l", "meteor")
_IMAGE_TAG = re.compile(r"(?:Picture \d+:\s*)?<img>.*?</img>\s*", re.DOTALL)
_TAGS = re.compile(r"</?(?:ref|box)>")


def questions(root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
    """The questions of every task whose file is there."""
    find_one(root, ["*_VG*.json", "*_RO*.json", "*_GC*.json", "*_MII*.json", "*/*_VG*.json"], "med_grit")
    folders, listed = [root / "images", root], []
    for file in files_matching(root, "**/*.json"):
        tasks = [task for task in TASKS if re.search(rf"(?:^|_){task}(?:_|$)", file.stem)]
        if len(tasks) == 1:
            rows = numbered(file, read_records(file, "med_grit"))
            make = partial(_questions, task=tasks[0], folders=folders)
            listed += questions_of_rows(rows, make, f"med_grit/{tasks[0]}")
    return listed


def _questions(record: dict[str, Any], where: str, *, task: str, folders: Sequence[Path]) -> list[BenchmarkQuestion]:
    return [_question(record, task, where, folders)]


def _question(record: dict[str, Any], task: str, where: str, folders: Sequence[Path]) -> BenchmarkQuestion:
    identity = text_of(record, where, "id")
    turns = field_of(record, where, "conversations")
    if not (isinstance(turns, list) and turns and isinstance(turns[0], list) and len(turns[0]) == 2):
        raise UmedError(f"{where}: its conversations are not pairs of question and answer: {str(turns)[:80]!r}.")
    asked, truth = (
        text_of({"question": turns[0][0], "answer": turns[0][1]}, where, name) for name in ("question", "answer")
    )
    if task == "VG" and not DIALECTS["qwen_vl"].read(truth, 1000, 1000):
        raise UmedError(f"{where}: its answer {truth[:80]!r} has no box that could be found.")
    return BenchmarkQuestion(
        id=f"{task}/{identity}",
        image=existing_image(folders, f"{identity}.png", where),
        text=_IMAGE_TAG.sub("", asked).strip(),
        truth=truth,
        groups={"part": task, "modality": identity.split("_")[0]},
    )


def in_the_models_form(asked: Sequence[BenchmarkQuestion], scorer: Scorer) -> list[BenchmarkQuestion]:
    """The questions without tags, and with boxes in 0-1 of the square that the model sees.

    Raises:
        UmedError: an image cannot be read.
    """
    from dataclasses import replace

    adapted = []
    for question in asked:
        geometry, size = _seen(question, scorer)

        def written(box: Box, geometry: Any = geometry, size: Any = size) -> str:
            width, height = size
            (placed,) = geometry.to_square([(box[0] * width, box[1] * height, box[2] * width, box[3] * height)])
            return format_box(placed) if placed[2] > placed[0] and placed[3] > placed[1] else "[outside]"

        text = _TAGS.sub("", rewrite_boxes(question.text or "", written))
        adapted.append(replace(question, text=text, about={**question.about, "size": list(size)}))
    return adapted


def _seen(question: BenchmarkQuestion, scorer: Scorer) -> tuple[Any, tuple[int, int]]:
    from umed_plugin.data.images import shown_size

    size = shown_size(question.image)
    return scorer.geometry(size), size


def score(question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> dict[str, float]:
    """The columns of one answer; each task has its own."""
    task = question.groups["part"]
    if task == "VG":
        geometry = scorer.geometry(question.about["size"])
        # The truth is written in thousandths of the image, whatever form the model's boxes have.
        true = boxes_in_square(question.truth, geometry, DIALECTS["qwen_vl"])
        recalled_boxes, true_boxes = recalled(boxes_in_square(answer.text, geometry, scorer.dialect), true)
        return {"boxes_found": float(recalled_boxes), "boxes_true": float(true_boxes)}
    if task == "RO":
        text = answer.text.lower()
        return {"referring": float(all(word in text for word in question.truth.lower().split(" ")))}
    return caption_values(answer.text, question.truth)


def metrics(rows: Sequence[Row]) -> list[Metric]:
    """Each metric as the unweighted mean over modalities, then by modality."""
    found = ("boxes_found", "boxes_true")
    recall = Metric("recall_at_50", ratio(*found), found, {"part": "VG"}, RATE)
    referring = Metric("referring_accuracy", mean("referring"), ("referring",), {"part": "RO"}, RATE)
    captions = [Metric(f"mbmr_{task.lower()}", mbmr, _CAPTION, {"part": task}) for task in ("MII", "GC")]
    reported = []
    for metric in (recall, *captions, referring):
        over = Metric(metric.name, _mean_over_modalities(metric.statistic), (*metric.of, "modality"), metric.where)
        reported += [over, *by_group(metric, "modality", rows)]
    return reported


def _mean_over_modalities(statistic: Statistic) -> Statistic:
    """The unweighted mean of a statistic over the modalities that have rows; modalities where it is undefined are left out."""

    def over(columns: Columns) -> float:
        import numpy as np

        modalities = columns["modality"]
        each = [
            statistic({name: column[modalities == modality] for name, column in columns.items()})
            for modality in np.unique(modalities)
        ]
        defined = [value for value in each if value == value]
        return sum(defined) / len(defined) if defined else float("nan")

    return over


BENCHMARK = Benchmark(
    name="med_grit",
    title="Med-GRIT-270k, grounding and interpretation over 8 modalities",
    needs="`*_VG_*.json`, `*_RO_*.json`, `*_GC_*.json`, `*_MII_*.json` and `images/`",
    url="https://github.com/ShawnHuang497/BiRD (on request; images from SA-Med2D-20M)",
    reported="Recall@0.5 of boxes, mBMR of interpretations and captions, referring accuracy; mean over modalities",
    questions=questions,
    score=score,
    metrics=metrics,
    order=7,
    adapt=in_the_models_form,
    reads_boxes=True,
)
