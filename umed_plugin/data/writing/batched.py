"""The writer by the Batch API: all first requests in one batch, then all that follow from their replies, until none is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from umed_plugin.data.writing.account import Account
from umed_plugin.data.writing.estimate import TokenEstimate
from umed_plugin.data.writing.steps import MAX_REVISIONS, ImageTask, WriterRequest, WrittenDiagnosis
from umed_plugin.data.writing.writer import Outcome
from umed_plugin.remote.replies import Failure, Message, Reply, RequestResult, Unreadable

if TYPE_CHECKING:
    from umed_plugin.remote.batch_api import BatchClient


class BatchedWriter:
    """Writes diagnoses with one model, in batches.

    Args:
        account: as for `umed_plugin.data.writing.writer.DiagnosisWriter`; each batch is cut to what its budget allows.
    """

    def __init__(self, account: Account) -> None:
        self.account, self._ledger = account, account.ledger
        self._open: dict[str, tuple[WriterRequest, ImageTask]] = {}
        self._failures: dict[str, list[str]] = {}

    def run(
        self, tasks: Sequence[ImageTask], connect: Callable[[Callable[[str, RequestResult], None]], BatchClient]
    ) -> Outcome:
        """Process all images; returns when every image has an outcome or the run must stop.

        Args:
            tasks: images with lesions.
            connect: creates the client, given the function that keeps each result.

        Raises:
            UmedError: the server cannot be reached, or replies cannot be kept.
        """
        outcome = Outcome()
        client = connect(self._keep)
        # Open requests first: the results of an old batch are kept with the facts about their requests.
        self._update(tasks, outcome)
        client.finish_old()
        while True:
            self._update(tasks, outcome)
            chosen = self._within_budget(outcome)
            if not chosen:
                return outcome
            before = {key: len(self._failures.get(key, [])) for key in chosen}
            client.ask(self._messages(chosen))
            for key in chosen:  # a batch may expire before some of its requests have a result
                if self._ledger.get(key) is None and len(self._failures.get(key, [])) == before[key]:
                    self._failures.setdefault(key, []).append("not answered in its batch")

    def _update(self, tasks: Sequence[ImageTask], outcome: Outcome) -> None:
        """Record the outcome of images that have all their replies, and collect the next request of each other image."""
        self._open.clear()
        for task in tasks:
            name = task.record["id"]
            if name in outcome.written or name in outcome.set_aside or name in outcome.missing:
                continue
            step = task.next_step(self._ledger.get)
            if isinstance(step, WriterRequest):
                reasons = self._failures.get(step.key, [])
                if len(reasons) > MAX_REVISIONS:
                    outcome.missing[name] = reasons[-1]
                else:
                    self._open[step.key] = (step, task)
            elif isinstance(step, WrittenDiagnosis):
                outcome.written[name] = step
            else:
                outcome.set_aside[name] = step

    def _within_budget(self, outcome: Outcome) -> list[str]:
        """Keys of the open requests that the budget allows. If it allows none, all images that are left are missing."""
        if self.account.budget is None:
            return list(self._open)
        tokens, needed = TokenEstimate(self._ledger.entries()), Counter[str]()
        chosen, fault = [], None
        for key, (request, _) in self._open.items():
            needed.update(tokens.of(request))
            fault = self.account.over_budget(needed)
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

    def _keep(self, key: str, result: RequestResult) -> None:
        """Write a reply into the ledger once, whichever run's batch it was in."""
        if self._ledger.get(key) is not None:
            return
        facts: dict[str, object] = {}
        if key in self._open:
            request, task = self._open[key]
            facts = request.facts(task.record["id"])
        if isinstance(result, Reply):
            more = {"finish_reason": result.finish_reason, "answered_by": result.model, **facts}
            self._ledger.append(key, result.text, result.usage, **more)
        elif isinstance(result, Failure):
            self._failures.setdefault(key, []).append(result.reason)
            if isinstance(result, Unreadable):
                self._ledger.append(key, None, {}, lost=result.reason, **facts)
