"""Asks a vision model about every image, many at a time, and puts its texts into the records.

Every reply is in the ledger before it counts. A run that was killed, ran out of budget or met a server that failed is started
again with the same command and pays only for what is missing.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from umed_plugin.data.writing.account import Account
from umed_plugin.data.writing.estimate import TokenEstimate
from umed_plugin.data.writing.steps import MOST_AGAIN, Aside, ImageTask, Question, Step, Written
from umed_plugin.errors import UmedError
from umed_plugin.remote.replies import Answer, Failure, Reply, Unreadable

if TYPE_CHECKING:
    from umed_plugin.remote.client import ModelClient

# Failures in a row, retries included, after which the server is taken to be down.
PATIENCE = 10
# What no further try can mend: a wrong key, no permission, no such model.
HOPELESS = (401, 403, 404)


@dataclass
class Outcome:
    """What became of the images.

    Attributes:
        written: record id -> finished text.
        aside: record id -> the answer that did not pass.
        missing: record id -> why there is no answer yet.
        stopped: why not all were asked, or None.
    """

    written: dict[str, Written] = field(default_factory=dict)
    aside: dict[str, Aside] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None


class _Stopped(Exception):
    """The run ends before this question is asked."""


class DiagnosisWriter:
    """Writes diagnoses with one model.

    Args:
        account: with the replies that are there already; new ones are written to its ledger.
    """

    def __init__(self, account: Account) -> None:
        self.account, self._ledger = account, account.ledger
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._on_their_way: dict[str, Future[Answer]] = {}
        self._reserved: Counter[str] = Counter()
        self._facts: dict[str, dict[str, Any]] = {}
        self._tokens = TokenEstimate(account.ledger.entries())
        self._failures_in_a_row = 0
        self._stop: str | None = None
        self.again = 0

    def run(
        self,
        tasks: Sequence[ImageTask],
        connect: Callable[[Callable[[str, Reply], None]], ModelClient],
        concurrency: int,
        on_progress: Callable[[Outcome], None] = lambda outcome: None,
    ) -> Outcome:
        """Ask about all images, ``concurrency`` at a time; returns when none is left or the run must stop.

        Args:
            tasks: images with lesions.
            connect: makes the client, given what it is to do with each reply.
            concurrency: images that are worked on at the same time.
            on_progress: called after every image, in the caller's thread.

        Raises:
            UmedError: replies cannot be kept, or the budget's unit cannot be counted.
        """
        outcome = Outcome()
        client = connect(self._keep)
        waiting = iter(tasks)
        running: dict[Future[Step], ImageTask] = {}
        with ThreadPoolExecutor(concurrency, thread_name_prefix="umed-writing") as pool:
            try:
                while True:
                    while len(running) < concurrency and (task := next(waiting, None)) is not None:
                        running[pool.submit(self._work, task, client)] = task
                    if not running:
                        break
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        self._settle(running.pop(done), done, outcome)
                        on_progress(outcome)
            except BaseException:
                self._stop = "the run was interrupted"
                raise
            finally:
                client.close()
        outcome.stopped = self._stop
        return outcome

    def _settle(self, task: ImageTask, done: Future[Step], outcome: Outcome) -> None:
        name = task.record["id"]
        try:
            step = done.result()
        except _Stopped as stopped:
            outcome.missing[name] = str(stopped)
            return
        if isinstance(step, Written):
            outcome.written[name] = step
        elif isinstance(step, Aside):
            outcome.aside[name] = step

    def _work(self, task: ImageTask, client: ModelClient) -> Step:
        """Ask about one image until it is settled; in a thread of its own."""
        unreadable = 0
        while True:
            self._ledger.refresh()
            step = task.next_step(self._ledger.get)
            if not isinstance(step, Question):
                return step
            asked = self._ask(step, task, client)
            answer = asked.result() if asked is not None else None
            if isinstance(answer, Failure):
                self._count_failure(answer)
                unreadable += isinstance(answer, Unreadable)
                if not isinstance(answer, Unreadable) or unreadable > MOST_AGAIN:
                    raise _Stopped(answer.reason)
            elif answer is not None:
                self._failures_in_a_row = unreadable = 0

    def _ask(self, question: Question, task: ImageTask, client: ModelClient) -> Future[Answer] | None:
        """Send a question, or wait with another image that asks the very same; None when its reply has just come."""
        messages = question.messages()
        needs = self._tokens.of(question)
        with self._lock:
            while True:
                if self._ledger.get(question.key) is not None:
                    return None
                if question.key in self._on_their_way:
                    return self._on_their_way[question.key]
                fault = self._stop or self.account.no_room_for(self._reserved + Counter(needs))
                if fault is None:
                    break
                if self._stop is not None or not self._on_their_way:
                    self._stop = fault
                    raise _Stopped(fault)
                # What is on its way is counted at its worst: when it has come, there may be room.
                self._settled.wait()
            self.again += question.again > 0
            self._reserved.update(needs)
            self._facts[question.key] = {"record": task.record["id"], "stage": question.stage, "again": question.again}
            settled: Future[Answer] = Future()
            self._on_their_way[question.key] = settled
            future = client.ask(question.key, messages)
        # Who waits must find the question settled: waiters of `future` itself are woken before its callbacks run.
        future.add_done_callback(lambda done: self._arrived(question, needs, done, settled))
        return settled

    def _arrived(
        self, question: Question, needs: Mapping[str, int], done: Future[Answer], settled: Future[Answer]
    ) -> None:
        """In the client's thread, when a reply is kept or a question has failed."""
        with self._lock:
            self._on_their_way.pop(question.key, None)
            self._reserved.subtract(needs)
            facts = self._facts.pop(question.key)
            self._settled.notify_all()
        answer = None if done.cancelled() or done.exception() else done.result()
        if isinstance(answer, Unreadable):
            # It may have been paid for, and nothing says how much it took.
            usage = {name: needs[name] for name in ("prompt_tokens", "completion_tokens")}
            try:
                self._ledger.append(question.key, None, usage, lost=answer.reason, **facts)
            except UmedError as cannot_be_written:
                settled.set_exception(cannot_be_written)
                return
        if done.cancelled():
            settled.cancel()
        elif (error := done.exception()) is not None:
            settled.set_exception(error)
        else:
            settled.set_result(done.result())

    def _keep(self, key: str, reply: Reply) -> None:
        """In the client's thread: write a reply down."""
        facts = self._facts[key]
        self._ledger.append(
            key, reply.text, reply.usage, finish_reason=reply.finish_reason, answered_by=reply.model, **facts
        )
        self._tokens.learn(facts["stage"], reply.usage)
        budget = self.account.budget
        if not reply.usage and budget is not None and budget[1] != "requests":
            raise UmedError(
                f"--budget is in {budget[1]}, but the server does not say how many tokens a reply took. "
                "Give the budget in requests, for example 5000requests."
            )

    def _count_failure(self, failure: Failure) -> None:
        with self._lock:
            self._failures_in_a_row += 1
            if failure.status in HOPELESS:
                self._stop = self._stop or f"the server refuses: {failure.reason}"
            elif self._failures_in_a_row >= PATIENCE:
                self._stop = self._stop or f"{PATIENCE} requests in a row failed, the last: {failure.reason}"
