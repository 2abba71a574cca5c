"""VQA-RAD (Lau et al. 2018): ``VQA_RAD Dataset Public.json`` and a folder of images.

The test split is the 451 questions whose ``phrase_type`` begins with ``test``. Its images are in the training part too: it tests
new questions, not new patients. Some answers are numbers, and some of the types end with a space; both are read. The JSON that
MEVF split into ``trainset.json`` and ``testset.json`` has 3,515 rows and no ``test`` in ``phrase_type``: it is another file.

Scores: `umed_plugin.evaluation.benchmarks.open_closed`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import (
    Benchmark,
    BenchmarkQuestion,
    existing_image,
    field_of,
    find_one,
    numbered,
    questions_of_rows,
    read_records,
    text_of,
)
from umed_plugin.evaluation.benchmarks.open_closed import (
    REPORTED,
    metrics,
    open_answers,
    question_of,
    score,
)


def questions(root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
    """The questions of the test or training part, in the file's order."""
    file = find_one(root, ["VQA_RAD Dataset Public.json", "*VQA_RAD*.json", "*.json"], "vqa_rad")
    folders = [file.parent / name for name in ("VQA_RAD Image Folder", "images", ".")]
    kinds: set[str] = set()

    def of_split(record: dict[str, Any], where: str) -> list[BenchmarkQuestion]:
        kinds.add(str(field_of(record, where, "phrase_type")))
        if str(record["phrase_type"]).startswith("test") != (split == "test"):
            return []
        return [question_of(record, where, existing_image(folders, text_of(record, where, "image_name"), where))]

    listed = questions_of_rows(numbered(file, read_records(file, "vqa_rad")), of_split, "vqa_rad")
    if not listed and split == "test":
        raise UmedError(
            f"{file}: no question is of the test split: none has a phrase_type that begins with 'test'. Found: "
            f"{', '.join(map(repr, sorted(kinds)[:8]))}. Is it VQA-RAD's own file? --split train takes the others."
        )
    return listed


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
