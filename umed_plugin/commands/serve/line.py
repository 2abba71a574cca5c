"""A first-come, first-served queue for the model. Each waiting request learns how many are before it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TELL_EVERY = 1.0  # seconds; telling fails if the browser has disconnected


class Line:
    """The requests that wait for the model."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tickets: deque[object] = deque()

    @contextmanager
    def turn(self, tell: Callable[[int], None]) -> Iterator[None]:
        """Wait until it is this request's turn, and hold the model inside the ``with`` block.

        Args:
            tell: called with the number of requests before this one, at least once a second; an exception from it ends the wait.
        """
        ticket = object()
        with self._changed:
            self._tickets.append(ticket)
        try:
            while before := self._before(ticket):
                tell(before)
                with self._changed:
                    if self._tickets[0] is not ticket:
                        self._changed.wait(_TELL_EVERY)
            yield
        finally:
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()

    def _before(self, ticket: object) -> int:
        with self._changed:
            return self._tickets.index(ticket)
