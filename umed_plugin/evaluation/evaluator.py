"""The evaluator of all benchmarks: answers in batches, kept as they come; scores; metrics with intervals; files.

After an evaluation the folder given as ``--out`` holds:

- ``evaluation.json``, ``predictions.jsonl``: metrics, and every answer with its scores (`umed_plugin.evaluation.results`);
- ``llava_med/answers.jsonl``, ``llava_med/test.json``: answers and truth as LLaVA-Med's scripts read them: ``python run_eval.py
  --gt llava_med/test.json --pred llava_med/answers.jsonl --candidate llava_med/candidate.json``. The last file holds the open
  answers of the training split, if there are any;
- ``settings.json``: what the answers depend on. After a crash the same command continues where the run stopped.

Several processes may share one evaluation, by a folder that all of them see (`evaluate_shard`).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from umed_plugin import __version__
from umed_plugin.checkpoints.loading import find_base, is_lora, read_config
from umed_plugin.data.shards import Shard
from umed_plugin.errors import UmedError, UsageError, note, unknown_name
from umed_plugin.evaluation.asking import AnswersQuestions, Progress, answer_of, ask, kept_line
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion
from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS
from umed_plugin.evaluation.benchmarks.llava_med import file_benchmark, is_question_file
from umed_plugin.evaluation.benchmarks.llava_med_files import save_for_llava_med
from umed_plugin.evaluation.benchmarks.recipe import recipe_benchmark
from umed_plugin.evaluation.kept_answers import SETTINGS, KeptAnswers
from umed_plugin.evaluation.metrics.metric import measure
from umed_plugin.evaluation.questions import chosen_questions
from umed_plugin.evaluation.results import PREDICTIONS, Evaluation, Prediction, read_object, resampling_unit
from umed_plugin.grounding.dialects import LLAVA, BoxDialect
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import Answerer, AnswererSettings, ModelAnswer

_POLL = 0.5  # seconds between looks at the answers of other processes
_SAY_EVERY = 30.0  # seconds


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
        on_bad_image: ``stop`` at missing images, or ``skip`` them; for recipes also at unreadable ones.
    """

    base: Path | str | None = None
    template: str | None = None
    device: str | None = None
    dialect: BoxDialect = LLAVA
    batch_size: int = 16
    max_new_tokens: int | None = None
    image_cache: Path | str | None = None
    image_cache_gb: float = 20.0
    on_bad_image: str = "stop"


def evaluate(
    checkpoint: Path | str | AnswersQuestions,
    benchmark: Path | str,
    data_root: Path | str | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    out: Path | str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Evaluation:
    """Ask a checkpoint the questions of a benchmark, greedily, score the answers and compute the metrics.

    Args:
        checkpoint: a full LLaVA checkpoint, a LoRA folder, or any object with the methods of `AnswersQuestions`.
        benchmark: name of a benchmark, name or YAML of a recipe, or a JSON of records.
        data_root: folder of its files; None: as the recipe says.
        split: ``test``, ``val`` or ``train``; None: ``test``.
        limit: at most this many questions of each part of the benchmark.
        out: folder for the files that docs/evaluation.md lists; a killed run continues from them. None: nothing is written.
        progress: called with (questions done, questions in all).
        settings: fields of `EvaluationSettings`, such as ``batch_size``.

    Raises:
        UmedError: the benchmark is unknown or its files are missing, an image cannot be read, or ``out`` holds answers given
            under other settings.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from umed_plugin import evaluate
        >>> from umed_plugin.grounding.scoring import Scorer
        >>> from umed_plugin.model.answerer import ModelAnswer
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("L", (64, 64)).save(folder / "xray.png")
        >>> closed = {"img_name": "xray.png", "answer_type": "CLOSED"}
        >>> questions = [
        ...     {"qid": 1, "question": "Is there a fracture?", "answer": "Yes", **closed},
        ...     {"qid": 2, "question": "Is the heart enlarged?", "answer": "No", **closed},
        ... ]
        >>> size = (folder / "test.json").write_text(json.dumps(questions))
        >>> class SaysYes:  # in place of a checkpoint
        ...     template = "none"
        ...     def fingerprint(self):
        ...         return {}
        ...     def scorer(self, dialect=None):
        ...         return Scorer()
        ...     def answer(self, questions, examine=None):
        ...         return [ModelAnswer("Yes.", []) for question in questions]
        >>> evaluate(SaysYes(), "slake", folder).metrics["closed_accuracy"]
        {'value': 0.5, 'ci95': [0.5, 0.5], 'n': 2}
    """
    evaluation = _evaluate(checkpoint, benchmark, data_root, None, split, limit, out, progress, settings)
    assert evaluation is not None, "only a shard can end before the evaluation does"
    return evaluation


def evaluate_shard(
    checkpoint: Path | str | AnswersQuestions,
    benchmark: Path | str,
    data_root: Path | str | None = None,
    *,
    shard: Shard,
    out: Path | str,
    wait: bool = False,
    split: str | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Evaluation | None:
    """`evaluate` by several processes: each answers its share, and whoever finds all answers there computes the metrics.

    The questions are put into the same batches however many processes there are, so answers and metrics are those of a single
    process to the last digit. A process that was killed is started again with the same command.

    Args:
        checkpoint, benchmark, data_root, split, limit, settings: as for `evaluate`; the same in all processes.
        shard: the share of this process.
        out: folder that all processes see.
        wait: wait for the answers of the others, instead of returning without an evaluation.
        progress: called with (questions answered or found, questions in all).

    Returns:
        The evaluation; None while other processes still have to answer.

    Raises:
        UmedError: as for `evaluate`.
    """
    shared = (shard, wait)
    return _evaluate(checkpoint, benchmark, data_root, shared, split, limit, out, progress, settings)


def _evaluate(
    checkpoint: Path | str | AnswersQuestions,
    benchmark: Path | str,
    data_root: Path | str | None,
    shared: tuple[Shard, bool] | None,
    split: str | None,
    limit: int | None,
    out: Path | str | None,
    progress: Progress | None,
    settings: dict[str, Any],
) -> Evaluation | None:
    chosen = EvaluationSettings(**settings)
    root = None if data_root is None else Path(data_root)
    asked = _benchmark_of(str(benchmark), checkpoint, root, chosen)
    with tempfile.TemporaryDirectory(prefix="umed-evaluate-") as temporary:
        questions, skipped = chosen_questions(
            asked,
            root if asked.name in BENCHMARKS else None,
            split=split,
            limit=limit,
            work=Path(out or temporary) / "data",
            skip=chosen.on_bad_image == "skip",
        )
        candidates = asked.candidates(root) if asked.candidates and root else ()
        run = _Run(checkpoint, asked, questions, chosen, out, None if shared is None else shared[0])
        answers = run.ask(progress, wait=shared is None or shared[1])
        return None if answers is None else run.evaluation(answers, skipped, candidates)


def _benchmark_of(
    name: str, checkpoint: Path | str | AnswersQuestions, root: Path | None, settings: EvaluationSettings
) -> Benchmark:
    """A named benchmark, or that of a recipe, whose records are built as the checkpoint sees images."""
    if name in BENCHMARKS:
        named = BENCHMARKS[name]
        if root is None:
            raise UsageError(f"--benchmark {name} needs --data-root: {named.needs}, from {named.url}")
        return named
    check_benchmark(name)
    if is_question_file(name):
        return file_benchmark(name, root)
    return recipe_benchmark(
        name,
        data_root=root,
        image_aspect_ratio=_aspect_ratio(checkpoint, settings),
        on_bad_image=settings.on_bad_image,
        # Files rendered into a temporary folder would have a new path each time: the cache would never find them again.
        render=settings.image_cache is None,
    )


def check_benchmark(name: str) -> None:
    """Refuse a name that is neither a benchmark's, a recipe's nor a file's, before a checkpoint or another evaluation is read.

    Raises:
        UsageError: there is no benchmark of that name.
    """
    from umed_plugin.data.recipes.recipe import shipped_recipes

    is_file = Path(name).is_file() or Path(name).suffix in (".json", ".jsonl", ".yaml", ".yml")
    known = {*BENCHMARKS, *shipped_recipes()}
    if not is_file and name not in known:
        raise UsageError(
            unknown_name("benchmark", name, known) + " Or a recipe's YAML, a JSON of records, or LLaVA-Med's .jsonl."
        )


def _aspect_ratio(checkpoint: Path | str | AnswersQuestions, settings: EvaluationSettings) -> str:
    if not isinstance(checkpoint, (Path, str)):
        return checkpoint.scorer().mode
    folder = Path(checkpoint)
    folder = find_base(folder, settings.base) if is_lora(folder) else folder
    return "pad" if read_config(folder).get("image_aspect_ratio") == "pad" else "square"


def evaluate_questions(
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
    """`evaluate` for questions that are at hand.

    Args:
        checkpoint: as for `evaluate`.
        benchmark: one of `umed_plugin.evaluation.benchmarks.catalogue.BENCHMARKS`, a recipe's, or your own.
        questions: from `umed_plugin.evaluation.questions.chosen_questions`, or `record_questions` for records.
        settings: how the checkpoint is asked; None: the defaults.
        out: as for `evaluate`.
        skipped: number of questions that were left out, for the record.
        candidates: open answers of the training split, which LLaVA-Med's "open accuracy" chooses among.
        progress: called with (questions done, questions in all).

    Raises:
        UmedError: there are no questions, an image cannot be read, or ``out`` holds answers given under other settings.
    """
    run = _Run(checkpoint, benchmark, questions, settings or EvaluationSettings(), out)
    answers = run.ask(progress)
    assert answers is not None, "only a shard can end before the evaluation does"
    return run.evaluation(answers, skipped, candidates)


class _Run:
    """One process's part of an evaluation: it loads the checkpoint, asks its share of the questions, and scores all answers.

    Args:
        checkpoint, benchmark, questions, settings, out: as for `evaluate_questions`.
        shard: the share of this process; None: it asks all questions.

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
    ) -> None:
        if not questions:
            raise UmedError("there is nothing to evaluate on: no questions. Is it the right --split?")
        self._name, self._benchmark, self._settings = _name_of(checkpoint), benchmark, settings
        self._out = None if out is None else Path(out)
        self._answerer = _answerer(checkpoint, benchmark, settings)
        self._scorer = self._answerer.scorer(settings.dialect)
        self._questions = questions if benchmark.adapt is None else benchmark.adapt(questions, self._scorer)
        self._kept: KeptAnswers | None = None
        if self._out is not None:
            _refuse_older(self._out / SETTINGS)
            depends = _what_answers_depend_on(benchmark, self._questions, self._answerer, settings)
            self._kept = KeptAnswers(self._out, PREDICTIONS, depends, shard=shard)

    def ask(self, progress: Progress | None, *, wait: bool = True) -> dict[str, ModelAnswer] | None:
        """All answers by question id; None if those of other processes are missing, and nobody waits for them."""
        answers = ask(
            self._benchmark,
            self._questions,
            self._answerer,
            self._kept,
            batch_size=self._settings.batch_size,
            progress=progress,
        )
        if self._kept is None or self._kept.shard is None:
            return answers
        asked, said = {question.id for question in self._questions}, time.monotonic()
        while missing := asked - set(answers):
            answers.update({name: answer_of(line) for name, line in self._kept.of_others().items() if name in missing})
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
            "compares but does not continue. Remove that folder to evaluate again; `umed evaluate` also takes another --out."
        )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


def predicted(benchmark: Benchmark, question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> Prediction:
    """One answer with its scores."""
    details: Mapping[str, Any] = {} if benchmark.details is None else benchmark.details(question, answer, scorer)
    return Prediction(
        **kept_line(question, answer),
        values=benchmark.score(question, answer, scorer),
        cluster=question.cluster,
        details=details,
    )
