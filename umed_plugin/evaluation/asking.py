"""Asks a model the questions of a benchmark in batches, and keeps the answers as they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion
from umed_plugin.evaluation.kept_answers import KeptAnswers
from umed_plugin.evaluation.questions import in_batches
from umed_plugin.faults import Faults, validated
from umed_plugin.grounding.dialects import LLAVA, BoxDialect
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import Examine, ImageQuestion, ModelAnswer

Progress = Callable[[int, int], None]


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


def ask(
    benchmark: Benchmark,
    questions: Sequence[BenchmarkQuestion],
    answerer: AnswersQuestions,
    kept: KeptAnswers | None,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
    checkpoint: str = "the checkpoint",
) -> dict[str, ModelAnswer]:
    """Answers by question id; those that are kept already are not asked for again.

    Batches are the same however many processes share them, and so are the answers. A process with a shard asks its own batches;
    what it returns also holds the answers of others that were kept when it started.

    Args:
        kept: where answers are written as they come; None: nowhere.
        batch_size: rows at a time: questions, or options of questions.
        progress: called with (questions done, questions in all).
        checkpoint: its name, for errors.

    Raises:
        UmedError: a likelihood is not finite, or a kept answer is damaged.
    """
    batches = in_batches(questions, batch_size)
    answers: dict[str, ModelAnswer] = {}
    if kept is not None:
        # A batch that is not whole is asked again, as it was the first time: answers may depend on it by rounding.
        known = {**kept.of_others(), **kept.lines}
        whole = [batch for batch in batches if all(question.id in known for question in batch)]
        kept.keep_only(question.id for batch in whole for question in batch)
        reused = {question.id: known[question.id] for batch in whole for question in batch}
        answers = answers_of(kept.path, reused, checkpoint)
    for batch in batches if kept is None or kept.shard is None else kept.shard.of(batches):
        if batch[0].id not in answers:
            new = _ask_batch(benchmark, batch, answerer, checkpoint)
            answers.update({question.id: answer for question, answer in zip(batch, new)})
            if kept is not None:
                kept.add([kept_line(*pair) for pair in zip(batch, new)])
        if progress is not None:
            progress(len(answers), len(questions))
    return answers


def _ask_batch(
    benchmark: Benchmark, batch: Sequence[BenchmarkQuestion], answerer: AnswersQuestions, checkpoint: str
) -> list[ModelAnswer]:
    questions = [ImageQuestion(q.image, q.text, q.options, q.options_after, q.write, q.reading) for q in batch]
    hook = benchmark.examine

    def examine(written: Sequence[int], prompts: Any, answers: Any) -> list[dict[str, Any]]:
        assert hook is not None
        return hook(answerer, [batch[index] for index in written], prompts, answers)

    answers = answerer.answer(questions) if hook is None else answerer.answer(questions, examine)
    for question, answer in zip(batch, answers):
        _check_finite(checkpoint, question.id, answer.losses)
    return answers


def _check_finite(where: str, identity: str, losses: Sequence[float | None]) -> None:
    """Refuse likelihoods that no metric can use: NaN is neither above nor below another, so any option could be the likeliest.

    Raises:
        UmedError: one of them is not finite.
    """
    if not all(loss is not None and math.isfinite(loss) for loss in losses):
        raise UmedError(
            f"{where}: question {identity!r}: its likelihoods are not finite ({', '.join(map(str, losses))}). The checkpoint has "
            "diverged, or overflows in float16: --dtype bfloat16 or float32."
        )


def answers_of(
    file: Path, lines: Mapping[str, Mapping[str, Any]], checkpoint: str = "the checkpoint"
) -> dict[str, ModelAnswer]:
    """The answers that `kept_line` has kept, by their questions' ids.

    Raises:
        UmedError: some were damaged after they were written, and each is named; or a likelihood is not finite.
    """
    from umed_plugin.evaluation.forms import KeptForm

    faults = Faults()
    for identity, line in lines.items():
        validated(KeptForm, line, f"{file}: question {identity!r}: ", faults)
    faults.raise_if_any(f"{file} is damaged (remedy: remove the file to ask everything again)")
    for identity, line in lines.items():
        _check_finite(f"{checkpoint}, answers kept in {file}", identity, line["losses"])
    return {
        identity: ModelAnswer(line["answer"], line["losses"], line.get("examined")) for identity, line in lines.items()
    }


def kept_line(question: BenchmarkQuestion, answer: ModelAnswer) -> dict[str, Any]:
    """What is kept of an answer before it is scored: the first part of its line in ``predictions.jsonl``."""
    line = {
        "id": question.id,
        "image": question.image,
        "question": question.options_after if question.text is None else question.text,
        "answer": answer.text,
        "truth": question.truth,
        "options": list(question.options),
        "losses": answer.losses,
        "groups": dict(question.groups),
    }
    return line if answer.examined is None else {**line, "examined": answer.examined}
