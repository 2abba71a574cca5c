"""Relevance by a language model: the reward ``relevance`` under ``--umed_judge openai:MODEL`` and ``replay:FILE``.

A candidate's score is the one in the judge's reply, in 0..1. Without a reply, or with one that holds no score, it is ``None``:
the term is left out for that candidate, and ``judge/failed`` counts it. Every reply that was paid for is kept, also one without a
score, and is not requested again. A request that failed is repeated when the same answer comes up again.

Departure from the paper: its judge, prompt and scale are not published; ours are in ``prompt.txt`` beside this file.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umed_plugin.errors import UmedError, note
from umed_plugin.flags import rewards as judge_flags
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.flags.names import REPLAY
from umed_plugin.grounding.answer_types import asks_for_names
from umed_plugin.remote import settings
from umed_plugin.remote.ledger import Ledger, LedgerUser
from umed_plugin.remote.replies import Failure, Reply, RequestResult
from umed_plugin.rewards.judges.question import JudgeQuestion, NotAScoreError, Questionnaire

if TYPE_CHECKING:
    from umed_plugin.remote.client import ModelClient

LEDGER = "judge.jsonl"
_LEDGER_USER = LedgerUser("the judge", "Training stops", "--umed_judge_ledger")


class JudgedRelevance:
    """A reward (the contract is in :mod:`umed_plugin.rewards`) whose scores come from a judge.

    Args:
        questionnaire: writes the questions and reads the replies.
        ledger: earlier replies, to which new ones are added.
        patience: number of consecutive rollouts without any score after which the run ends. `end_rollout` ends each; under
            ``--umed_dynamic_sampling`` it may have several calls.
        budget: amount and unit (``requests``, ``tokens``, ``usd``) that all replies in the ledger together may reach; in ``usd``
            those of the ledger's model.
        prices: US dollars per million input and output tokens.
    """

    stop: str | None = None
    applies_to = staticmethod(asks_for_names)

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
        self._pending: dict[str, Future[RequestResult]] = {}
        self._texts: dict[str, Mapping[str, str]] = {}
        self._new: Counter[str] = Counter()
        self._metrics: dict[str, float] = {}
        self._has_score_in_rollout = False
        self._failures_in_rollout: list[str] = []
        self._rollouts_without_score = 0
        self._noted_reasons: set[str] = set()
        self.metric_names = tuple(
            f"judge/{name}" for name in ("failed", "requests", "cached", "tokens", "wait_seconds")
        )
        # A budget that runs out in the middle of a step lets the step finish, or its other candidates would have no score.
        self._spent_before = self._spent()
        if prices is not None:
            self.metric_names += ("judge/usd",)

    @classmethod
    def of(cls, flags: UmedFlags, output_dir: Path) -> JudgedRelevance:
        """The judge that ``--umed_judge`` names, with its ledger in ``output_dir`` unless a flag says otherwise.

        Raises:
            UmedError: the ledger cannot be used.
        """
        questionnaire = Questionnaire.read(
            judge_flags.prompt_file(flags), judge_flags.options(flags), flags.umed_judge_max_score
        )
        target = flags.judge_target()
        if flags.judge_kind() == REPLAY:
            return cls(
                questionnaire,
                Ledger(target, None, read_only=True, user=_LEDGER_USER),
                patience=flags.umed_judge_patience,
            )
        ledger = Ledger(flags.umed_judge_ledger or output_dir / LEDGER, target, user=_LEDGER_USER)
        prices = judge_flags.prices(flags)
        judge = cls(
            questionnaire,
            ledger,
            patience=flags.umed_judge_patience,
            budget=judge_flags.budget(flags),
            prices=prices,
        )
        judge.connect(flags)
        return judge

    def connect(self, flags: UmedFlags) -> None:
        """Send questions that the ledger cannot answer to the server; without this they fail."""
        from umed_plugin.remote.client import ModelClient

        server = settings.ServerSettings(
            model=flags.judge_target(),
            base_url=flags.umed_judge_base_url,
            options=judge_flags.options(flags),
            timeout=flags.umed_judge_timeout,
            retries=flags.umed_judge_retries,
        )
        self._client = ModelClient(server, self._keep, concurrency=flags.umed_judge_concurrency)

    def start(
        self, prompts: Sequence[str], completions: Sequence[str], *, record: Sequence[Any], **columns: Any
    ) -> None:
        """Send the questions that the ledger cannot answer, each text once, and return without waiting.

        Raises:
            UmedError: there is a question to send, and the budget was already spent before this run. Stage 2 saves a checkpoint.
        """
        self._ledger.refresh()
        for question in self._questions(completions, record):
            if question.key in self._pending or self._ledger.get(question.key) is not None or self._client is None:
                continue
            if self._spent_before:
                raise UmedError(self._spent_before)
            self._texts[question.key] = question.texts
            self._pending[question.key] = self._client.ask(question.key, [{"role": "user", "content": question.text}])

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], *, record: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Scores in 0..1, or ``None`` where there is none; waits for pending replies.

        Raises:
            UmedError: the replies cannot be stored or counted. Stage 2 saves what it learnt before, see
                `umed_plugin.training.stopping`.
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
        asked = len(self._pending)
        self._metrics = {
            "judge/failed": len(failures) / max(len(scores), 1),
            "judge/requests": asked,
            "judge/cached": len(scores) - asked,
            "judge/tokens": sum(self._new.values()),
            "judge/wait_seconds": time.monotonic() - began,
        }
        if self._prices is not None:
            self._metrics["judge/usd"] = self._cost(self._new)
        self._pending.clear()
        self._texts.clear()
        self._new.clear()
        self._note_new_reasons(failures, len(scores))
        self._has_score_in_rollout |= len(failures) < len(scores)
        self._failures_in_rollout += failures
        self._ledger.refresh()
        self.stop = self._spent()
        of_asked = iter(scores)
        return [next(of_asked) if self.applies_to(item) else None for item in record]

    def metrics(self) -> dict[str, float]:
        """Of the last call: share of candidates without a score, requests sent, candidates that needed no request, and so on."""
        return self._metrics

    def _questions(self, completions: Sequence[str], record: Sequence[Any]) -> list[JudgeQuestion]:
        pairs = zip(completions, record)
        return [self._questionnaire.ask(item, text) for text, item in pairs if self.applies_to(item)]

    def _score(self, key: str) -> tuple[float | None, str | None]:
        """The score of a question, or the reason why there is none."""
        if key in self._pending:
            result = self._pending[key].result()
            if isinstance(result, Failure):
                return None, result.reason
        entry = self._ledger.get(key)
        if entry is None:
            return None, f"{self._ledger.path} has no reply for an answer"
        if entry.reply is None:
            return None, "the model refused or returned no text"
        try:
            return self._questionnaire.score(entry.reply), None
        except NotAScoreError as error:
            return None, str(error)

    def _keep(self, key: str, reply: Reply) -> None:
        """Store a reply; runs in the client's thread."""
        if not reply.usage and self._budget is not None and self._budget[1] != "requests":
            unit = self._budget[1]
            self._ledger.append(key, reply.text, {}, finish_reason=reply.finish_reason, **self._texts[key])
            raise UmedError(
                f"--umed_judge_budget is in {unit}, but the judge's server does not report how many tokens a reply used. "
                "Give the budget in requests, for example 5000requests."
            )
        self._ledger.append(key, reply.text, reply.usage, finish_reason=reply.finish_reason, **self._texts.pop(key))
        self._new.update(reply.usage)

    def _note_new_reasons(self, failures: Sequence[str], n_scores: int) -> None:
        """Report reasons of failures that were not reported before, at most ten of them in a run."""
        for reason in dict.fromkeys(failures):
            if len(self._noted_reasons) < 10 and reason not in self._noted_reasons:
                self._noted_reasons.add(reason)
                note(f"judge: {failures.count(reason)} of {n_scores} without a score: {reason}")

    def end_rollout(self) -> None:
        """Count a rollout in which there were answers to score, and none has a score.

        Raises:
            UmedError: it was the last of ``patience`` consecutive ones.
        """
        failures, has_score = self._failures_in_rollout, self._has_score_in_rollout
        self._failures_in_rollout, self._has_score_in_rollout = [], False
        without = bool(failures) and not has_score
        self._rollouts_without_score = self._rollouts_without_score + 1 if without else 0
        if self._rollouts_without_score >= self._patience:
            count = self._rollouts_without_score
            rollouts = "a rollout" if count == 1 else f"{count} consecutive rollouts"
            raise UmedError(
                f"the judge returned no score in {rollouts}. Last reason: {failures[-1]}. "
                f"Training would go on without relevance. Fix the judge and run the same command again; {self._ledger.path} "
                "holds the replies so far. Or use a larger --umed_judge_patience, or --umed_judge lexical."
            )

    def _spent(self) -> str | None:
        """The message that the budget is spent; None while it is not."""
        if self._budget is None:
            return None
        limit, unit = self._budget
        spent = settings.spent(self._ledger.counts_in(unit), unit, self._prices)
        if spent < limit:
            return None
        of_model = f" of {self._ledger.model}" if unit == "usd" else ""
        return (
            f"the judge's budget of {limit:g} {unit} is spent: the replies{of_model} in {self._ledger.path} used {spent:g}. "
            "To continue, run the same command with a larger --umed_judge_budget."
        )

    def _cost(self, tokens: Mapping[str, int]) -> float:
        """US dollars."""
        return settings.cost(tokens, self._prices or (0.0, 0.0))
