"""SLAKE (Liu et al. 2021): ``{train,validate,test}.json`` and ``imgs/``; its English questions.

Some of its X-rays come from NIH ChestX-ray14. If you train on that data set, check it with ``umed recipe check ... --against
slake/imgs``. Scores: `umed_plugin.evaluation.benchmarks.open_closed`.
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

_FILES = {"test": "test.json", "val": "validate.json", "train": "train.json"}


def questions(root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
    """The English questions of a split, in the file's order."""
    file = find_one(root, [_FILES[split], f"*/{_FILES[split]}"], "slake")
    folders = [file.parent / "imgs", file.parent]
    return [
        question_of(record, f"{file}[{number}]", existing_image(folders, str(field_of(record, file.name, "img_name"))))
        for number, record in enumerate(read_records(file, "slake"))
        if record.get("q_lang", "en") == "en"
    ]


def candidates(root: Path) -> list[str]:
    """The open answers of the training split, if its file is there."""
    has_training = any(root.glob("train.json")) or any(root.glob("*/train.json"))
    return open_answers(questions(root, "train", root)) if has_training else []


BENCHMARK = Benchmark(
    name="slake",
    title="SLAKE, 1,061 English test questions",
    needs="`test.json` and `imgs/`",
    url="https://www.med-vqa.com/slake/ (CC BY 4.0)",
    reported=REPORTED,
    questions=questions,
    score=score,
    metrics=metrics,
    order=2,
    splits=("test", "val", "train"),
    candidates=candidates,
)
