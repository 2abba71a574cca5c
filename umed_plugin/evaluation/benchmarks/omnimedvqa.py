"""OmniMedVQA: multiple choice over 73 data sets of 12 modalities, by QA score and by prefix score.

Hu et al. (arXiv 2402.09181). A JSON for each data set in ``QA_information/*``, whose records have ``question_id``,
``question``, ``question_type``, ``option_A`` .. (two to four; null where there are fewer), ``gt_answer`` (the text of an option),
``image_path`` (``Images/<data set>/...``), ``dataset`` and ``modality_type`` (one entry of ``Chest CT Scan.json`` says
``modality``).

- QA score: the prompt lists the options; the answer counts as the option with the highest difflib ratio to it.
- Prefix score: the option with the lowest mean cross-entropy of `` {option}.`` behind ``Question: {question} The answer is``, as
  in the authors' ``medical_llava.py``. That script gives LLaVA no image there, by an oversight; here the model sees the image.
  Their script for LLaVA-Med, ``model_med_eval_sp.py``, puts the whole prompt of the QA score in place of the question.

Prompts and scores are those of OpenGVLab/Multi-Modality-Arena at bd2999a. Departure: a row whose ``gt_answer`` is none of its
options is left out and named; there it counts as wrong. The published archive (``OmniMedVQA.zip``, 1ba51c2) has the images of
``Open-access`` alone: files of ``Restricted-access`` without any image are left out and counted.

Some of the images are in other data sets' training data (Kvasir, NIH): ``umed recipe check ... --against`` names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError, note
from umed_plugin.evaluation.benchmarks.benchmark import (
    Benchmark,
    BenchmarkQuestion,
    existing_image,
    field_of,
    files_matching,
    find_one,
    numbered,
    questions_of_rows,
    read_records,
    text_of,
)
from umed_plugin.evaluation.metrics.choices import LETTERS, lowest, nearest_option, right_option
from umed_plugin.evaluation.metrics.metric import Metric, Row, by_group, mean_of_groups, means
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

_RESTRICTED = "Restricted-access"
_ASKED = (
    "{question}Here are {count} candidate answers:{options} Only return what you think is the correct answer from the candidate "
    "answers, do not return any other irrelevant text!"
)


def questions(root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
    """The questions of every data set whose file is there, in alphabetical order of data sets."""
    patterns = ["QA_information/*/*.json", "*/QA_information/*/*.json", "QA_information/*.json", "*.json"]
    find_one(root, patterns, "omnimedvqa")
    files = next(files for pattern in patterns if (files := files_matching(root, pattern)))
    inner = next((parent.parent for parent in files[0].parents if parent.name == "QA_information"), root)
    rows = (row for file in files for row in numbered(file, read_records(file, "omnimedvqa")))
    listed = questions_of_rows(rows, lambda row, where: [_question(row, where, inner)], "omnimedvqa")
    return _with_images(listed, {file.stem for file in files if file.parent.name == _RESTRICTED})


def _question(record: dict[str, Any], where: str, root: Path) -> BenchmarkQuestion:
    given = [f"option_{letter}" for letter in LETTERS[:4] if record.get(f"option_{letter}") is not None]
    options = [text_of(record, where, name) for name in given]
    if len(options) < 2:
        raise UmedError(f"{where}: has {len(options)} options of option_A to option_D; needed: two at least.")
    question, truth = text_of(record, where, "question"), text_of(record, where, "gt_answer")
    right = options.index(truth) if truth in options else right_option(truth, options)
    if right is None:
        raise UmedError(f"{where}: gt_answer {truth!r} is not one of its options {options}.")
    data_set = text_of(record, where, "dataset")
    return BenchmarkQuestion(
        id=f"{data_set}/{text_of(record, where, 'question_id')}",
        image=existing_image([root, root / "Images"], text_of(record, where, "image_path"), where),
        text=_ASKED.format(question=question, count=len(options), options=options),
        truth=options[right],
        options=options,
        options_after=f"Question: {question} The answer is",
        groups={
            "part": data_set,
            "modality": str(field_of(record, where, "modality_type", "modality")),
            "question_type": str(record.get("question_type", "")),
        },
        about={"file": Path(where.rsplit("[", 1)[0]).stem},
    )


def _with_images(listed: list[BenchmarkQuestion], restricted: set[str]) -> list[BenchmarkQuestion]:
    """The questions without those of the files whose images nobody may hand on, where none of their images is there."""
    there = {question.about["file"] for question in listed if Path(question.image).exists()}
    absent = {question.about["file"] for question in listed} & restricted - there
    if not absent:
        return listed
    kept = [question for question in listed if question.about["file"] not in absent]
    note(
        f"omnimedvqa: {len(absent)} files of {_RESTRICTED} with {len(listed) - len(kept)} questions are left out, because none "
        f"of their images is here: {', '.join(sorted(absent)[:5])}{', ...' if len(absent) > 5 else ''}. Scores are those of the "
        "open-access part."
    )
    return kept


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
    needs="`QA_information/` and `Images/`, as `OmniMedVQA.zip` has them",
    url="https://huggingface.co/datasets/foreverbeliever/OmniMedVQA (open-access part; terms of each data set)",
    reported="QA score and prefix score; over data sets, by modality and by question type",
    questions=questions,
    score=score,
    metrics=metrics,
    order=5,
)
