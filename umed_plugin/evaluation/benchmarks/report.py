"""Reports: the records of a recipe with ``reader: reports`` (or a JSON of such records), scored by their text.

- ``bleu_1`` to ``bleu_4`` (of the set), ``meteor``, ``rouge_l``: `umed_plugin.evaluation.metrics.captions`.
- ``cider_d``, 0-10: `umed_plugin.evaluation.metrics.cider`, with document frequencies of all references that are asked.
  A reference whose every n-gram is in all of them has none.
- ``findings_precision``, ``findings_recall``, ``findings_f1``: findings that the answer names and does not rule out, against
  those of the reference, summed over all reports (`umed_plugin.grounding.terms`).
- ``file/NAME``: each column of ``--scores FILE.csv``, such as BERTScore, CheXbert or RadGraph F1 that another program computed
  from ``predictions.jsonl``. They need weights that this plugin neither has nor downloads.

``--as r2gen`` scores as R2Gen does (`umed_plugin.evaluation.metrics.r2gen_text`). Without it, words are those of both texts, in
lower case and without punctuation.

How to run: ``umed evaluate CKPT --benchmark report:RECIPE_OR_JSON``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

from umed_plugin.checkpoints.folder import UMED_TEMPLATES
from umed_plugin.errors import UmedError, UsageError, note
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion, OfRecipe
from umed_plugin.evaluation.benchmarks.recipe_scoring import finding_metrics, finding_values
from umed_plugin.evaluation.metrics.captions import BLEU_COLUMNS, ORDERS, bleu, bleu_counts, meteor, rouge_l, words
from umed_plugin.evaluation.metrics.cider import DocumentFrequencies
from umed_plugin.evaluation.metrics.metric import Metric, Row, means
from umed_plugin.evaluation.metrics.r2gen_text import R2GenTreatment
from umed_plugin.grounding.answer_types import REPORT as REPORT_TYPE
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

PREFIX = "report:"
_OF_FILE = "file/"
_CIDER_LIMITS = (0.0, 10.0)


def metrics(rows: Sequence[Row]) -> list[Metric]:
    """The texts' metrics, the findings', and those of ``--scores``."""
    reported = [Metric(f"bleu_{order}", partial(bleu, order=order), BLEU_COLUMNS) for order in ORDERS]
    reported += [*means("meteor", "rouge_l"), *means("cider_d", limits=_CIDER_LIMITS), *finding_metrics(rows)]
    of_file = sorted({name for row in rows for name in row.values if name.startswith(_OF_FILE)})
    # A file scores the model's own answers, so it says nothing of any other answer.
    return [*reported, *(replace(metric, rates=False) for metric in means(*of_file, limits=None))]


def treatment_of(written: Optional[str]) -> Optional[R2GenTreatment]:
    """What ``--as`` says: ``r2gen``, or ``r2gen:LEAST,MOST`` with the least count of a word and the most tokens of a text.

    Raises:
        UsageError: it says something else.
    """
    if written is None:
        return None
    found = re.fullmatch(r"r2gen(?::(\d+),(\d+))?", written)
    if found is None or (found[2] is not None and int(found[2]) < 2):
        raise UsageError(f"--as {written}: allowed are r2gen (IU X-ray) and r2gen:LEAST,MOST, such as r2gen:10,100.")
    return R2GenTreatment() if found[1] is None else R2GenTreatment(int(found[1]), int(found[2]))


class ReportSet:
    """The reports of one evaluation: what a single answer's score depends on of all of them.

    Args:
        of_recipe: gives the records' questions.
        training_reports: gives the reports of the training split; called for R2Gen's vocabulary alone.
        treatment: of the texts, or None.
        scores: file of further scores, or None.
    """

    def __init__(
        self,
        of_recipe: Benchmark,
        training_reports: Callable[[], list[str]],
        treatment: Optional[R2GenTreatment],
        scores: Optional[Path],
    ) -> None:
        self._of_recipe, self._training_reports = of_recipe, training_reports
        self._treatment, self._scores_file = treatment, scores
        self._vocabulary: frozenset[str] = frozenset()
        self._frequencies = DocumentFrequencies([])
        self._scores: dict[str, dict[str, float]] = {}

    def questions(self, root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
        """The questions for a report.

        Raises:
            UmedError: there is none, or the vocabulary cannot be made.
        """
        listed = self._of_recipe.questions(root, split, work)
        reports = only_reports(listed)
        if not reports:
            raise UmedError(
                f"none of the {len(listed)} records of the split {split!r} is a report. Recipes with `reader: reports` give them."
            )
        if len(reports) < len(listed):
            note(f"{len(listed) - len(reports)} records of the split {split!r} are no reports, and are not asked.")
        if self._treatment is not None:
            of_training = self._training_reports()
            if not of_training:
                raise UmedError(
                    "--as r2gen: the vocabulary is made of the reports of the split train, and there is none. Evaluate the "
                    "recipe, or a JSON that holds its training records too."
                )
            self._vocabulary = self._treatment.vocabulary(of_training)
        return reports

    def adapt(self, questions: Sequence[BenchmarkQuestion], scorer: Scorer) -> list[BenchmarkQuestion]:
        """The questions as they are; their references become the set."""
        from umed_plugin.evaluation.benchmarks.recipe import check_aspect_ratio

        self._frequencies = DocumentFrequencies(self._reference(question.truth) for question in questions)
        alike = sum(not self._frequencies.weighs(self._reference(question.truth)) for question in questions)
        if alike:
            note(
                f"{alike} of {len(questions)} references hold nothing that tells them from the others. They have no cider_d, "
                "which would be 0 for any answer."
            )
        if self._scores_file is not None:
            self._scores = read_scores(self._scores_file, [question.id for question in questions])
        return check_aspect_ratio(questions, scorer)

    def score(self, question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> dict[str, float]:
        """The columns of one report."""
        said = words(answer.text) if self._treatment is None else self._treatment.answer(answer.text)
        wanted = self._reference(question.truth)
        return {
            **bleu_counts(said, wanted),
            "meteor": meteor(said, wanted),
            "rouge_l": rouge_l(said, wanted),
            **({"cider_d": self._frequencies.cider_d(said, wanted)} if self._frequencies.weighs(wanted) else {}),
            **finding_values(answer.text, question.about["record"]),
            **self._scores.get(question.id, {}),
        }

    def _reference(self, report: str) -> list[str]:
        return words(report) if self._treatment is None else self._treatment.reference(report, self._vocabulary)


def read_scores(file: Path, ids: Sequence[str]) -> dict[str, dict[str, float]]:
    """The numbers of a CSV with a column ``id`` and one for each score, by id; their names begin with ``file/``.

    Raises:
        UmedError: the file cannot be read, a column has no name or that of another one, a row has more or fewer cells than the
            header, a cell is no number, or an id is missing or comes twice. All rows are named.
    """
    from umed_plugin.data.texts import read_numbered_rows
    from umed_plugin.faults import Faults

    rows, faults = read_numbered_rows(file), Faults()
    header = [title.strip() for title in rows[0][1]] if rows else []
    if "id" not in header or len(header) < 2:
        raise UmedError(
            f"{file}: its columns are {', '.join(header) or 'none'}; needed: id (as in predictions.jsonl) and one for each score."
        )
    if "" in header or len({*header}) < len(header):
        raise UmedError(f"{file}: its columns are {', '.join(map(repr, header))}; each needs a name of its own.")
    found: dict[str, dict[str, float]] = {}
    for number, row in rows[1:]:
        if not row:  # a blank line
            continue
        if len(row) != len(header):
            counts = f"has {len(row)} cells, and the header has {len(header)}"
            faults.add(f"{file}:{number}", f"{counts}. Write 0.85 and not 0,85, and put text with a comma into quotes")
            continue
        cells = dict(zip(header, (cell.strip() for cell in row)))
        identity = cells.pop("id", "")
        values = {f"{_OF_FILE}{name}": _number(text) for name, text in cells.items()}
        wrong = [name for name, value in values.items() if value is None]
        if wrong:
            name = wrong[0].removeprefix(_OF_FILE)
            faults.add(f"{file}:{number}", f"needs a finite number in each column; {name} is {cells[name]!r}")
        elif identity in found:
            faults.add(f"{file}:{number}", f"has the id {identity!r} a second time")
        found[identity] = {name: value for name, value in values.items() if value is not None}
    missing = [identity for identity in ids if identity not in found]
    if missing:
        faults.add(file, f"has no row for {len(missing)} of {len(ids)} reports, such as {missing[0]!r}")
    faults.raise_if_any(f"--scores {file}")
    further = len(set(found) - set(ids))
    if further:
        note(f"--scores {file}: {further} rows are of other ids, and are not used.")
    return found


def _number(text: str) -> Optional[float]:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def report_benchmark(recipe: str, of_recipe: Benchmark, settings: Any, data_root: Optional[Path]) -> Benchmark:
    """The benchmark of a recipe's reports.

    Args:
        recipe: name or YAML of a recipe, or a JSON of records.
        of_recipe: its benchmark by `umed_plugin.evaluation.benchmarks.recipe.recipe_benchmark`.
        settings: `umed_plugin.evaluation.evaluation_run.EvaluationSettings`.
        data_root: folder of the recipe's files; None: as the recipe says.
    """

    def training_reports() -> list[str]:
        from umed_plugin.data.annotations import read_annotations
        from umed_plugin.data.recipes.recipe import load_recipe
        from umed_plugin.data.records import load_records

        if recipe.endswith(".json"):
            records = load_records(recipe, split="train")
            return [r["conversations"][1]["value"] for r in records if r["answer_type"] == REPORT_TYPE]
        items = read_annotations(load_recipe(recipe), data_root)
        return [item.report for item in (*items.items, *items.missing) if item.split == "train" and item.report]

    treatment = treatment_of(settings.report_as)
    reports = ReportSet(of_recipe, training_reports, treatment, settings.report_scores)
    named = "" if treatment is None else f"r2gen:{treatment.least_count},{treatment.most_tokens}"
    of_reports = replace(REPORT, questions=reports.questions, adapt=reports.adapt, score=reports.score)
    return replace(of_reports, left_out=of_recipe.left_out, treatment=named)


def _unknown_set(*unused: Any) -> Any:
    raise UsageError("--benchmark report: name the recipe or the JSON of the reports, as in report:iu_xray_reports.")


# `report_benchmark` gives it the reports; here it says what the metrics are.
REPORT = Benchmark(
    name="report",
    title="reports of a recipe",
    needs="the recipe's data set",
    url="",
    reported="BLEU-1 to 4, METEOR (equal words), ROUGE-L, CIDEr-D; precision, recall and F1 of the findings that are named; "
    "columns of `--scores FILE.csv`",
    questions=_unknown_set,
    score=_unknown_set,
    metrics=metrics,
    splits=("test", "val", "train"),
    max_new_tokens=256,
    templates=UMED_TEMPLATES,
)


def only_reports(studies: Sequence[BenchmarkQuestion]) -> list[BenchmarkQuestion]:
    """Those of a recipe's studies that ask for a report."""
    return [question for question in studies if question.about["record"]["answer_type"] == REPORT_TYPE]


OF_RECIPE = OfRecipe(REPORT, only_reports)
