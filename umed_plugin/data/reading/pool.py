"""A pool of processes that look at images, with results in order.

The processes are new ones (``spawn``), not forks: a fork of a process in which torch has threads can hang. They do not import the
main module again, so a script without ``if __name__ == "__main__"`` is not run a second time. They end with their parent,
however it ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import types
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable

from umed_plugin.errors import UmedError
from umed_plugin.terminal.silent_imports import SilentImports

# Images that a process gets at a time. A killed build reads at most these again, for each process twice.
_AT_A_TIME = 8
_AHEAD = 3  # such parts for each process that are begun before the first is used
_MOST = 8  # by default: more processes than this wait for the disk


def sensible_workers() -> int:
    """Number of processes by default: one for each CPU that this process may use, at most 8."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        count = os.cpu_count() or 1
    return max(1, min(count, _MOST))


def in_processes(function: Callable[[Any, Any], Any], parts: Sequence[Any], shared: Any, workers: int) -> Iterator[Any]:
    """``function(part, shared)`` of every part, in order, computed by ``workers`` processes.

    Args:
        function: of a module, so that another process can import it.
        shared: sent to each process once.

    Raises:
        UmedError: a process was ended from outside, such as for want of memory.
    """
    groups = [parts[start : start + _AT_A_TIME] for start in range(0, len(parts), _AT_A_TIME)]
    pool = ProcessPoolExecutor(
        min(workers, len(groups)), multiprocessing.get_context("spawn"), initializer=_begin, initargs=(function, shared)
    )
    begun: deque[tuple[Sequence[Any], Future[list[Any]]]] = deque()
    try:
        rest = iter(groups)
        while True:
            while len(begun) < workers * _AHEAD and (group := next(rest, None)) is not None:
                begun.append((group, _submit(pool, group)))
            if not begun:
                return
            group, future = begun.popleft()
            yield from _result(future, group, workers)
    finally:
        _end(pool)


def _submit(pool: ProcessPoolExecutor, group: Sequence[Any]) -> Future[list[Any]]:
    """Give a group to the pool, which may start a process for it."""
    try:
        with _without_main(), _without_ctrl_c():
            return pool.submit(_of_all, group)
    except BrokenProcessPool as error:
        broken: Future[list[Any]] = Future()
        broken.set_exception(error)
        return broken


def _result(future: Future[list[Any]], group: Sequence[Any], workers: int) -> list[Any]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise UmedError(
            f"a process that reads images was ended from outside while it read {group[0].path} or an image soon after it. Is "
            f"there too little memory for {workers} processes? Try fewer: --workers 1. What was read so far is kept."
        ) from error


def _end(pool: ProcessPoolExecutor) -> None:
    """End the processes at once: after an error or Ctrl-C nobody wants what they still do."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(5)


_function: Callable[[Any, Any], Any]
_shared: Any = None


def _begin(function: Callable[[Any, Any], Any], shared: Any) -> None:
    """What a process does first."""
    global _function, _shared
    _function, _shared = function, shared
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    sys.meta_path.insert(0, SilentImports())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _of_all(group: Sequence[Any]) -> list[Any]:
    return [_function(part, _shared) for part in group]


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hide the main module, which a new process would import: it may be a training script, or unguarded."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Hold Ctrl-C back while a process starts: it inherits this, so only its parent answers the key."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
