"""A benchmark asked of a checkpoint: batches, answers kept as they come, scores, figures, files.

What ``--out`` holds afterwards:

- ``evaluation.json``: the figures, each with its value, n and 95 % interval;
- ``predictions.jsonl``: one question a line, with answer, likelihoods of options, truth and scores;
- ``llava_med/answers.jsonl``: the same answers as LLaVA-Med's scripts read them, and ``llava_med/test.json``, the truth in their
  form: ``python run_eval.py --gt llava_med/test.json --pred llava_med/answers.jsonl --candidate llava_med/candidate.json``, the
  last being the training split's open answers where there are any;
- ``settings.json``: what the answers depend on. The same command goes on where a killed one stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError, UsageError, unknown_name
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, Question
from umed_plugin.evaluation.benchmarks.llava_med_files import save_for_llava_med
from umed_plugin.evaluation.kept_answers import KeptAnswers
from umed_plugin.evaluation.metrics.figures import Row, compare_rows, measure
from umed_plugin.files import write_json, write_text
from umed_plugin.grounding.dialects import LLAVA, BoxDialect
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import Answerer, AnswererSettings, ImageQuestion, ModelAnswer

PREDICTIONS = "predictions.jsonl"
_MISSING_SHOWN = 5


@dataclass(frozen=True)
class Run:
    """A benchmark that was asked and scored."""

    benchmark: Benchmark
    checkpoint: str
    template: str
    rows: list[Row]
    figures: dict[str, dict[str, Any]]
    skipped: int


def chosen_questions(
    benchmark: Benchmark,
    root: Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    work: Path,
    skip: bool = False,
) -> tuple[list[Question], int]:
    """The questions to ask, with ids that are unique, and how many were left out because their image is missing.

    Args:
        root: folder of the benchmark's files.
        split: of the benchmark's; None: its first.
        limit: only so many of each part.
        work: folder for images that must be written.
        skip: leave out questions whose image is missing, instead of stopping.

    Raises:
        UmedError: there are none, or images are missing.
    """
    split = split or benchmark.splits[0]
    if split not in benchmark.splits:
        raise UsageError(unknown_name(f"split of {benchmark.name}", split, benchmark.splits))
    if not root.is_dir():
        raise UmedError(f"{root}: no such folder. --data-root is the folder with {benchmark.needs} ({benchmark.url}).")
    questions = _first_of_parts(_unique(benchmark.questions(root, split, work)), limit)
    if benchmark.prepare is not None:
        benchmark.prepare(questions)
    missing = [question for question in questions if not Path(question.image).exists()]
    if missing and not skip:
        named = list(dict.fromkeys(question.image for question in missing))
        raise UmedError(
            f"{len(named)} images of {benchmark.name} are missing, {len(missing)} questions of {len(questions)} are about them: "
            f"{', '.join(named[:_MISSING_SHOWN])}{' ...' if len(named) > _MISSING_SHOWN else ''}\n"
            "Get them, or leave these questions out with --on-bad-image skip."
        )
    there = [question for question in questions if Path(question.image).exists()]
    if not there:
        raise UmedError(f"{root}: no questions of {benchmark.name} in split {split!r} whose image is there.")
    return there, len(missing)


def _unique(questions: Sequence[Question]) -> list[Question]:
    seen: Counter[str] = Counter()
    result = []
    for question in questions:
        seen[question.id] += 1
        again = seen[question.id]
        result.append(question if again == 1 else replace(question, id=f"{question.id}#{again}"))
    return result


def _first_of_parts(questions: Sequence[Question], limit: int | None) -> list[Question]:
    taken: Counter[str] = Counter()
    result = []
    for question in questions:
        part = question.groups.get("part", "")
        taken[part] += 1
        if limit is None or taken[part] <= limit:
            result.append(question)
    return result


def ask(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answerer: Answerer,
    kept: KeptAnswers | None,
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, ModelAnswer]:
    """Answers by question id; those that are kept already are not asked again.

    Args:
        kept: where answers are written as they come; None: nowhere.
        batch_size: rows at a time: questions, or options of theirs.
        progress: called with (questions done, questions in all).
    """
    batches = _batches(questions, batch_size)
    answers: dict[str, ModelAnswer] = {}
    if kept is not None:
        whole = [batch for batch in batches if all(question.id in kept.lines for question in batch)]
        kept.keep_only(question.id for batch in whole for question in batch)
        answers = {one: ModelAnswer(line["answer"], line["losses"]) for one, line in kept.lines.items()}
    for batch in batches:
        if batch[0].id not in answers:
            asks = [ImageQuestion(q.image, q.text, q.options, q.options_after, q.write) for q in batch]
            found = answerer.answer(asks)
            answers.update({question.id: answer for question, answer in zip(batch, found)})
            if kept is not None:
                kept.add([_line(*pair) for pair in zip(batch, found)])
        if progress is not None:
            progress(len(answers), len(questions))
    return answers


def _line(question: Question, answer: ModelAnswer) -> dict[str, Any]:
    return {
        "id": question.id,
        "image": question.image,
        "question": question.text or question.options_after,
        "answer": answer.text,
        "truth": question.truth,
        "options": list(question.options),
        "losses": answer.losses,
        "groups": dict(question.groups),
    }


def _batches(questions: Sequence[Question], batch_size: int) -> list[list[Question]]:
    """Batches of ``batch_size`` rows at most; the questions about one image stand in one, unless they are more than that."""
    of_image: dict[str, list[Question]] = {}
    for question in questions:
        of_image.setdefault(question.image, []).append(question)
    batches: list[list[Question]] = []
    room = 0
    for group in of_image.values():
        together = sum(map(_rows, group))
        if together > room:
            room = 0  # computing the image anew costs more than a batch that is not full
        for question in group:
            if _rows(question) > room:
                batches.append([])
                room = batch_size
            batches[-1].append(question)
            room -= _rows(question)
    return batches


def _rows(question: Question) -> int:
    return max(1, len(question.options))


def evaluate_benchmark(
    checkpoint: Path,
    benchmark: Benchmark,
    questions: Sequence[Question],
    *,
    out: Path | None = None,
    base: Path | None = None,
    template: str | None = None,
    device: str | None = None,
    dialect: BoxDialect = LLAVA,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    image_cache: Path | None = None,
    image_cache_gb: float = 20.0,
    skipped: int = 0,
    candidates: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Run:
    """Ask a checkpoint the questions of a benchmark, score them, and write what the module's docstring lists into ``out``.

    Args:
        questions: from `chosen_questions`.
        dialect: in which the checkpoint writes boxes.
        batch_size: rows at a time: questions, or options of theirs.
        max_new_tokens: longest answer; None: the benchmark's.
        skipped: how many questions were left out, for the record.
        candidates: open answers of the training split, which LLaVA-Med's "open accuracy" chooses among.
        progress: called with (questions done, questions in all).
    """
    limit = max_new_tokens or benchmark.max_new_tokens
    how = AnswererSettings(
        base=base,
        template=template,
        device=device,
        image_cache=image_cache,
        image_cache_gb=image_cache_gb,
        max_new_tokens=limit,
    )
    answerer = Answerer(checkpoint, how)
    scorer = answerer.scorer(dialect)
    if benchmark.in_form is not None:
        questions = benchmark.in_form(questions, scorer)
    settings = {
        "benchmark": benchmark.name,
        **answerer.fingerprint(),
        "batch_size": batch_size,
        "questions": _hash_of(questions),
    }
    kept = None if out is None else KeptAnswers(out, PREDICTIONS, settings)
    answers = ask(benchmark, questions, answerer, kept, batch_size=batch_size, progress=progress)
    rows = [scored(benchmark, question, answers[question.id], scorer) for question in questions]
    figures = measure(benchmark.figures(rows), rows)
    run = Run(benchmark, str(checkpoint), answerer.template, rows, figures, skipped)
    if out is not None:
        _save(run, questions, answers, scorer, out)
        save_for_llava_med(run.checkpoint, benchmark.name, questions, answers, candidates, out / "llava_med")
    return run


def scored(benchmark: Benchmark, question: Question, answer: ModelAnswer, scorer: Scorer) -> Row:
    """One answer as a row of numbers; what is drawn for intervals is its image."""
    return Row(question.id, question.image, benchmark.score(question, answer, scorer), dict(question.groups))


def _hash_of(questions: Sequence[Question]) -> str:
    # Not the scoring: a better score of the same answers needs no new answers.
    asked = [[q.id, Path(q.image).name, q.text, list(q.options), q.options_after, q.write] for q in questions]
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()[:16]


def _save(
    run: Run, questions: Sequence[Question], answers: Mapping[str, ModelAnswer], scorer: Scorer, out: Path
) -> None:
    lines = [
        {**_line(question, answers[question.id]), "cluster": row.cluster, "values": dict(row.values)}
        for question, row in zip(questions, run.rows)
    ]
    write_text(out / PREDICTIONS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    summary = {
        "benchmark": run.benchmark.name,
        "checkpoint": run.checkpoint,
        "template": run.template,
        "boxes": asdict(scorer.dialect),
        "n": len(run.rows),
        "images": len({row.cluster for row in run.rows}),
        "skipped": run.skipped,
        "figures": run.figures,
    }
    write_json(out / "evaluation.json", summary)


def read_run(folder: Path) -> tuple[str, list[Row]]:
    """The benchmark's name and the scored questions of a finished evaluation.

    Raises:
        UmedError: the folder holds none.
    """
    summary, predictions = folder / "evaluation.json", folder / PREDICTIONS
    if not summary.is_file() or not predictions.is_file():
        raise UmedError(
            f"{folder}: no finished evaluation. Needed: evaluation.json and {PREDICTIONS}, as --out writes them."
        )
    lines = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    if any("values" not in line for line in lines):
        raise UmedError(f"{predictions}: answers that were not scored. Was the evaluation stopped? Run it again.")
    rows = [Row(line["id"], line["cluster"], line["values"], line["groups"]) for line in lines]
    return str(json.loads(summary.read_text(encoding="utf-8"))["benchmark"]), rows


def compare_runs(benchmark: Benchmark, before: Sequence[Row], after: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Paired differences ``after - before`` of all figures, each with its interval."""
    return compare_rows(benchmark.figures(after), before, after)
