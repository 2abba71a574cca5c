"""One process's part of an evaluation: the checkpoint, its share of the questions, the scores, and the files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from umed_plugin import files
from umed_plugin.data.shards import Shard
from umed_plugin.errors import UmedError, note
from umed_plugin.evaluation.asking import AnswersQuestions, Progress, answers_of, ask, kept_line
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion
from umed_plugin.evaluation.benchmarks.llava_med_files import save_for_llava_med
from umed_plugin.evaluation.constants import best_constants
from umed_plugin.evaluation.kept_answers import SETTINGS, KeptAnswers
from umed_plugin.evaluation.metrics.metric import measure
from umed_plugin.evaluation.results import PREDICTIONS, Evaluation, Prediction, resampling_unit
from umed_plugin.evaluation.similar_cases import SimilarCases
from umed_plugin.evaluation.what_was_asked import CHANGES, what_answers_depend_on
from umed_plugin.grounding.dialects import LLAVA, BoxDialect
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import Answerer, AnswererSettings, ModelAnswer
from umed_plugin.remote.rollout_server import RolloutServer
from umed_plugin.remote.settings import ROLLOUT_MAX_DIFFERENCE

_POLL = 0.5  # seconds between looks at the answers of other processes
_SAY_EVERY = 30.0  # seconds


@dataclass(frozen=True)
class EvaluationSettings:
    """How a checkpoint is asked.

    Attributes:
        base: checkpoint of a LoRA folder; None: as the adapter says.
        template: of the prompts; None: the benchmark's default for the checkpoint's family.
        device: ``cuda`` or ``cpu``; None: ``cuda`` if there is one, else ``cpu``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None: float16 on a GPU; on a CPU float32, or bfloat16 if memory is short.
        dialect: form in which the checkpoint writes boxes.
        batch_size: rows at a time: questions, or options of questions.
        max_new_tokens: longest answer; None: the benchmark's.
        image_cache: folder that keeps images decoded and resized (`umed_plugin.data.images.cache`).
        image_cache_gb: its maximum size, GB.
        on_bad_image: ``stop`` at missing images, or ``skip`` them; for recipes also at unreadable ones.
        server: rollout server that writes the answers; None: this process does.
        server_adapters: folder where the server reads the adapter of a LoRA folder; None: a temporary one.
        server_max_difference: largest mean distance of the server's log-probabilities from those here, in nats a token.
        give_box: of a recipe: give the true boxes in the question, and judge the diagnosis alone.
        pseudo_boxes: measure records against pseudo-boxes too, which no person drew.
        similar: what is said before each question of similar training studies; None: nothing.
        report_as: how ``report:`` treats texts, ``r2gen`` or ``r2gen:LEAST,MOST``; None: as they are.
        report_scores: CSV of further scores of reports, by question id.
    """

    base: Path | str | None = None
    template: str | None = None
    device: str | None = None
    dtype: str | None = None
    dialect: BoxDialect = LLAVA
    batch_size: int = 16
    max_new_tokens: int | None = None
    image_cache: Path | str | None = None
    image_cache_gb: float = 20.0
    on_bad_image: str = "stop"
    server: RolloutServer | None = None
    server_adapters: Path | None = None
    server_max_difference: float = ROLLOUT_MAX_DIFFERENCE
    give_box: bool = False
    pseudo_boxes: bool = False
    similar: SimilarCases | None = None
    report_as: str | None = None
    report_scores: Path | None = None


class EvaluationRun:
    """One process's part of an evaluation: it loads the checkpoint, asks its share of the questions, and scores all answers.

    Args:
        checkpoint, benchmark, questions, settings, out: as for `evaluate_questions`.
        shard: the share of this process; None: it asks all questions.
        chosen_by: how the questions were chosen, such as ``limit``; JSON values. A message names them where they differ.

    Raises:
        UmedError: there are no questions, or ``out`` holds answers given under other settings.
    """

    def __init__(
        self,
        checkpoint: Path | str | AnswersQuestions,
        benchmark: Benchmark,
        questions: Sequence[BenchmarkQuestion],
        settings: EvaluationSettings,
        out: Path | str | None,
        shard: Shard | None = None,
        chosen_by: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        if not questions:
            raise UmedError("there is nothing to evaluate on: no questions. Is it the right --split?")
        self._name, self._benchmark, self._settings = _name_of(checkpoint), benchmark, settings
        self._out = None if out is None else Path(out)
        self._answerer = _answerer(checkpoint, benchmark, settings)
        self._scorer = self._answerer.scorer(settings.dialect)
        self._questions = questions if benchmark.adapt is None else benchmark.adapt(questions, self._scorer)
        if settings.similar is not None:
            self._questions = settings.similar.before(self._questions, self._answerer)
        self._kept: KeptAnswers | None = None
        if self._out is not None:
            _refuse_older(self._out / SETTINGS)
            depends = {
                "benchmark": benchmark.name,
                **self._answerer.fingerprint(),
                "batch_size": settings.batch_size,
                **what_answers_depend_on(benchmark, self._questions, chosen_by, self._out),
            }
            self._kept = KeptAnswers(self._out, PREDICTIONS, depends, shard=shard, changes=CHANGES)

    def ask(self, progress: Progress | None, *, wait: bool = True) -> dict[str, ModelAnswer] | None:
        """All answers by question id; None if those of other processes are missing, and nobody waits for them."""
        answers = ask(
            self._benchmark,
            self._questions,
            self._answerer,
            self._kept,
            batch_size=self._settings.batch_size,
            progress=progress,
            checkpoint=self._name,
        )
        if self._kept is None or self._kept.shard is None:
            return answers
        asked, said = {question.id for question in self._questions}, time.monotonic()
        while missing := asked - set(answers):
            others = self._kept.of_others().items()
            found = {name: line for name, line in others if name in missing}
            answers.update(answers_of(self._kept.path, found, self._name))
            left = len(asked - set(answers))
            if progress is not None:
                progress(len(answers), len(asked))
            if left and not wait:
                return None
            if left and time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                note(f"waiting for other processes: {left} of {len(asked)} questions are not answered yet.")
            time.sleep(_POLL if left else 0)
        return answers

    def evaluation(self, answers: Mapping[str, ModelAnswer], skipped: int, candidates: Sequence[str]) -> Evaluation:
        """Score all answers, and write the files of ``out``."""
        predictions = [predicted(self._benchmark, q, answers[q.id], self._scorer) for q in self._questions]
        rows = [prediction.row() for prediction in predictions]
        evaluation = Evaluation(
            self._benchmark.name,
            self._name,
            self._answerer.template,
            predictions,
            measure(self._benchmark.metrics(rows), rows),
            resampling_unit([question.patient for question in self._questions]),
            asdict(self._scorer.dialect),
            skipped,
            best_constants(self._benchmark, self._questions, self._scorer),
            self._benchmark.treatment,
        )
        if self._out is not None and self._kept is not None:
            evaluation.save(self._out)
            self._kept.remove_shards()
            folder = self._out / "llava_med"
            save_for_llava_med(
                evaluation.checkpoint, self._benchmark.name, self._questions, answers, candidates, folder
            )
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
        dtype=settings.dtype,
        image_cache=settings.image_cache,
        image_cache_gb=settings.image_cache_gb,
        max_new_tokens=settings.max_new_tokens or benchmark.max_new_tokens,
        server=settings.server,
        server_adapters=settings.server_adapters,
        server_max_difference=settings.server_max_difference,
    )
    return Answerer(checkpoint, answerer_settings)


def _name_of(checkpoint: Path | str | AnswersQuestions) -> str:
    return str(checkpoint) if isinstance(checkpoint, (Path, str)) else type(checkpoint).__name__


def _refuse_older(file: Path) -> None:
    """Refuse a folder in which an earlier version has evaluated records: its lines lack what this one keeps."""
    if file.is_file() and "records" in files.read_object(file):
        raise UmedError(
            f"{file.parent}: holds an evaluation of records by an earlier version of umed-plugin, which this version reads and "
            "compares but does not continue. Remove that folder to evaluate again; `umed evaluate` also takes another --out."
        )


def predicted(benchmark: Benchmark, question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> Prediction:
    """One answer with its scores."""
    details: Mapping[str, Any] = {} if benchmark.details is None else benchmark.details(question, answer, scorer)
    return Prediction(
        **kept_line(question, answer),
        values=benchmark.score(question, answer, scorer),
        cluster=question.cluster,
        details=details,
    )
