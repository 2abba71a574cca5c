"""The evaluator of all benchmarks: answers in batches, kept as they come; scores; metrics with intervals; files.

After an evaluation the folder given as ``--out`` holds:

- ``evaluation.json``, ``predictions.jsonl``: metrics, and every answer with its scores (`umed_plugin.evaluation.results`);
- ``llava_med/answers.jsonl``, ``llava_med/test.json``: answers and truth as LLaVA-Med's scripts read them: ``python run_eval.py
  --gt llava_med/test.json --pred llava_med/answers.jsonl --candidate llava_med/candidate.json``. The last file holds the open
  answers of the training split, if there are any;
- ``settings.json``: what the answers depend on. After a crash the same command continues where the run stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from umed_plugin import __version__
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion
from umed_plugin.evaluation.benchmarks.llava_med_files import save_for_llava_med
from umed_plugin.evaluation.kept_answers import SETTINGS, KeptAnswers
from umed_plugin.evaluation.metrics.metric import measure
from umed_plugin.evaluation.questions import in_batches
from umed_plugin.evaluation.results import PREDICTIONS, Evaluation, Prediction, read_object, resampling_unit
from umed_plugin.grounding.dialects import LLAVA, BoxDialect
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import Answerer, AnswererSettings, Examine, ImageQuestion, ModelAnswer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EvaluationSettings:
    """How a checkpoint is asked.

    Attributes:
        base: checkpoint of a LoRA folder; None: as the adapter says.
        template: of the prompts; None: the benchmark's default for the checkpoint's family.
        device: ``cuda`` or ``cpu``; None: ``cuda`` (float16) if there is one, else ``cpu`` (float32).
        dialect: form in which the checkpoint writes boxes.
        batch_size: rows at a time: questions, or options of questions.
        max_new_tokens: longest answer; None: the benchmark's.
        image_cache: folder that keeps images decoded and resized (`umed_plugin.data.images.cache`).
        image_cache_gb: its maximum size, GB.
    """

    base: Path | str | None = None
    template: str | None = None
    device: str | None = None
    dialect: BoxDialect = LLAVA
    batch_size: int = 16
    max_new_tokens: int | None = None
    image_cache: Path | str | None = None
    image_cache_gb: float = 20.0


class AnswersQuestions(Protocol):
    """What `evaluate` needs of a model; `umed_plugin.model.answerer.Answerer` is one, of a LLaVA checkpoint.

    Attributes:
        template: of its prompts, for the record.
    """

    template: str

    def fingerprint(self) -> dict[str, Any]:
        """Everything that its answers depend on; JSON values."""

    def scorer(self, dialect: BoxDialect = LLAVA) -> Scorer:
        """How it sees images and writes boxes."""

    def answer(self, questions: Sequence[ImageQuestion], examine: Examine | None = None) -> list[ModelAnswer]:
        """Answer a batch. A model whose attention cannot be read ignores ``examine``."""


def evaluate(
    checkpoint: Path | str | AnswersQuestions,
    benchmark: Benchmark,
    questions: Sequence[BenchmarkQuestion],
    settings: EvaluationSettings | None = None,
    *,
    out: Path | str | None = None,
    skipped: int = 0,
    candidates: Sequence[str] = (),
    progress: Progress | None = None,
) -> Evaluation:
    """Ask a checkpoint the questions of a benchmark, greedily, score the answers and compute the metrics.

    Args:
        checkpoint: a full LLaVA checkpoint, a LoRA folder, or any object that answers (`AnswersQuestions`).
        benchmark: one of `umed_plugin.evaluation.benchmarks.catalogue.BENCHMARKS`, a recipe's, or your own.
        questions: from `umed_plugin.evaluation.questions.chosen_questions`, or `record_questions` for records.
        settings: how the checkpoint is asked; None: the defaults.
        out: folder for the files that the module's docstring lists; a killed run continues from them. None: nothing is written.
        skipped: number of questions that were left out, for the record.
        candidates: open answers of the training split, which LLaVA-Med's "open accuracy" chooses among.
        progress: called with (questions done, questions in all).

    Raises:
        UmedError: there are no questions, an image cannot be read, or ``out`` holds answers given under other settings.

    Example:
        A model that always says yes, on two questions of VQA-RAD's kind:

        >>> from umed_plugin.evaluation.benchmarks.vqa_rad import BENCHMARK as VQA_RAD
        >>> class SaysYes:
        ...     template = "none"
        ...     def fingerprint(self):
        ...         return {}
        ...     def scorer(self, dialect=LLAVA):
        ...         return Scorer(dialect=dialect)
        ...     def answer(self, questions, examine=None):
        ...         return [ModelAnswer("Yes.", []) for question in questions]
        >>> closed = {"answer_type": "CLOSED"}
        >>> questions = [
        ...     BenchmarkQuestion("1", "a.png", "Is there a fracture?", "yes", groups=closed),
        ...     BenchmarkQuestion("2", "b.png", "Is the heart enlarged?", "no", groups=closed),
        ... ]
        >>> evaluate(SaysYes(), VQA_RAD, questions).metrics["closed_accuracy"]
        {'value': 0.5, 'ci95': [0.0, 1.0], 'n': 2}
    """
    if not questions:
        raise UmedError("there is nothing to evaluate on: no questions. Is it the right --split?")
    settings = settings or EvaluationSettings()
    answerer = _answerer(checkpoint, benchmark, settings)
    scorer = answerer.scorer(settings.dialect)
    if benchmark.adapt is not None:
        questions = benchmark.adapt(questions, scorer)
    kept = None
    if out is not None:
        _refuse_older(Path(out) / SETTINGS)
        kept = KeptAnswers(out, PREDICTIONS, _what_answers_depend_on(benchmark, questions, answerer, settings))
    answers = ask(benchmark, questions, answerer, kept, batch_size=settings.batch_size, progress=progress)
    predictions = [predicted(benchmark, question, answers[question.id], scorer) for question in questions]
    rows = [prediction.row() for prediction in predictions]
    evaluation = Evaluation(
        benchmark.name,
        _name_of(checkpoint),
        answerer.template,
        predictions,
        measure(benchmark.metrics(rows), rows),
        resampling_unit([question.patient for question in questions]),
        asdict(scorer.dialect),
        skipped,
    )
    if out is not None:
        evaluation.save(out)
        folder = Path(out) / "llava_med"
        save_for_llava_med(evaluation.checkpoint, benchmark.name, questions, answers, candidates, folder)
    return evaluation


def _answerer(
    checkpoint: Path | str | AnswersQuestions, benchmark: Benchmark, settings: EvaluationSettings
) -> AnswersQuestions:
    if not isinstance(checkpoint, (Path, str)):
        return checkpoint
    answerer_settings = AnswererSettings(
        base=settings.base,
        template=settings.template,
        templates=benchmark.templates,
        device=settings.device,
        image_cache=settings.image_cache,
        image_cache_gb=settings.image_cache_gb,
        max_new_tokens=settings.max_new_tokens or benchmark.max_new_tokens,
    )
    return Answerer(checkpoint, answerer_settings)


def _name_of(checkpoint: Path | str | AnswersQuestions) -> str:
    return str(checkpoint) if isinstance(checkpoint, (Path, str)) else type(checkpoint).__name__


def _what_answers_depend_on(
    benchmark: Benchmark,
    questions: Sequence[BenchmarkQuestion],
    answerer: AnswersQuestions,
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """The settings under which kept answers may be used again. Scoring is not among them: it is done anew each time."""
    asked = [[q.id, Path(q.image).name, q.text, list(q.options), q.options_after, q.write] for q in questions]
    depends = {
        "benchmark": benchmark.name,
        **answerer.fingerprint(),
        "batch_size": settings.batch_size,
        "questions": _hash(asked),
    }
    if benchmark.examine is not None:
        # What a further pass finds depends on the code and on all that the questions are about, such as the true boxes.
        depends |= {"plugin": __version__, "about": _hash([q.about for q in questions])}
    return depends


def _refuse_older(file: Path) -> None:
    """Refuse a folder in which an earlier version has evaluated records: its lines lack what this one keeps."""
    if file.is_file() and "records" in read_object(file):
        raise UmedError(
            f"{file.parent}: holds an evaluation of records by an earlier version of umed-plugin, which this version reads and "
            "compares but does not continue. Give another --out, or remove that folder."
        )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


def ask(
    benchmark: Benchmark,
    questions: Sequence[BenchmarkQuestion],
    answerer: AnswersQuestions,
    kept: KeptAnswers | None,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, ModelAnswer]:
    """Answers by question id; those that are kept already are not asked for again.

    Args:
        kept: where answers are written as they come; None: nowhere.
        batch_size: rows at a time: questions, or options of questions.
        progress: called with (questions done, questions in all).
    """
    batches = in_batches(questions, batch_size)
    answers: dict[str, ModelAnswer] = {}
    if kept is not None:
        # A batch that is not whole is asked again, as it was the first time: answers may depend on it by rounding.
        whole = [batch for batch in batches if all(question.id in kept.lines for question in batch)]
        kept.keep_only(question.id for batch in whole for question in batch)
        answers = {
            identity: ModelAnswer(line["answer"], line["losses"], line.get("examined"))
            for identity, line in kept.lines.items()
        }
    for batch in batches:
        if batch[0].id not in answers:
            new = _ask_batch(benchmark, batch, answerer)
            answers.update({question.id: answer for question, answer in zip(batch, new)})
            if kept is not None:
                kept.add([_kept_line(*pair) for pair in zip(batch, new)])
        if progress is not None:
            progress(len(answers), len(questions))
    return answers


def _ask_batch(
    benchmark: Benchmark, batch: Sequence[BenchmarkQuestion], answerer: AnswersQuestions
) -> list[ModelAnswer]:
    questions = [ImageQuestion(q.image, q.text, q.options, q.options_after, q.write, q.reading) for q in batch]
    hook = benchmark.examine
    if hook is None:
        return answerer.answer(questions)

    def examine(written: Sequence[int], prompts: Any, answers: Any) -> list[dict[str, Any]]:
        return hook(answerer, [batch[index] for index in written], prompts, answers)

    return answerer.answer(questions, examine)


def _kept_line(question: BenchmarkQuestion, answer: ModelAnswer) -> dict[str, Any]:
    line = {
        "id": question.id,
        "image": question.image,
        "question": question.text or question.options_after,
        "answer": answer.text,
        "truth": question.truth,
        "options": list(question.options),
        "losses": answer.losses,
        "groups": dict(question.groups),
    }
    return line if answer.examined is None else {**line, "examined": answer.examined}


def predicted(benchmark: Benchmark, question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> Prediction:
    """One answer with its scores."""
    details: Mapping[str, Any] = {} if benchmark.details is None else benchmark.details(question, answer, scorer)
    return Prediction(
        **_kept_line(question, answer),
        values=benchmark.score(question, answer, scorer),
        cluster=question.cluster,
        details=details,
    )
