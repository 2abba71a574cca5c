"""Requests the diagnoses of all images from a vision model, many at a time.

Every reply is in the ledger before it is used. If a run was killed, exhausted its budget or met a failing server, the same
command continues it and pays only for what is missing.
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
from umed_plugin.data.writing.steps import MAX_REVISIONS, ImageTask, SetAside, Step, WriterRequest, WrittenDiagnosis
from umed_plugin.errors import UmedError
from umed_plugin.remote.replies import Failure, Reply, RequestResult, Unreadable

if TYPE_CHECKING:
    from umed_plugin.remote.client import ModelClient

# After this many consecutive failures, each with all its retries, the server is considered down.
PATIENCE = 10
# HTTP statuses that no retry can fix: wrong key, no permission, no such model.
PERMANENT_FAILURES = (401, 403, 404)


@dataclass
class Outcome:
    """What became of the images of a run.

    Attributes:
        written: record id -> finished text.
        set_aside: record id -> the reply that did not pass the checks.
        missing: record id -> why there is no finished text yet.
        stopped: why the run ended before all images were processed, or None.
    """

    written: dict[str, WrittenDiagnosis] = field(default_factory=dict)
    set_aside: dict[str, SetAside] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None


class _Stopped(Exception):
    """The run ends before this request is sent."""


class DiagnosisWriter:
    """Writes diagnoses with one model.

    Args:
        account: the ledger with earlier replies, to which new ones are added, and its budget.

    Attributes:
        revisions: number of requests for a better text, because a reply failed its checks.
    """

    def __init__(self, account: Account) -> None:
        self.account, self._ledger = account, account.ledger
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._in_flight: dict[str, Future[RequestResult]] = {}
        self._reserved: Counter[str] = Counter()
        self._facts: dict[str, dict[str, Any]] = {}
        self._tokens = TokenEstimate(account.ledger.entries())
        self._consecutive_failures = 0
        self._stop: str | None = None
        self.revisions = 0

    def run(
        self,
        tasks: Sequence[ImageTask],
        connect: Callable[[Callable[[str, Reply], None]], ModelClient],
        concurrency: int,
        on_progress: Callable[[Outcome], None] = lambda outcome: None,
    ) -> Outcome:
        """Process all images, ``concurrency`` at a time; returns when every image has an outcome or the run must stop.

        Args:
            tasks: images with lesions.
            connect: creates the client, given the function that keeps each reply.
            concurrency: number of images that are processed at the same time.
            on_progress: called after every image, in the caller's thread.

        Raises:
            UmedError: replies cannot be kept, or the server does not count the budget's unit.
        """
        outcome = Outcome()
        client = connect(self._keep)
        waiting = iter(tasks)
        running: dict[Future[Step], ImageTask] = {}
        with ThreadPoolExecutor(concurrency, thread_name_prefix="umed-writing") as pool:
            try:
                while True:
                    while len(running) < concurrency and (task := next(waiting, None)) is not None:
                        running[pool.submit(self._process, task, client)] = task
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
        if isinstance(step, WrittenDiagnosis):
            outcome.written[name] = step
        elif isinstance(step, SetAside):
            outcome.set_aside[name] = step

    def _process(self, task: ImageTask, client: ModelClient) -> Step:
        """Send requests about one image until it has an outcome; runs in a thread of its own."""
        unreadable = 0
        while True:
            self._ledger.refresh()
            step = task.next_step(self._ledger.get)
            if not isinstance(step, WriterRequest):
                return step
            future = self._send(step, task, client)
            result = future.result() if future is not None else None
            if isinstance(result, Failure):
                self._count_failure(result)
                unreadable += isinstance(result, Unreadable)
                if not isinstance(result, Unreadable) or unreadable > MAX_REVISIONS:
                    raise _Stopped(result.reason)
            elif result is not None:
                self._consecutive_failures = unreadable = 0

    def _send(self, request: WriterRequest, task: ImageTask, client: ModelClient) -> Future[RequestResult] | None:
        """Send a request, or share one with the same key that is in flight; None if its reply has just arrived.

        Images are drawn only for a request that is sent: a run that has stopped goes on to the images that have all replies.
        """
        needs = self._tokens.of(request)
        with self._lock:
            while True:
                if self._ledger.get(request.key) is not None:
                    return None
                if request.key in self._in_flight:
                    return self._in_flight[request.key]
                fault = self._stop or self.account.over_budget(self._reserved + Counter(needs))
                if fault is None:
                    break
                if self._stop is not None or not self._in_flight:
                    self._stop = fault
                    raise _Stopped(fault)
                # Requests in flight reserve their expected cost. When one settles, the budget may allow this request.
                self._settled.wait()
            self.revisions += request.revision > 0
            self._reserved.update(needs)
            self._facts[request.key] = request.facts(task.record["id"])
            settled: Future[RequestResult] = Future()
            self._in_flight[request.key] = settled
        try:
            messages = request.messages()
            if self._stop is not None:  # meanwhile
                raise _Stopped(self._stop)
            future = client.ask(request.key, messages)
        except BaseException as error:
            self._release(request, needs)
            settled.set_exception(error)  # for threads that share the request
            raise
        # Threads wait for `settled`, not for `future`: a future wakes its waiters before it calls its callbacks, and they must
        # find the request settled.
        future.add_done_callback(lambda done: self._arrived(request, needs, done, settled))
        return settled

    def _release(self, request: WriterRequest, needs: Mapping[str, int]) -> dict[str, Any]:
        """Take a request out of those in flight, with what it reserved; returns its facts."""
        with self._lock:
            self._in_flight.pop(request.key, None)
            self._reserved.subtract(needs)
            self._settled.notify_all()
            return self._facts.pop(request.key)

    def _arrived(
        self,
        request: WriterRequest,
        needs: Mapping[str, int],
        done: Future[RequestResult],
        settled: Future[RequestResult],
    ) -> None:
        """In the client's thread: a reply has been kept, or the request has failed."""
        facts = self._release(request, needs)
        result = None if done.cancelled() or done.exception() else done.result()
        if isinstance(result, Unreadable):
            # It may have been paid for, and nothing says how many tokens it took.
            usage = {name: needs[name] for name in ("prompt_tokens", "completion_tokens")}
            try:
                self._ledger.append(request.key, None, usage, lost=result.reason, **facts)
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
        """In the client's thread: write a reply into the ledger."""
        facts = self._facts[key]
        self._ledger.append(
            key, reply.text, reply.usage, finish_reason=reply.finish_reason, answered_by=reply.model, **facts
        )
        self._tokens.learn(facts["stage"], reply.usage)
        budget = self.account.budget
        if not reply.usage and budget is not None and budget[1] != "requests":
            raise UmedError(
                f"--budget is in {budget[1]}, but the server does not report how many tokens a reply took. "
                "Give the budget in requests, for example 5000requests."
            )

    def _count_failure(self, failure: Failure) -> None:
        with self._lock:
            self._consecutive_failures += 1
            if failure.status in PERMANENT_FAILURES:
                self._stop = self._stop or f"the server refuses: {failure.reason}"
            elif self._consecutive_failures >= PATIENCE:
                self._stop = self._stop or f"{PATIENCE} consecutive requests failed, the last one: {failure.reason}"
