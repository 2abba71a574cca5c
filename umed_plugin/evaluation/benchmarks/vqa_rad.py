"""VQA-RAD (Lau et al. 2018): ``VQA_RAD Dataset Public.json`` and a folder of images.

The test split is the 451 questions whose ``phrase_type`` begins with ``test``. Its images are in the training part too: it tests
new questions, not new patients. Scores: `umed_plugin.evaluation.benchmarks.open_closed`.
"""

from __future__ import annotations

from pathlib import Path

from umed_plugin.evaluation.benchmarks.benchmark import (
    Benchmark,
    BenchmarkQuestion,
    existing_image,
    field_of,
    find_one,
)
from umed_plugin.evaluation.benchmarks.open_closed import (
    REPORTED,
    metrics,
    open_answers,
    question_of,
    read_records,
    score,
)


def questions(root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
    """The questions of the test or training part, in the file's order."""
    file = find_one(root, ["VQA_RAD Dataset Public.json", "*VQA_RAD*.json", "*.json"], "vqa_rad")
    folders = [file.parent / name for name in ("VQA_RAD Image Folder", "images", ".")]
    chosen = []
    for number, record in enumerate(read_records(file, "vqa_rad")):
        where = f"{file}[{number}]"
        if str(field_of(record, where, "phrase_type")).startswith("test") == (split == "test"):
            image = existing_image(folders, str(field_of(record, where, "image_name")))
            chosen.append(question_of(record, where, image))
    return chosen


def candidates(root: Path) -> list[str]:
    """The open answers of the training part."""
    return open_answers(questions(root, "train", root))


BENCHMARK = Benchmark(
    name="vqa_rad",
    title="VQA-RAD, 451 test questions about radiology images",
    needs="`VQA_RAD Dataset Public.json` and its image folder",
    url="https://osf.io/89kps/ (CC0)",
    reported=REPORTED,
    questions=questions,
    score=score,
    metrics=metrics,
    order=1,
    splits=("test", "train"),
    candidates=candidates,
)
