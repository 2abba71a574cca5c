"""Med-GRIT-270k: visual grounding (Recall@0.5), and captions and interpretations (mBMR).

Huang et al. (BiRD, arXiv 2406.18146), and ClinKD. Test files are JSON lists of ``{"id": "ct_....", "conversations": [[question,
answer]]}``, one for each task, which the file's name holds: VG (grounding), RO (what is at this box), GC (grounded caption), MII
(interpretation). Images are ``<id>.png``; the first part of the id is the modality. Questions name the image in ``<img>`` tags
and write ``<ref>object</ref><box>(x1,y1),(x2,y2)</box>`` in thousandths of the image.

Boxes in questions are rewritten in LLaVA's form, 0-1 of the square that the model sees, and the ``<img>`` tag is dropped; the
answer's boxes are read as ``--boxes`` says and compared in that square.

- ``recall_at_50``: share of true boxes that some box of the answer overlaps by more than 0.5, by modality, then their plain mean.
- ``mbmr``: mean of BLEU-1 to -4, METEOR and ROUGE-L, for MII and GC, by modality, then their plain mean. Departures that make
  it differ from printed numbers: `umed_plugin.evaluation.metrics.captions`.
- ``referring_accuracy``: share of RO answers that hold every word of the truth, as substrings, by modality, then their mean.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import (
    Benchmark,
    Question,
    existing_image,
    field_of,
    find_one,
    read_json,
)
from umed_plugin.evaluation.metrics.captions import BLEU_COLUMNS, caption_values, mbmr
from umed_plugin.evaluation.metrics.figures import Columns, Figure, Row, Statistic, by_group, mean, ratio
from umed_plugin.evaluation.metrics.grounding import recalled
from umed_plugin.grounding.boxes import Box, format_box, rewrite_boxes
from umed_plugin.grounding.dialects import DIALECTS
from umed_plugin.grounding.scoring import Scorer, boxes_in_square
from umed_plugin.model.answerer import ModelAnswer

TASKS = ("VG", "RO", "GC", "MII")
_CAPTION = (*BLEU_COLUMNS, "rouge_l", "meteor")
_IMAGE_TAG = re.compile(r"(?:Picture \d+:\s*)?<img>.*?</img>\s*", re.DOTALL)
_TAGS = re.compile(r"</?(?:ref|box)>")


def questions(root: Path, split: str, work: Path) -> list[Question]:
    """The questions of every task that is there."""
    find_one(root, ["*_VG*.json", "*_RO*.json", "*_GC*.json", "*_MII*.json", "*/*_VG*.json"], "med_grit")
    found = []
    for file in sorted(root.glob("**/*.json")):
        tasks = [task for task in TASKS if re.search(rf"(?:^|_){task}(?:_|$)", file.stem)]
        if len(tasks) == 1:
            for number, record in enumerate(read_json(file, "med_grit")):
                found.append(_question(record, tasks[0], f"{file}[{number}]", [root / "images", root]))
    return found


def _question(record: dict[str, Any], task: str, where: str, folders: Sequence[Path]) -> Question:
    identity = str(field_of(record, where, "id"))
    turns = field_of(record, where, "conversations")
    if not (isinstance(turns, list) and turns and isinstance(turns[0], list) and len(turns[0]) == 2):
        raise UmedError(f"{where}: its conversations are not pairs of question and answer: {str(turns)[:80]!r}.")
    asked, truth = str(turns[0][0]), str(turns[0][1])
    return Question(
        id=f"{task}/{identity}",
        image=existing_image(folders, f"{identity}.png"),
        text=_IMAGE_TAG.sub("", asked).strip(),
        truth=truth,
        groups={"part": task, "modality": identity.split("_")[0]},
    )


def in_the_models_form(asked: Sequence[Question], scorer: Scorer) -> list[Question]:
    """The questions with boxes in 0-1 of the square, and without tags; what needs the model's geometry."""
    from dataclasses import replace

    found = []
    for question in asked:
        geometry, size = _seen(question, scorer)

        def written(box: Box, geometry: Any = geometry, size: Any = size) -> str:
            width, height = size
            (placed,) = geometry.to_square([(box[0] * width, box[1] * height, box[2] * width, box[3] * height)])
            return format_box(placed) if placed[2] > placed[0] and placed[3] > placed[1] else "[outside]"

        text = _TAGS.sub("", rewrite_boxes(question.text or "", written))
        found.append(replace(question, text=text, about={**question.about, "size": list(size)}))
    return found


def _seen(question: Question, scorer: Scorer) -> tuple[Any, tuple[int, int]]:
    from PIL import Image

    with Image.open(question.image) as image:
        size = image.size
    return scorer.geometry(size), size


def score(question: Question, answer: ModelAnswer, scorer: Scorer) -> dict[str, float]:
    """The columns of one answer; which there are depends on the task."""
    task = question.groups["part"]
    if task == "VG":
        geometry = scorer.geometry(question.about["size"])
        # The truth is written in thousandths of the image, whatever the model's own way is.
        true = boxes_in_square(question.truth, geometry, DIALECTS["qwen_vl"])
        found, wanted = recalled(boxes_in_square(answer.text, geometry, scorer.dialect), true)
        return {"boxes_found": float(found), "boxes_true": float(wanted)}
    if task == "RO":
        said = answer.text.lower()
        return {"referring": float(all(word in said for word in question.truth.lower().split(" ")))}
    return caption_values(answer.text, question.truth)


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Each metric as the plain mean over modalities, then by modality."""
    recall = Figure("recall_at_50", ratio("boxes_found", "boxes_true"), ("boxes_found", "boxes_true"), {"part": "VG"})
    referring = Figure("referring_accuracy", mean("referring"), ("referring",), {"part": "RO"})
    captions = [Figure(f"mbmr_{task.lower()}", mbmr, _CAPTION, {"part": task}) for task in ("MII", "GC")]
    found = []
    for one in (recall, *captions, referring):
        over = Figure(one.name, _mean_over_modalities(one.statistic), (*one.of, "modality"), one.where)
        found += [over, *by_group(one, "modality", rows)]
    return found


def _mean_over_modalities(statistic: Statistic) -> Statistic:
    """The plain mean, over the modalities that are there, of a statistic of each; one that is not defined is left out."""

    def over(columns: Columns) -> float:
        import numpy as np

        modalities = columns["modality"]
        each = [
            statistic({name: column[modalities == one] for name, column in columns.items()})
            for one in np.unique(modalities)
        ]
        defined = [value for value in each if value == value]
        return sum(defined) / len(defined) if defined else float("nan")

    return over


MED_GRIT = Benchmark(
    name="med_grit",
    title="Med-GRIT-270k, grounding and interpretation over 8 modalities",
    needs="`*_VG_*.json`, `*_RO_*.json`, `*_GC_*.json`, `*_MII_*.json` and `images/`",
    url="https://github.com/ShawnHuang497/BiRD (on request; images from SA-Med2D-20M)",
    reported="Recall@0.5 of boxes, mBMR of interpretations and captions, referring accuracy; mean over modalities",
    questions=questions,
    score=score,
    figures=figures,
    in_form=in_the_models_form,
)
