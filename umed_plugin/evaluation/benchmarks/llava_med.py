"""LLaVA-Med's own question files, for any data set: ``test.json``, or the ``.jsonl`` that its ``model_vqa.py`` takes.

``--benchmark FILE.jsonl`` takes a file as it is; ``--benchmark llava_med --data-root DIR`` finds one in a folder. A row of
``test.json`` has ``id``, ``image``, two ``conversations`` and ``answer_type``. A line of the ``.jsonl`` has ``question_id``,
``image``, ``text``, and in some files ``answer``, ``gt_answer`` or ``gpt4_answer``; answers that it lacks are looked up by id in
a ``test.json`` beside it. A row whose answer is empty is left out and named. Scores:
`umed_plugin.evaluation.benchmarks.open_closed`.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import (
    Benchmark,
    BenchmarkQuestion,
    check_whole,
    existing_image,
    field_of,
    find_one,
    numbered,
    questions_of_rows,
    read_records,
)
from umed_plugin.evaluation.benchmarks.open_closed import CLOSED, OPEN, REPORTED, metrics, score
from umed_plugin.evaluation.metrics.answers import words
from umed_plugin.files import parse_json

_ANSWERS = ("answer", "gt_answer", "gpt4_answer")


def questions(root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
    """The questions of the first file of the folder in one of the two forms."""
    return _of_file(find_one(root, ["test.json", "test.jsonl", "*test*.jsonl", "*.jsonl"], "llava_med"), root)


def is_question_file(name: str) -> bool:
    """Whether a benchmark's name is a file of LLaVA-Med's, and not a recipe or a JSON of this plugin's records."""
    file = Path(name)
    if file.suffix == ".jsonl":
        return True
    if file.suffix != ".json" or not file.is_file():
        return False
    try:
        rows = parse_json(file.read_text(encoding="utf-8-sig"))
    except ValueError:
        return False
    first = rows[0] if isinstance(rows, list) and rows else None
    return isinstance(first, dict) and {"conversations", "answer_type"} <= set(first) and "objects" not in first


def file_benchmark(name: str, data_root: Path | None) -> Benchmark:
    """The benchmark of one file; its images are looked for in ``data_root``, else beside it.

    Raises:
        UmedError: there is no such file.
    """
    file = Path(name)
    if not file.is_file():
        raise UmedError(f"{file}: no such file.")

    def of_this_file(_root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
        return _of_file(file, data_root or file.parent)

    return replace(BENCHMARK, questions=of_this_file)


def _of_file(file: Path, root: Path) -> list[BenchmarkQuestion]:
    rows = _lines(file) if file.suffix == ".jsonl" else read_records(file, "llava_med")
    truths = _truths(file.parent / "test.json") if file.suffix == ".jsonl" else {}
    folders = [root, root / "images", root / "VQA_RAD Image Folder", root / "imgs", file.parent, file.parent / "images"]
    make = partial(_question, folders=folders, truths=truths)
    return questions_of_rows(numbered(file, rows), make, "llava_med")


def _lines(file: Path) -> list[Any]:
    check_whole(file)
    rows = []
    for line in file.read_bytes().removeprefix(BOM_UTF8).split(b"\n"):
        if line.strip():
            try:
                rows.append(parse_json(line))
            except ValueError:
                rows.append(line.decode("utf-8", "replace"))  # told with the other odd rows
    return rows


def _truths(file: Path) -> dict[str, Mapping[str, Any]]:
    """The rows of a ``test.json`` by id; none without one."""
    if not file.is_file():
        return {}
    return {str(row["id"]): row for row in read_records(file, "llava_med") if isinstance(row, dict) and "id" in row}


def _question(
    row: Mapping[str, Any], where: str, *, folders: list[Path], truths: Mapping[str, Mapping[str, Any]]
) -> list[BenchmarkQuestion]:
    identity = str(field_of(row, where, "question_id", "id"))
    whole = {**truths.get(identity, {}), **row}
    turns = [turn["value"] for turn in whole.get("conversations", [])[:2]]
    asked = (
        str(whole.get("text") or whole.get("question") or (turns[0] if turns else "")).replace("<image>", "").strip()
    )
    answers = [whole[key] for key in _ANSWERS if whole.get(key) is not None] + turns[1:]
    if not asked or not answers:
        raise UmedError(
            f"{where}: has no {'question' if not asked else 'answer to compare with'}. Keys of an answer: {', '.join(_ANSWERS)}; "
            "or two conversations, in this file or by id in a test.json beside it."
        )
    truth = next((text for answer in answers if (text := _text_of_answer(answer))), None)
    if truth is None:
        raise UmedError(f"{where}: its answer is empty.")
    kind = str(whole.get("answer_type") or (CLOSED if words(truth) in (["yes"], ["no"]) else OPEN)).strip().upper()
    if kind not in (OPEN, CLOSED):
        raise UmedError(f"{where}: answer_type is {kind!r}; allowed: {OPEN}, {CLOSED}.")
    image = existing_image(folders, str(field_of(whole, where, "image")), where)
    return [BenchmarkQuestion(identity, image, asked, truth, groups={"answer_type": kind})]


def _text_of_answer(answer: Any) -> str:
    """The text of a reference answer; empty for one that holds nothing, or NaN."""
    return "" if answer != answer else str(answer).strip()


BENCHMARK = Benchmark(
    name="llava_med",
    title="LLaVA-Med's question files, also `--benchmark FILE.jsonl`",
    needs="`test.json` or a `.jsonl`, and its images",
    url="https://github.com/microsoft/LLaVA-Med",
    reported=REPORTED,
    questions=questions,
    score=score,
    metrics=metrics,
    order=8,
)
