"""The writer by the Batch API: all first requests in one batch, then all that follow from their replies, until none is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from umed_plugin.data.writing.account import Account
from umed_plugin.data.writing.estimate import TokenEstimate
from umed_plugin.data.writing.steps import MOST_AGAIN, ImageTask, Question, Written
from umed_plugin.data.writing.writer import Outcome
from umed_plugin.remote.replies import Answer, Failure, Message, Reply, Unreadable

if TYPE_CHECKING:
    from umed_plugin.remote.batch_api import BatchClient


class BatchedWriter:
    """Writes diagnoses with one model, in batches.

    Args:
        account: as of `umed_plugin.data.writing.writer.DiagnosisWriter`; a batch is cut to what its budget allows.
    """

    def __init__(self, account: Account) -> None:
        self.account, self._ledger = account, account.ledger
        self._open: dict[str, tuple[Question, ImageTask]] = {}
        self._failures: dict[str, list[str]] = {}

    def run(
        self, tasks: Sequence[ImageTask], connect: Callable[[Callable[[str, Answer], None]], BatchClient]
    ) -> Outcome:
        """Ask about all images; returns when none is left or the run must stop.

        Raises:
            UmedError: the server cannot be asked, or replies cannot be kept.
        """
        outcome = Outcome()
        client = connect(self._keep)
        self._look_ahead(tasks, outcome)
        client.finish_old()
        while True:
            self._look_ahead(tasks, outcome)
            chosen = self._what_fits(outcome)
            if not chosen:
                break
            before = {key: len(self._failures.get(key, [])) for key in chosen}
            client.ask(self._messages(chosen))
            for key in chosen:  # a batch may expire with some of its questions neither answered nor refused
                if self._ledger.get(key) is None and len(self._failures.get(key, [])) == before[key]:
                    self._failures.setdefault(key, []).append("not answered in its batch")
        return outcome

    def _look_ahead(self, tasks: Sequence[ImageTask], outcome: Outcome) -> None:
        """Settle images that have all their replies, and find the next question about each of the others."""
        self._open.clear()
        for task in tasks:
            name = task.record["id"]
            if name in outcome.written or name in outcome.aside or name in outcome.missing:
                continue
            step = task.next_step(self._ledger.get)
            if isinstance(step, Question):
                tries = self._failures.get(step.key, [])
                if len(tries) > MOST_AGAIN:
                    outcome.missing[name] = tries[-1]
                else:
                    self._open[step.key] = (step, task)
            elif isinstance(step, Written):
                outcome.written[name] = step
            else:
                outcome.aside[name] = step

    def _what_fits(self, outcome: Outcome) -> list[str]:
        """Keys of the open questions that the budget has room for; without room, all images that are left are missing."""
        if self.account.budget is None:
            return list(self._open)
        tokens, wanted = TokenEstimate(self._ledger.entries()), Counter[str]()
        chosen, fault = [], None
        for key, (question, _) in self._open.items():
            wanted.update(tokens.of(question))
            fault = self.account.no_room_for(wanted)
            if fault is not None:
                break
            chosen.append(key)
        if fault is not None and not chosen:
            outcome.stopped = fault
            for _, task in self._open.values():
                outcome.missing[task.record["id"]] = outcome.stopped
        return chosen

    def _messages(self, keys: Sequence[str]) -> Iterator[tuple[str, list[Message]]]:
        for key in keys:
            yield key, self._open[key][0].messages()

    def _keep(self, key: str, answer: Answer) -> None:
        """Write a reply down once, whichever run's batch it was in."""
        if self._ledger.get(key) is not None:
            return
        facts: dict[str, object] = {}
        if key in self._open:
            question, task = self._open[key]
            facts = {"record": task.record["id"], "stage": question.stage, "again": question.again}
        if isinstance(answer, Reply):
            more = {"finish_reason": answer.finish_reason, "answered_by": answer.model, **facts}
            self._ledger.append(key, answer.text, answer.usage, **more)
        elif isinstance(answer, Failure):
            self._failures.setdefault(key, []).append(answer.reason)
            if isinstance(answer, Unreadable):
                self._ledger.append(key, None, {}, lost=answer.reason, **facts)
