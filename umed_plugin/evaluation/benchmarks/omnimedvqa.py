"""OmniMedVQA: multiple choice over 73 data sets of 12 modalities, by QA score and by prefix score.

Hu et al. (arXiv 2402.09181). A JSON for each data set in ``QA_information/*``, whose records have ``question_id``,
``question``, ``option_A`` .. (two to four), ``gt_answer`` (the text of an option), ``image_path`` from the benchmark's root,
``modality_type`` (one file says ``modality``) and ``dataset``.

- QA score: the prompt lists the options; the answer counts as the option with the highest difflib ratio to it.
- Prefix score: the option with the lowest mean cross-entropy of `` {option}.`` behind ``Question: {question} The answer is``. The
  published script gives LLaVA no image there, by an oversight; here the model sees the image.

Some of the images are in other data sets' training data (Kvasir, NIH): ``umed recipe check ... --against`` names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import (
    Benchmark,
    BenchmarkQuestion,
    existing_image,
    field_of,
    find_one,
    questions_of_rows,
    read_records,
)
from umed_plugin.evaluation.metrics.choices import LETTERS, lowest, nearest_option, right_option
from umed_plugin.evaluation.metrics.metric import Metric, Row, by_group, mean_of_groups, means
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

_ASKED = (
    "{question}Here are {count} candidate answers:{options} Only return what you think is the correct answer from the candidate "
    "answers, do not return any other irrelevant text!"
)


def questions(root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
    """The questions of every data set whose file is there, in alphabetical order of data sets."""
    patterns = ["QA_information/*/*.json", "QA_information/*.json", "*.json"]
    find_one(root, patterns, "omnimedvqa")
    files = next(files for pattern in patterns if (files := sorted(root.glob(pattern))))
    rows = (
        (f"{file}[{number}]", record)
        for file in files
        for number, record in enumerate(read_records(file, "omnimedvqa"))
    )
    return questions_of_rows(rows, lambda row, where: [_question(row, where, root)], "omnimedvqa")


def _question(record: dict[str, Any], where: str, root: Path) -> BenchmarkQuestion:
    texts = (record.get(f"option_{letter}") for letter in LETTERS[:4])
    options = [str(option) for option in texts if option is not None]
    question, truth = str(field_of(record, where, "question")), str(field_of(record, where, "gt_answer"))
    right = options.index(truth) if truth in options else right_option(truth, options)
    if right is None:
        raise UmedError(f"{where}: gt_answer {truth!r} is not one of its options {options}.")
    data_set = str(field_of(record, where, "dataset"))
    return BenchmarkQuestion(
        id=f"{data_set}/{field_of(record, where, 'question_id')}",
        image=existing_image([root, root / "Images"], str(field_of(record, where, "image_path")), where),
        text=_ASKED.format(question=question, count=len(options), options=options),
        truth=options[right],
        options=options,
        options_after=f"Question: {question} The answer is",
        groups={
            "part": data_set,
            "modality": str(field_of(record, where, "modality_type", "modality")),
            "question_type": str(record.get("question_type", "")),
        },
    )


def score(question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> dict[str, float]:
    """1.0 or 0.0 by each of the two scores. An answer that resembles no option is wrong."""
    nearest = nearest_option(answer.text, question.options)
    return {
        "qa_score": float(nearest is not None and question.options[nearest] == question.truth),
        "prefix_score": float(question.options[lowest(answer.losses)] == question.truth),
    }


def metrics(rows: Sequence[Row]) -> list[Metric]:
    """Both scores: over all questions, as the unweighted mean over data sets, by modality and by type of question."""
    both = means("qa_score", "prefix_score")
    over_sets = [
        Metric(f"{metric.name}_mean_of_sets", mean_of_groups(metric.name, "part"), (metric.name, "part"))
        for metric in both
    ]
    return [
        *both,
        *over_sets,
        *(part for metric in both for group in ("modality", "question_type") for part in by_group(metric, group, rows)),
    ]


BENCHMARK = Benchmark(
    name="omnimedvqa",
    title="OmniMedVQA, multiple choice over 12 modalities",
    needs="`QA_information/` and the folders of images",
    url="https://huggingface.co/datasets/foreverbeliever/OmniMedVQA (open-access part; terms of each data set)",
    reported="QA score and prefix score; over data sets, by modality and by question type",
    questions=questions,
    score=score,
    metrics=metrics,
    order=5,
)
