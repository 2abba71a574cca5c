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

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.adapter_folder import find_base
from umed_plugin.checkpoints.folder import is_lora, read_config
from umed_plugin.data.shards import Shard
from umed_plugin.errors import UsageError, unknown_name
from umed_plugin.evaluation.asking import AnswersQuestions, Progress
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion, OfRecipe
from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS, OF_RECIPES, split_name
from umed_plugin.evaluation.benchmarks.llava_med import file_benchmark, is_question_file
from umed_plugin.evaluation.benchmarks.recipe import recipe_benchmark
from umed_plugin.evaluation.benchmarks.report import OF_RECIPE as REPORTS
from umed_plugin.evaluation.benchmarks.report import report_benchmark
from umed_plugin.evaluation.evaluation_run import EvaluationRun, EvaluationSettings
from umed_plugin.evaluation.pairing import check_before_asking
from umed_plugin.evaluation.questions import chosen_questions
from umed_plugin.evaluation.results import PREDICTIONS, Evaluation
from umed_plugin.evaluation.similar_cases import SimilarCases
from umed_plugin.files.locks import locked


def evaluate(
    checkpoint: Path | str | AnswersQuestions,
    benchmark: Path | str,
    data_root: Path | str | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    out: Path | str | None = None,
    progress: Progress | None = None,
    similar: int = 0,
    similar_from: Path | str | None = None,
    compare_with: Evaluation | None = None,
    **settings: Any,
) -> Evaluation:
    """Ask a checkpoint the questions of a benchmark, greedily, score the answers and compute the metrics.

    Args:
        checkpoint: a full LLaVA checkpoint, a LoRA folder, or any object with the methods of `AnswersQuestions`.
        benchmark: name of a benchmark, name or YAML of a recipe, a JSON of records, or ``probes:`` or ``report:`` before one of
            the latter two.
        data_root: folder of its files; None: as the recipe says. A JSON of records takes none: its images lie beside it.
        split: ``test``, ``val`` or ``train``; None: ``test``.
        limit: at most this many questions of each part of the benchmark.
        out: folder for the files that docs/evaluation.md lists; a killed run continues from them. None: nothing is written.
        progress: called with (questions done, questions in all).
        similar: number of similar training studies whose diagnoses stand before each question (`umed_plugin.data.similar`).
        similar_from: a recipe or JSON of records with these studies; None: the benchmark's own.
        compare_with: an earlier evaluation; other questions than its own are refused before the checkpoint is loaded.
        settings: fields of `EvaluationSettings`, such as ``batch_size``.

    Raises:
        UmedError: the benchmark is unknown or its files are missing, an image cannot be read, ``out`` holds answers given under
            other settings, or ``compare_with`` was asked something else.

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
        {'value': 0.5, 'ci95': None, 'n': 2, 'units': 1, 'interval': 'too few'}
    """
    asked = (split, limit, similar, similar_from)
    evaluation = _evaluate(checkpoint, benchmark, data_root, None, asked, out, progress, compare_with, settings)
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
    similar: int = 0,
    similar_from: Path | str | None = None,
    compare_with: Evaluation | None = None,
    **settings: Any,
) -> Evaluation | None:
    """`evaluate` by several processes: each answers its share, and whoever finds all answers there computes the metrics.

    The questions are put into the same batches however many processes there are, so answers and metrics are those of a single
    process to the last digit. A process that was killed is started again with the same command.

    Args:
        checkpoint, benchmark, data_root, split, limit, similar, similar_from, compare_with, settings: as for `evaluate`; the
            same in all processes.
        shard: the share of this process.
        out: folder that all processes see.
        wait: wait for the answers of the others, instead of returning without an evaluation.
        progress: called with (questions answered or found, questions in all).

    Returns:
        The evaluation; None while other processes still have to answer.

    Raises:
        UmedError: as for `evaluate`.
    """
    shared, asked = (shard, wait), (split, limit, similar, similar_from)
    return _evaluate(checkpoint, benchmark, data_root, shared, asked, out, progress, compare_with, settings)


def _evaluate(
    checkpoint: Path | str | AnswersQuestions,
    benchmark: Path | str,
    data_root: Path | str | None,
    shared: tuple[Shard, bool] | None,
    which: tuple[str | None, int | None, int, Path | str | None],
    out: Path | str | None,
    progress: Progress | None,
    compare_with: Evaluation | None,
    settings: dict[str, Any],
) -> Evaluation | None:
    chosen = EvaluationSettings(**settings)
    split, limit, similar, similar_from = which
    root = None if data_root is None else Path(data_root)
    asked = _benchmark_of(str(benchmark), checkpoint, root, chosen)
    shard = None if shared is None else shared[0]
    with _writing(out, shard), tempfile.TemporaryDirectory(prefix="umed-evaluate-") as temporary:
        questions, skipped = chosen_questions(
            asked,
            root if asked.name in BENCHMARKS else None,
            split=split,
            limit=limit,
            work=Path(out or temporary) / "data",
            skip=chosen.on_bad_image == "skip",
        )
        if compare_with is not None:
            check_before_asking(compare_with, asked, questions)
        candidates = asked.candidates(root) if asked.candidates and root else ()
        if similar:
            cases = _similar_cases(similar, similar_from, str(benchmark), checkpoint, root, chosen, Path(temporary))
            chosen = replace(chosen, similar=cases)
        chosen_by = {"split": split or asked.splits[0], "limit": limit, "similar": similar}
        run = EvaluationRun(checkpoint, asked, questions, chosen, out, shard, chosen_by)
        answers = run.ask(progress, wait=shared is None or shared[1])
        return None if answers is None else run.evaluation(answers, skipped, candidates)


def _benchmark_of(
    name: str, checkpoint: Path | str | AnswersQuestions, root: Path | None, settings: EvaluationSettings
) -> Benchmark:
    """A named benchmark, or that of a recipe, whose records are built as the checkpoint sees images."""
    if settings.give_box and (name in BENCHMARKS or split_name(name)[0] is not None or is_question_file(name)):
        raise UsageError(
            f"--give-box needs records with true boxes, of a recipe or a JSON; --benchmark {name} has none."
        )
    if settings.pseudo_boxes and (name in BENCHMARKS or is_question_file(name)):
        raise UsageError(f"--pseudo-boxes: has no effect on {name}, which has no records of a recipe. Remove it.")
    if name in BENCHMARKS:
        named = BENCHMARKS[name]
        if root is None:
            raise UsageError(f"--benchmark {name} needs --data-root: {named.needs}, from {named.url}")
        return named
    check_benchmark(name)
    of_recipe, recipe = split_name(name)
    if of_recipe is None and is_question_file(name):
        return file_benchmark(name, root)
    if root is not None and recipe.endswith(".json"):
        raise UsageError(
            f"--data-root {root}: has no effect on {recipe}. Records name their images themselves, and relative ones are looked "
            f"for in {Path(recipe).resolve().parent}. Remove it."
        )
    studies = recipe_benchmark(
        recipe,
        data_root=root,
        image_aspect_ratio=_aspect_ratio(checkpoint, settings),
        on_bad_image=settings.on_bad_image,
        # Files rendered into a temporary folder would have a new path each time: the cache would never find them again.
        render=settings.image_cache is None,
        give_box=settings.give_box,
        pseudo_boxes=settings.pseudo_boxes,
    )
    if of_recipe is REPORTS:
        return report_benchmark(recipe, studies, settings, root)
    return studies if of_recipe is None else _made_of(studies, of_recipe)


def _similar_cases(
    count: int,
    given: Path | str | None,
    benchmark: str,
    checkpoint: Path | str | AnswersQuestions,
    root: Path | None,
    settings: EvaluationSettings,
    work: Path,
) -> SimilarCases:
    """Where similar cases are taken from: the training split of ``given``, else of the benchmark's own recipe or records.

    Raises:
        UsageError: the benchmark has no recipe, and none is given.
    """
    _, recipe = split_name(benchmark)
    if given is None and (benchmark in BENCHMARKS or is_question_file(benchmark)):
        raise UsageError(
            f"--similar {count}: {benchmark} has no training studies. Name a recipe or records: --similar-from."
        )
    source = recipe if given is None else str(given)
    studies = recipe_benchmark(
        source,
        data_root=root if given is None else None,
        image_aspect_ratio=_aspect_ratio(checkpoint, settings),
        on_bad_image=settings.on_bad_image,
        pseudo_boxes=True,  # only what they show is said, and nothing is measured against their boxes
    )
    questions = studies.questions(work, "train", work / "similar")
    kept = Path(source).with_name(f".{Path(source).name}.similar.npz") if source.endswith(".json") else None
    return SimilarCases(count, [(question.about["record"], question.image) for question in questions], kept)


def _made_of(studies: Benchmark, of_recipe: OfRecipe) -> Benchmark:
    """The benchmark that asks something else about a recipe's studies."""

    def questions(root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
        return of_recipe.made(studies.questions(root, split, work))

    return replace(of_recipe.benchmark, questions=questions, left_out=studies.left_out)


def check_benchmark(name: str) -> None:
    """Refuse a name that is neither a benchmark's, a recipe's nor a file's, before a checkpoint or another evaluation is read.

    Raises:
        UsageError: there is no benchmark of that name.
    """
    from umed_plugin.data.recipes.recipe import shipped_recipes

    of_recipe, recipe = split_name(name)
    is_file = Path(recipe).is_file() or Path(recipe).suffix in (".json", ".jsonl", ".yaml", ".yml")
    known = {*shipped_recipes(), *(BENCHMARKS if of_recipe is None else ())}
    if not is_file and recipe not in known:
        or_file = (
            "a recipe's YAML, or a JSON of records"
            if of_recipe
            else "a recipe's YAML, a JSON of records, or LLaVA-Med's .jsonl"
        )
        made = "".join(f", {kind}:RECIPE" for kind in OF_RECIPES) if of_recipe is None else ""
        raise UsageError(f"{unknown_name('recipe' if of_recipe else 'benchmark', recipe, known)} Or {or_file}{made}.")


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
    with _writing(out):
        run = EvaluationRun(checkpoint, benchmark, questions, settings or EvaluationSettings(), out)
        answers = run.ask(progress)
        assert answers is not None, "only a shard can end before the evaluation does"
        return run.evaluation(answers, skipped, candidates)


@contextmanager
def _writing(out: Path | str | None, shard: Shard | None = None) -> Iterator[None]:
    """Hold ``out`` for one evaluation; its shards run side by side, each once."""
    with ExitStack() as held:
        if out is not None:
            busy = "another evaluation is writing it"
            held.enter_context(locked(out, inside=True, shared=shard is not None, busy=busy))
        if out is not None and shard is not None:
            share, busy = f"{Path(PREDICTIONS).stem}.{shard.file_part}", f"another process answers shard {shard}"
            held.enter_context(locked(Path(out) / share, busy=busy, flag="--shard"))
        yield
