"""SLAKE (Liu et al. 2021): ``{train,validate,test}.json`` and ``imgs/``; its English questions.

One row of ``train.json`` (``qid`` 1622) has an empty answer; it is left out and named.

Some of its X-rays come from NIH ChestX-ray14. If you train on that data set, check it with ``umed recipe check ... --against
slake/imgs``. Scores: `umed_plugin.evaluation.benchmarks.open_closed`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import (
    Benchmark,
    BenchmarkQuestion,
    existing_image,
    files_matching,
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

_FILES = {"test": "test.json", "val": "validate.json", "train": "train.json"}


def questions(root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
    """The English questions of a split, in the file's order."""
    file = find_one(root, [_FILES[split], f"*/{_FILES[split]}"], "slake")
    folders = [file.parent / "imgs", file.parent]
    records = read_records(file, "slake")

    def in_english(record: dict[str, Any], where: str) -> list[BenchmarkQuestion]:
        if record.get("q_lang", "en") != "en":
            return []
        return [question_of(record, where, existing_image(folders, text_of(record, where, "img_name"), where))]

    listed = questions_of_rows(numbered(file, records), in_english, "slake")
    if not listed:
        raise UmedError(f"{file}: none of its {len(records)} questions is in English (q_lang 'en').")
    return listed


def candidates(root: Path) -> list[str]:
    """The open answers of the training split, if its file is there."""
    has_training = bool(files_matching(root, "train.json", "*/train.json"))
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
