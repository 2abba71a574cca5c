"""Evaluations on disk: what a checkpoint answered, how it scored, and the metrics over it.

A folder holds ``evaluation.json``::

    {"schema": 2, "benchmark": "vqa_rad", "checkpoint": "...", "template": "mistral_instruct", "boxes": {...},
     "n": 451, "images": 203, "skipped": 0,
     "resampling": {"unit": "image", "units": 203, "resamples": 2000},
     "metrics": {"closed_accuracy": {"value": 0.71, "ci95": [0.65, 0.77], "n": 272, "units": 190, "interval": "bootstrap"}, ...},
     "constants": {"closed_accuracy": {"value": 0.52, "answer": "nothing"}, ...}}

Reports that were scored with ``--as`` also have ``treatment``, such as ``r2gen:3,60``.

Every metric stands there once, with n and its 95 % confidence interval (`umed_plugin.evaluation.metrics.metric.measure`);
``resampling`` says what the intervals resample. ``constants`` has the best answer that never looks at an image
(`umed_plugin.evaluation.constants`). ``benchmark`` is ``recipe`` for the records of any recipe.

Beside it ``predictions.jsonl`` has a line for each question: id, image, question, answer, truth, options, losses, groups; what a
further pass of the model found (``examined``); how the answer scores (``values``, ``cluster``); and keys of the benchmark's own,
such as boxes.

Files from before schema 2 had two forms. Both are still read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.metrics.metric import RESAMPLES, Row, compare_rows, measure, with_shared_groups

SCHEMA = 2
SUMMARY, PREDICTIONS = "evaluation.json", "predictions.jsonl"
_REMEDY = "evaluate again"


@dataclass(frozen=True)
class Prediction:
    """One question, answered and scored.

    Attributes:
        id: unique within the evaluation.
        image: path of the image file.
        question: as the model got it.
        answer: of the model.
        truth: the reference answer.
        values: name -> number, the columns of the metrics.
        cluster: what intervals resample as a whole: the patient where it is known, else the image.
        options, losses: each option's mean cross-entropy, nats.
        groups: name -> group.
        examined: what a further pass of the model found; None where there was none.
        details: keys of the benchmark's own.
    """

    id: str
    image: str
    question: str
    answer: str
    truth: str
    values: Mapping[str, float]
    cluster: str
    options: Sequence[str] = ()
    losses: Sequence[float] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    examined: Mapping[str, Any] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> Row:
        """What metrics are computed from."""
        return Row(self.id, self.cluster, self.values, self.groups)

    def line(self) -> dict[str, Any]:
        """The line of ``predictions.jsonl``."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "details"}
        if own["examined"] is None:
            del own["examined"]
        return {**own, **self.details}


_KEYS = {item.name for item in fields(Prediction)} - {"details"}
_NEEDED = ("answer", "cluster", "id", "image", "question", "truth", "values")
# Of the older files of recipes, whose lines were the studies themselves.
_OLD_NEEDED = ("accuracy", "answer", "boxes", "id", "image", "question", "set_iou", "true_boxes", "true_classes")
_OLD_DETAILS = ("true_classes", "true_boxes", "boxes", "set_iou", "modality", "image_aspect_ratio", "reading")


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint's answers to a benchmark, and the metrics over them.

    Attributes:
        benchmark: its name; ``recipe`` for the records of any recipe.
        checkpoint: as it was given.
        template: of the prompts.
        predictions: in the order of the questions.
        metrics: name -> what `umed_plugin.evaluation.metrics.metric.measure` gives.
        unit: what the intervals resample, such as "patient".
        boxes: the form in which boxes were read, see `umed_plugin.grounding.dialects.BoxDialect`.
        skipped: questions that were left out because their image is missing or cannot be read.
        constants: name -> what `umed_plugin.evaluation.constants.best_constants` gives; empty in files of earlier versions.
        treatment: of texts before they are scored, see `umed_plugin.evaluation.benchmarks.benchmark.Benchmark`.
    """

    benchmark: str
    checkpoint: str
    template: str
    predictions: list[Prediction]
    metrics: dict[str, dict[str, Any]]
    unit: str = "image"
    boxes: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    constants: dict[str, dict[str, Any]] = field(default_factory=dict)
    treatment: str = ""

    def rows(self) -> list[Row]:
        """What the metrics are computed from."""
        return [prediction.row() for prediction in self.predictions]

    def save(self, folder: Path | str) -> None:
        """Write ``evaluation.json`` and ``predictions.jsonl`` into ``folder``, which is made if need be."""
        files.write_json_lines(Path(folder) / PREDICTIONS, [prediction.line() for prediction in self.predictions])
        clusters = {prediction.cluster for prediction in self.predictions}
        summary = {
            "schema": SCHEMA,
            "benchmark": self.benchmark,
            "checkpoint": self.checkpoint,
            "template": self.template,
            "boxes": self.boxes,
            "n": len(self.predictions),
            "images": len({prediction.image for prediction in self.predictions}),
            "skipped": self.skipped,
            "resampling": {"unit": self.unit, "units": len(clusters), "resamples": RESAMPLES},
            "metrics": self.metrics,
            "constants": self.constants,
            **({"treatment": self.treatment} if self.treatment else {}),
        }
        files.write_json(Path(folder) / SUMMARY, summary)

    @classmethod
    def load(cls, folder: Path | str) -> Evaluation:
        """What `save` wrote, or an earlier version of it.

        Raises:
            UmedError: the folder holds no finished evaluation, or a damaged one.
        """
        folder = Path(folder)
        if not (folder / SUMMARY).is_file() or not (folder / PREDICTIONS).is_file():
            raise UmedError(
                f"{folder}: no finished evaluation. Needed: {SUMMARY} and {PREDICTIONS}, as `umed evaluate --out` writes them."
            )
        summary = files.read_object(folder / SUMMARY)
        if not isinstance(summary.get("schema", 1), int) or summary.get("schema", 1) > SCHEMA:
            raise UmedError(
                f"{folder / SUMMARY}: schema {summary['schema']!r}; this version of umed-plugin reads up to {SCHEMA}. Update "
                "umed-plugin, or evaluate again."
            )
        lines = _read_lines(folder / PREDICTIONS)
        of_today = "metrics" in summary or ("figures" in summary and "accuracy_ci95" not in summary)
        evaluation = (_of_lines if of_today else _of_old_recipe)(summary, lines, folder)
        _check_whole(summary, lines, folder)
        return evaluation


def _of_lines(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], folder: Path) -> Evaluation:
    """Schema 2, and the earlier form of named benchmarks, which called its metrics "figures"."""
    from umed_plugin.evaluation import forms
    from umed_plugin.evaluation.benchmarks.recipe import RECIPE

    _check_keys(lines, _NEEDED, folder)
    of_recipe = summary.get("benchmark") == RECIPE.name
    summary = {**summary, "metrics": summary["metrics"] if "metrics" in summary else summary["figures"]}
    forms.check_object(folder / SUMMARY, summary, forms.RecipeSummaryForm if of_recipe else forms.SummaryForm, _REMEDY)
    line_form = forms.StudyForm if of_recipe else forms.PredictionForm
    forms.check_lines(folder / PREDICTIONS, lines, line_form, _REMEDY)
    return Evaluation(
        summary["benchmark"],
        summary["checkpoint"],
        summary["template"],
        [_prediction(line) for line in lines],
        dict(summary["metrics"]),
        (summary.get("resampling") or {}).get("unit", "image"),
        summary.get("boxes", {}),
        summary.get("skipped", 0),
        summary.get("constants", {}),
        summary.get("treatment", ""),
    )


def _prediction(line: Mapping[str, Any]) -> Prediction:
    common = {key: value for key, value in line.items() if key in _KEYS}
    return Prediction(**common, details={key: value for key, value in line.items() if key not in _KEYS})


def _of_old_recipe(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], folder: Path) -> Evaluation:
    """The earlier form of recipes: two intervals for one metric, of which the one over patients is computed anew."""
    from umed_plugin.evaluation import forms
    from umed_plugin.evaluation.benchmarks.recipe import RECIPE

    _check_keys(lines, _OLD_NEEDED, folder)
    forms.check_lines(folder / PREDICTIONS, lines, forms.OldStudyForm, _REMEDY)
    predictions = [_prediction_of_case(line) for line in lines]
    rows = [prediction.row() for prediction in predictions]
    unit = resampling_unit([str(line.get("patient") or "") for line in lines])
    checkpoint, template = str(summary.get("checkpoint", "")), str(summary.get("template", ""))
    return Evaluation(RECIPE.name, checkpoint, template, predictions, measure(RECIPE.metrics(rows), rows), unit)


def _prediction_of_case(line: Mapping[str, Any]) -> Prediction:
    source, patient = str(line.get("source", "")), str(line.get("patient") or "")
    relevance = line.get("vision_relevance")
    return Prediction(
        id=line["id"],
        image=line["image"],
        question=line["question"],
        answer=line["answer"],
        truth="",
        values=line.get("values") or _old_values(line),
        cluster=f"{source}/{patient}" if patient else line["image"] or line["id"],
        groups={"source": source},
        examined=None if relevance is None else {"vision_relevance": relevance, "heat": line.get("heat")},
        details={key: line[key] for key in _OLD_DETAILS if key in line},
    )


def _old_values(line: Mapping[str, Any]) -> dict[str, float]:
    """The columns of the first version of the file, which had the four headline metrics alone."""
    if not line["true_boxes"]:
        return {"accuracy": line["accuracy"]}
    values = {"accuracy": line["accuracy"], "mean_iou": line["set_iou"], "acc_at_50": float(line["set_iou"] >= 0.5)}
    relevance = line.get("vision_relevance")
    return values if relevance is None else {**values, "vision_relevance": relevance}


def _read_lines(file: Path) -> list[dict[str, Any]]:
    if not file.stat().st_size:
        raise UmedError(f"{file}: holds no answers beside {SUMMARY}. Evaluate again.")
    lines = []
    # As bytes, and line by line: one line may be no UTF-8, and its number is told.
    for number, text in enumerate(file.read_bytes().rstrip(b"\n").split(b"\n"), start=1):
        try:
            line = files.parse_json(text)
        except ValueError as error:
            raise UmedError(f"{file}:{number}: not JSON ({error}). Evaluate again.") from error
        if not isinstance(line, dict):
            raise UmedError(f"{file}:{number}: holds a {type(line).__name__}; expected an object. Evaluate again.")
        lines.append(line)
    return lines


def _check_whole(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Refuse answers that are not those of the summary: a file that was cut, or to which lines were added."""
    wanted = summary.get("n")
    if isinstance(wanted, int) and wanted != len(lines):
        raise UmedError(
            f"{folder / PREDICTIONS}: holds {len(lines)} answers, and {SUMMARY} is of {wanted}. The file is not whole, or not of "
            "this evaluation. Copy both again, or evaluate again."
        )
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        identity = str(line.get("id", number))
        if identity in seen:
            raise UmedError(f"{folder / PREDICTIONS}:{number}: has the id {identity!r} a second time. Evaluate again.")
        seen.add(identity)


def _check_keys(lines: Sequence[Mapping[str, Any]], needed: Sequence[str], folder: Path) -> None:
    for number, line in enumerate(lines, start=1):
        missing = [key for key in needed if key not in line]
        if missing:
            raise UmedError(
                f"{folder / PREDICTIONS}:{number}: has no {', '.join(missing)}. Expected: what `umed evaluate --out` writes once "
                "it is finished. Evaluate again."
            )


def resampling_unit(patients: Sequence[str]) -> str:
    """What confidence intervals resample, in words, given the patient of each question (empty where unknown)."""
    if all(patients):
        return "patient"
    return "patient, or image where no patient is known" if any(patients) else "image"


def compare(before: Evaluation | Path | str, after: Evaluation | Path | str) -> dict[str, dict[str, Any]]:
    """Paired differences ``after - before`` of every metric: ``{metric: {"difference", "ci95", "n", "units", "interval"}}``.

    Questions are paired by id, and must be the same in both. A recipe with its true boxes given (``--give-box``) is compared with
    the same recipe without, over the questions and metrics that both have. Groups of studies, such as those of ``hold_out``, are
    taken from the evaluation that has them. Intervals resample as those of the metrics do, with
    the same draws for both evaluations. ``interval`` says how ``ci95`` was computed from ``units`` clusters, or why it is None.

    Args:
        before: an evaluation, or the folder that holds one.
        after: the same of the other checkpoint.

    Raises:
        UmedError: the two are of different benchmarks, were not asked the same questions, or treated texts in two ways.

    Example:
        >>> from umed_plugin import compare
        >>> from umed_plugin.evaluation.results import Evaluation, Prediction
        >>> def answered(*right):
        ...     scores = [{"closed_accuracy": float(value)} for value in right]
        ...     rows = [Prediction(f"q{i}", f"{i}.png", "Normal?", "", "", score, f"{i}.png") for i, score in enumerate(scores)]
        ...     return Evaluation("slake", "a-checkpoint", "llava_v1", rows, {})
        >>> compare(answered(0, 0, 1, 1), answered(1, 0, 1, 1))["closed_accuracy"]
        {'difference': 0.25, 'ci95': None, 'n': 4, 'units': 4, 'interval': 'too few'}
    """
    from umed_plugin.evaluation.benchmarks.catalogue import benchmark_of
    from umed_plugin.evaluation.pairing import asked_of, check_questions, check_treatments, may_be_compared

    before, after = (item if isinstance(item, Evaluation) else Evaluation.load(item) for item in (before, after))
    if not may_be_compared(before.benchmark, after.benchmark):
        raise UmedError(
            f"{before.checkpoint} was evaluated on {before.benchmark}, {after.checkpoint} on {after.benchmark}: they cannot be "
            "compared. Evaluate both on the same benchmark."
        )
    some = before.benchmark != after.benchmark
    try:
        check_treatments(before.treatment, after.treatment)
        check_questions(
            *([asked_of(one) for one in evaluation.predictions] for evaluation in (before, after)), some=some
        )
        earlier, later = with_shared_groups(before.rows(), after.rows())
        metrics = benchmark_of(after.benchmark).metrics(later)
        if some:
            shared = {row.id for row in earlier} & {row.id for row in later}
            earlier, later = ([row for row in rows if row.id in shared] for rows in (earlier, later))
            known = {metric.name for metric in benchmark_of(before.benchmark).metrics(earlier)}
            metrics = [metric for metric in benchmark_of(after.benchmark).metrics(later) if metric.name in known]
        return compare_rows(metrics, earlier, later)
    except UmedError as error:
        raise UmedError(f"{before.checkpoint} and {after.checkpoint}: {error}") from error
