"""What VQA-RAD and SLAKE share: open and closed questions, scored as LLaVA-Med scores them, and closed ones corrected too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import BenchmarkQuestion, field_of, text_of
from umed_plugin.evaluation.metrics.llava_med import (
    closed_accuracy,
    closed_hit,
    closed_hit_batch,
    exact_match,
    open_accuracy,
    token_overlap,
)
from umed_plugin.evaluation.metrics.metric import RATE, Metric, Row, means, ratio
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer

OPEN, CLOSED = "OPEN", "CLOSED"


def open_answers(questions: Sequence[BenchmarkQuestion]) -> list[str]:
    """The reference answers of the open questions."""
    return [question.truth for question in questions if question.groups["answer_type"] == OPEN]


def question_of(record: dict[str, Any], where: str, image: str) -> BenchmarkQuestion:
    """A question of the fields ``qid``, ``question``, ``answer`` and ``answer_type``.

    Raises:
        UmedError: one of them is missing or empty, or ``answer_type`` is neither open nor closed.
    """
    kind = str(field_of(record, where, "answer_type")).strip().upper()
    if kind not in (OPEN, CLOSED):
        raise UmedError(f"{where}: answer_type is {kind!r}; allowed: {OPEN}, {CLOSED}.")
    return BenchmarkQuestion(
        id=str(field_of(record, where, "qid")),
        image=image,
        text=text_of(record, where, "question").strip(),
        truth=text_of(record, where, "answer").strip(),
        groups={"answer_type": kind},
    )


def score(question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> dict[str, float]:
    """LLaVA-Med's numbers of one answer; an open question and a closed one have different ones."""
    text, truth = answer.text, question.truth
    if question.groups["answer_type"] == OPEN:
        precision, recall, f1 = token_overlap(text, truth)
        return {
            "open_recall": recall,
            "open_precision": precision,
            "open_f1": f1,
            "open_exact_match": exact_match(text, truth),
            "open_accuracy": open_accuracy(text, truth),
        }
    hit, counted = closed_hit(text, truth)
    return {
        "closed_hit": hit,
        "closed_counted": counted,
        "closed_llava_med_batch": closed_hit_batch(text, truth),
        "closed_accuracy": closed_accuracy(text, truth),
    }


def metrics(rows: Sequence[Row]) -> list[Metric]:
    """Open recall, and three closed accuracies: two of LLaVA-Med's scripts, and the corrected one."""
    return [
        *means("open_recall"),
        Metric(
            "closed_llava_med", ratio("closed_hit", "closed_counted"), ("closed_hit", "closed_counted"), limits=RATE
        ),
        *means("closed_llava_med_batch", "closed_accuracy"),
        *means("open_accuracy", "open_precision", "open_f1", "open_exact_match"),
    ]


REPORTED = (
    "open: token recall (LLaVA-Med's), accuracy; closed: accuracy as LLaVA-Med's two scripts compute it, and corrected"
)
