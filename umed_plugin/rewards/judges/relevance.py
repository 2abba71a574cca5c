"""Relevance by a language model: the reward ``relevance`` under ``--umed_judge openai:MODEL`` and ``replay:FILE``.

A candidate's score is that of the judge's reply, in 0..1. Where there is no reply, or one that is no score, it is ``None``: the
term is left out for that candidate, and ``judge/failed`` counts it. Replies that were paid for are kept, those that are no score
too, and not asked for again; what failed on the way is asked again when the same answer comes up again.

Departure from the paper: it does not publish its judge, prompt or scale; ours are in ``prompt.txt`` beside this file.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umed_plugin.errors import UmedError
from umed_plugin.flags import rewards
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.remote import settings
from umed_plugin.remote.ledger import Ledger, Owner
from umed_plugin.remote.replies import Answer, Failure, Reply
from umed_plugin.rewards.judges.question import NotAScoreError, Question, Questionnaire

if TYPE_CHECKING:
    from umed_plugin.remote.client import ModelClient

LEDGER = "judge.jsonl"
_OWNER = Owner("the judge", "Training stops", "--umed_judge_ledger")


class JudgedRelevance:
    """A reward (the contract is in :mod:`umed_plugin.rewards`) whose scores come from a judge.

    Args:
        questionnaire: what is asked.
        ledger: replies that are there already, and where new ones go.
        patience: batches in a row without one score after which the run is ended.
        budget: amount and unit (``requests``, ``tokens``, ``usd``) that all replies in the ledger together may reach.
        prices: US dollars for a million tokens read and written.
    """

    stop: str | None = None

    def __init__(
        self,
        questionnaire: Questionnaire,
        ledger: Ledger,
        *,
        patience: int,
        budget: tuple[float, str] | None = None,
        prices: tuple[float, float] | None = None,
    ) -> None:
        self._questionnaire, self._ledger, self._patience = questionnaire, ledger, patience
        self._budget, self._prices = budget, prices
        self._client: ModelClient | None = None
        self._asked: dict[str, Future[Answer]] = {}
        self._texts: dict[str, Mapping[str, str]] = {}
        self._new: Counter[str] = Counter()
        self._measured: dict[str, float] = {}
        self._batches_without_score = 0
        self._reasons_told: set[str] = set()
        self.measures = tuple(f"judge/{name}" for name in ("failed", "requests", "cached", "tokens", "wait_seconds"))
        # A budget that is spent in the middle of a step is not enforced in it: its other candidates would go without a score.
        self._spent_before = self._spent()
        if prices is not None:
            self.measures += ("judge/usd",)

    @classmethod
    def of(cls, flags: UmedFlags, output_dir: Path) -> JudgedRelevance:
        """The judge that the flags ask for.

        Raises:
            UmedError: the ledger cannot be used.
        """
        questionnaire = Questionnaire.read(
            rewards.prompt_file(flags), rewards.options(flags), flags.umed_judge_max_score
        )
        target = rewards.judge_target(flags)
        if rewards.judge_kind(flags) == rewards.REPLAY:
            return cls(
                questionnaire, Ledger(target, None, read_only=True, owner=_OWNER), patience=flags.umed_judge_patience
            )
        ledger = Ledger(flags.umed_judge_ledger or output_dir / LEDGER, target, owner=_OWNER)
        prices = rewards.prices(flags)
        judge = cls(
            questionnaire,
            ledger,
            patience=flags.umed_judge_patience,
            budget=rewards.budget(flags),
            prices=prices,
        )
        judge.connect(flags)
        return judge

    def connect(self, flags: UmedFlags) -> None:
        """Let questions that the ledger cannot answer go to the server; without this they fail."""
        from umed_plugin.remote.client import ModelClient

        self._client = ModelClient(
            rewards.judge_target(flags),
            base_url=flags.umed_judge_base_url,
            options=rewards.options(flags),
            concurrency=flags.umed_judge_concurrency,
            timeout=flags.umed_judge_timeout,
            retries=flags.umed_judge_retries,
            on_reply=self._keep,
        )

    def start(
        self, prompts: Sequence[str], completions: Sequence[str], *, record: Sequence[Any], **columns: Any
    ) -> None:
        """Send what the ledger cannot answer, each text once, and return.

        Raises:
            UmedError: there is something to send and the budget was spent before this run.
        """
        self._ledger.refresh()
        for question in self._questions(completions, record):
            if question.key in self._asked or self._ledger.get(question.key) is not None or self._client is None:
                continue
            if self._spent_before:
                raise UmedError(self._spent_before)
            self._texts[question.key] = question.texts
            self._asked[question.key] = self._client.ask(question.key, [{"role": "user", "content": question.text}])

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], *, record: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Scores in 0..1, ``None`` where there is none; waits for replies that are on their way.

        Raises:
            UmedError: no score came for ``patience`` batches, or the replies cannot be kept or counted.
        """
        self.start(prompts, completions, record=record)
        began = time.monotonic()
        scores: list[float | None] = []
        failures: list[str] = []
        for question in self._questions(completions, record):
            score, failure = self._score(question.key)
            scores.append(score)
            if failure:
                failures.append(failure)
        asked = len(self._asked)
        self._measured = {
            "judge/failed": len(failures) / max(len(scores), 1),
            "judge/requests": asked,
            "judge/cached": len(scores) - asked,
            "judge/tokens": sum(self._new.values()),
            "judge/wait_seconds": time.monotonic() - began,
        }
        if self._prices is not None:
            self._measured["judge/usd"] = self._cost(self._new)
        self._asked.clear()
        self._texts.clear()
        self._new.clear()
        self._look_after(scores, failures)
        return scores

    def measured(self) -> dict[str, float]:
        """Of the last call: share of failed judgements, texts sent, candidates that needed no request of their own, and so on."""
        return self._measured

    def _questions(self, completions: Sequence[str], record: Sequence[Any]) -> list[Question]:
        return [self._questionnaire.ask(item, text) for text, item in zip(completions, record)]

    def _score(self, key: str) -> tuple[float | None, str | None]:
        """Score of a question, or the reason why there is none."""
        if key in self._asked:
            answer = self._asked[key].result()
            if isinstance(answer, Failure):
                return None, answer.reason
        entry = self._ledger.get(key)
        if entry is None:
            return None, f"{self._ledger.path} has no reply for an answer"
        if entry.reply is None:
            return None, "the model refused or wrote nothing"
        try:
            return self._questionnaire.score(entry.reply), None
        except NotAScoreError as error:
            return None, str(error)

    def _keep(self, key: str, reply: Reply) -> None:
        """In the client's thread: write a reply down."""
        if not reply.usage and self._budget is not None and self._budget[1] != "requests":
            unit = self._budget[1]
            self._ledger.append(key, reply.text, {}, finish_reason=reply.finish_reason, **self._texts[key])
            raise UmedError(
                f"--umed_judge_budget is in {unit}, but the judge's server does not say how many tokens a reply took. "
                "Give the budget in requests, for example 5000requests."
            )
        self._ledger.append(key, reply.text, reply.usage, finish_reason=reply.finish_reason, **self._texts.pop(key))
        self._new.update(reply.usage)

    def _look_after(self, scores: Sequence[float | None], failures: Sequence[str]) -> None:
        """After a step: say what is new among the failures, and see whether the run can go on."""
        for reason in dict.fromkeys(failures):
            if len(self._reasons_told) < 10 and reason not in self._reasons_told:
                self._reasons_told.add(reason)
                print(f"umed: judge: {failures.count(reason)} of {len(scores)} without a score: {reason}", flush=True)
        self._batches_without_score = self._batches_without_score + 1 if len(failures) == len(scores) else 0
        if self._batches_without_score >= self._patience:
            raise UmedError(
                f"the judge gave no score at all in {self._batches_without_score} batches in a row, the last time because: "
                f"{failures[-1]}. Training would go on without relevance. Mend the judge and start the same command again: "
                f"replies so far are in {self._ledger.path}. Or give a larger --umed_judge_patience, or --umed_judge lexical."
            )
        self._ledger.refresh()
        self.stop = self._spent()

    def _spent(self) -> str | None:
        """That the budget is spent, with what to do; None while it is not."""
        if self._budget is None:
            return None
        limit, unit = self._budget
        spent = settings.spent(self._ledger.counts, unit, self._prices)
        if spent < limit:
            return None
        return (
            f"the judge's budget of {limit:g} {unit} is spent: the replies in {self._ledger.path} took {spent:g}. To go on, "
            "start the same command with a larger --umed_judge_budget."
        )

    def _cost(self, tokens: Mapping[str, int]) -> float:
        """US dollars."""
        return settings.cost(tokens, self._prices or (0.0, 0.0))
