"""SIGTERM and SIGHUP as exceptions, so that a command that is ended cleans up: its children end, half-written files go.

Slurm, Kubernetes and service managers send SIGTERM; a terminal that is closed sends SIGHUP. The exit status is 128 + the signal.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Ended(BaseException):
    """A signal asks this process to end. Like KeyboardInterrupt, no ``except Exception`` catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextmanager
def raised() -> Iterator[None]:
    """Raise `Ended` in the main thread on SIGTERM and SIGHUP. A signal that is ignored (nohup) or handled stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in _ENDING if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is _raise:
                signal.signal(number, signal.SIG_DFL)


@contextmanager
def held_back() -> Iterator[None]:
    """Ignore the signals and Ctrl-C for the seconds in which children are ended: impatience must not leave orphans."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (*_ENDING, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _raise(number: int, _frame: Any) -> None:
    raise Ended(number)
