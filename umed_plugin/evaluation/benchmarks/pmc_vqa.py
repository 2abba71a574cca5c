"""PMC-VQA: questions about figures of biomedical papers, with four choices (choice) and without (blank).

Zhang et al. (arXiv 2305.10415). A CSV with ``Figure_path``, ``Question``, ``Choice A`` .. ``Choice D`` and ``Answer``; values may
begin with " A:". In ``test.csv`` and ``test_clean.csv`` the answer (in older files ``Anwser``) is a text, and ``Answer_label`` a
letter. In ``test_2.csv`` the answer is the letter, and there are ``index``, ``Caption`` and ``split`` too. The files are those of
xmcmic/PMC-VQA at b56ae59, whose README calls the newer ones ``test2.csv`` and ``images2.zip``.

In both tasks an answer counts as the choice with the highest difflib ratio to it, as in the authors' script
(xiaoman-zhang/PMC-VQA at 1678ec2). Departure: an answer that states a letter counts as that letter, and one that states several
as wrong. Their script looks at the last character alone, which suits models that were trained to answer with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umed_plugin.data.texts import read_rows
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import (
    Benchmark,
    BenchmarkQuestion,
    check_whole,
    existing_image,
    field_of,
    find_one,
    questions_of_rows,
)
from umed_plugin.evaluation.metrics.captions import bleu, bleu_counts, words
from umed_plugin.evaluation.metrics.choices import LETTERS, chosen_option, nearest_option, right_option
from umed_plugin.evaluation.metrics.metric import Metric, Row, means
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

_BLEU_1 = ("ngrams_shared_1", "ngrams_said_1", "words_said", "words_wanted")


def questions(root: Path, split: str, work: Path) -> list[BenchmarkQuestion]:
    """Two questions for each row: with the choices, and without."""
    file = find_one(root, ["test_clean.csv", "test_2.csv", "test.csv", "*test*.csv"], "pmc_vqa")
    folders = [root / name for name in ("images_2", "images_2/figures", "images2", "images", "figures", ".")]
    check_whole(file)
    head, *body = [row for row in read_rows(file) if row] or [[]]
    rows = ((f"{file}, row {number}", _record(head, row)) for number, row in enumerate(body, start=2))
    return questions_of_rows(rows, lambda row, where: _of_row(row, where, folders), "pmc_vqa")


def _record(head: Sequence[str], row: Sequence[str]) -> Any:
    """A row by its headers; a row with another number of cells has slipped, and is told as what it is."""
    return dict(zip(head, row)) if len(row) == len(head) else f"{len(row)} cells, and the header has {len(head)}"


def _of_row(record: dict[str, str], where: str, folders: Sequence[Path]) -> list[BenchmarkQuestion]:
    image = existing_image(folders, field_of(record, where, "Figure_path"), where)
    question = field_of(record, where, "Question").strip()
    choices = [_plain(field_of(record, where, f"Choice {letter}")) for letter in LETTERS[:4]]
    if not question or not all(choices):
        raise UmedError(f"{where}: its question or one of its choices is empty: {question!r}, {choices}.")
    right = _right(record, choices, where)
    options = " ".join(f"{letter}: {choice}" for letter, choice in zip(LETTERS, choices))
    about = {"choices": choices, "right": right}
    number = int(where.rsplit(" ", 1)[1]) - 2
    return [
        BenchmarkQuestion(
            f"{number}/{task}", image, text, choices[right], groups={"task": task, "part": task}, about=about
        )
        for task, text in (
            ("choice", f"Question: {question} Choices: {options} The Answer is:"),
            ("blank", f"Question: {question} The Answer is:"),
        )
    ]


def _plain(choice: str) -> str:
    return re.sub(r"^\s*[A-D]\s*:\s*", "", choice).strip()


def _right(record: dict[str, str], choices: Sequence[str], where: str) -> int:
    """Index of the right choice: by the answer's text; by its label where the answer is a letter or the text agrees with it."""
    label = (record.get("Answer_label") or "").strip()
    answer = str(field_of(record, where, "Answer", "Anwser", "Answer_label") or label).strip()
    right = right_option(answer, choices)
    if right is None and label:
        right = right_option(f"{label}: {_plain(answer)}", choices)
    if right is not None:
        return right
    raise UmedError(
        f"{where}: the answer {answer!r} is not one of the choices {list(choices)}, nor a letter from A to D."
    )


def score(question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> dict[str, float]:
    """Whether the right choice was meant; of a blank also the counts of BLEU-1."""
    choices, right = question.about["choices"], question.about["right"]
    if question.groups["task"] == "choice":
        return {"choice_accuracy": float(chosen_option(answer.text, choices) == right)}
    counts = bleu_counts(words(answer.text), words(question.truth))
    return {
        "blank_accuracy": float(nearest_option(answer.text, choices) == right),
        **{name: counts[name] for name in _BLEU_1},
    }


def metrics(rows: Sequence[Row]) -> list[Metric]:
    """Accuracy of both tasks, and BLEU-1 of the blanks."""
    return [
        *means("choice_accuracy", "blank_accuracy"),
        Metric("blank_bleu_1", lambda columns: bleu(columns, 1), _BLEU_1),
    ]


BENCHMARK = Benchmark(
    name="pmc_vqa",
    title="PMC-VQA, figures of biomedical papers",
    needs="`test_clean.csv` (or `test_2.csv`, `test.csv`) and its folder of figures",
    url="https://huggingface.co/datasets/xmcmic/PMC-VQA (CC BY-SA)",
    reported="choice and blank: accuracy by the nearest choice; blank: BLEU-1",
    questions=questions,
    score=score,
    metrics=metrics,
    order=3,
)
