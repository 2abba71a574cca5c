"""Which questions of a benchmark are asked, and in which batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from umed_plugin.errors import UmedError, UsageError, unknown_name
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion
from umed_plugin.model.answerer import image_key

_MISSING_SHOWN = 5


def chosen_questions(
    benchmark: Benchmark,
    root: Path | None,
    *,
    split: str | None = None,
    limit: int | None = None,
    work: Path,
    skip: bool = False,
) -> tuple[list[BenchmarkQuestion], int]:
    """The questions to ask, with unique ids, and how many were left out because their image is missing or cannot be read.

    A recipe leaves images out before it has questions, and before ``limit``. Each counts as one question.

    Args:
        root: folder of the benchmark's files; None for a recipe, which knows its own.
        split: one of the benchmark's; None: its first.
        limit: at most this many of each part.
        work: folder for images that must be written.
        skip: leave out questions whose image is missing, instead of stopping.

    Raises:
        UmedError: there are none, or images are missing.
    """
    split = split or benchmark.splits[0]
    if split not in benchmark.splits:
        raise UsageError(unknown_name(f"split of {benchmark.name}", split, benchmark.splits))
    if root is not None and not root.is_dir():
        origin = f" ({benchmark.url})" if benchmark.url else ""
        raise UmedError(f"{root}: no such folder. --data-root is the folder with {benchmark.needs}{origin}.")
    questions = _first_of_parts(_unique(benchmark.questions(root or work, split, work)), limit)
    if benchmark.prepare is not None:
        benchmark.prepare(questions)
    present = [question for question in questions if Path(question.image).exists()]
    if len(present) < len(questions) and not skip:
        raise UmedError(_missing_images(benchmark, questions))
    if not present:
        prefix = f"{root}: " if root else ""
        if questions:
            raise UmedError(f"nothing is left to ask: {_missing_images(benchmark, questions)}")
        raise UmedError(
            f"{prefix}there is nothing to evaluate on: no questions of {benchmark.name} in split {split!r}. "
            f"Is it the right --split? Splits: {', '.join(benchmark.splits)}."
        )
    left_out = benchmark.left_out() if benchmark.left_out is not None else 0
    return present, len(questions) - len(present) + left_out


def _missing_images(benchmark: Benchmark, questions: Sequence[BenchmarkQuestion]) -> str:
    about_missing = [question.image for question in questions if not Path(question.image).exists()]
    images = list(dict.fromkeys(about_missing))
    return (
        f"{len(images)} images of {benchmark.name} are missing, with {len(about_missing)} of {len(questions)} questions: "
        f"{', '.join(images[:_MISSING_SHOWN])}{' ...' if len(images) > _MISSING_SHOWN else ''}\n"
        "Get them, or leave these questions out with --on-bad-image skip."
    )


def _unique(questions: Sequence[BenchmarkQuestion]) -> list[BenchmarkQuestion]:
    """The questions; an id that returns gets the next number with which no other question is called."""
    taken = {question.id for question in questions}
    numbers: dict[str, int] = {}
    result = []
    for question in questions:
        if question.id in numbers:
            identity, number = question.id, numbers[question.id] + 1
            while f"{identity}#{number}" in taken:
                number += 1
            numbers[identity] = number
            question = replace(question, id=f"{identity}#{number}")
            taken.add(question.id)
        else:
            numbers[question.id] = 1
        result.append(question)
    return result


def _first_of_parts(questions: Sequence[BenchmarkQuestion], limit: int | None) -> list[BenchmarkQuestion]:
    taken: Counter[str] = Counter()
    result = []
    for question in questions:
        part = question.groups.get("part", "")
        taken[part] += 1
        if limit is None or taken[part] <= limit:
            result.append(question)
    return result


def in_batches(questions: Sequence[BenchmarkQuestion], batch_size: int) -> list[list[BenchmarkQuestion]]:
    """Batches of at most ``batch_size`` rows; questions about one image are in one batch, unless they are more than that.

    Slices of one volume are different images: they share no computation.
    """
    of_image: dict[tuple[str, str], list[BenchmarkQuestion]] = {}
    for question in questions:
        of_image.setdefault(image_key(question.image, question.reading), []).append(question)
    batches: list[list[BenchmarkQuestion]] = []
    room = 0
    for group in of_image.values():
        if sum(map(_rows, group)) > room:
            room = 0  # encoding the image twice costs more than a batch that is not full
        for question in group:
            if _rows(question) > room:
                batches.append([])
                room = batch_size
            batches[-1].append(question)
            room -= _rows(question)
    return batches


def _rows(question: BenchmarkQuestion) -> int:
    return max(1, len(question.options))
