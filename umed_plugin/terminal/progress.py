"""Progress of long work: bars on a terminal; elsewhere (nohup, Slurm, CI) lines, at the start and about every half minute.

A line names the step, how far it is, the rate, and the time that is left. ``--quiet`` turns both off.

How to run: ``with progress("writing", unit="byte") as advance: advance(done, total)``.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Optional, TypeVar

from umed_plugin.terminal.console import console as make_console
from umed_plugin.terminal.text import one_line

SECONDS = 30.0  # between two lines
_SHORT = 1.0  # seconds of a step whose end needs no line
_BAR, _SHORT_BAR, _WIDE = 40, 10, 140  # columns: of a bar, of a bar on a terminal that is not wide, of a wide one
_quiet = False

T = TypeVar("T")


def add_quiet_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--quiet``; `be_quiet` acts on it."""
    parser.add_argument("--quiet", action="store_true", help="show no progress: neither bars nor lines")


def be_quiet(quiet: bool) -> None:
    """Show no progress in this process, or show it again."""
    global _quiet
    _quiet = quiet


@contextmanager
def library_bars() -> Iterator[None]:
    """Inside, transformers shows its own bars only where ours are shown: on a terminal, without ``--quiet``.

    transformers is imported here, and not before: wrap what loads weights with it.
    """
    if make_console(stderr=True).is_terminal and not _quiet:
        yield
        return
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


class Steps:
    """The progress of one step after the other.

    Args:
        console: where to show it; by default standard error.
        transient: remove the bars at the end.
    """

    def __init__(self, console: Any = None, transient: bool = False) -> None:
        self.console = console if console is not None else make_console(stderr=True)
        silent, terminal = _quiet or self.console.quiet, self.console.is_terminal
        self._bars = _Bars(self.console, transient) if terminal and not silent else None
        self._lines = None if terminal or silent else _Lines(self.console)

    def __enter__(self) -> Steps:
        for shown in self._shown():
            shown.start()
        return self

    def __exit__(self, kind: Any, *exception: object) -> None:
        for shown in self._shown():
            shown.stop(failed=kind is not None)

    def begin(self, title: str, unit: str = "step", note: str = "") -> None:
        """End the previous step and begin one of unknown length.

        Args:
            title: of the step.
            unit: what is counted, in the singular; ``byte`` is shown as MB and GB.
            note: such as where its log is; shown as the step begins.
        """
        self.end()
        for shown in self._shown():
            shown.begin(title, unit, note)

    def update(self, done: int, total: Optional[int], status: str = "") -> None:
        """How far the step is; ``status`` is shown beside it."""
        for shown in self._shown():
            shown.update(done, total, status)

    def end(self) -> None:
        """End the step that has begun, if any."""
        for shown in self._shown():
            shown.end()

    def _shown(self) -> list[Any]:
        return [shown for shown in (self._bars, self._lines) if shown is not None]


@contextmanager
def progress(title: str, unit: str = "step", *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """The progress of one step, on standard error; gives a function of (done, total, status)."""
    if quiet or _quiet:
        yield lambda done, total, status="": None
        return
    with Steps(transient=True) as steps:
        steps.begin(title, unit)
        yield steps.update
        steps.end()


def tracked(items: Iterable[T], title: str, unit: str, total: Optional[int] = None) -> Iterator[T]:
    """The items, and the progress over them on standard error."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    with progress(title, unit) as advance:
        for number, item in enumerate(items):
            yield item
            advance(number + 1, total)


class _Bars:
    """On a terminal: a bar for each step."""

    def __init__(self, console: Any, transient: bool) -> None:
        from rich.progress import (
            BarColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column
        from rich.text import Text

        class Count(ProgressColumn):
            def render(self, task: Any) -> Text:
                return Text("" if task.total is None else _count(task.completed, task.total, task.fields["unit"]))

        def column(text: str) -> TextColumn:
            return TextColumn(text, markup=False, table_column=Column(no_wrap=False))

        # On a narrow terminal the bar is short, and title and status are wrapped; numbers stay whole.
        self._progress = Progress(
            column("{task.description}"),
            BarColumn(_BAR if console.width >= _WIDE else _SHORT_BAR),
            Count(table_column=Column(no_wrap=True)),
            column("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            transient=transient,
        )
        self._task: Any = None

    def start(self) -> None:
        self._progress.start()

    def stop(self, failed: bool) -> None:
        self._progress.stop()

    def begin(self, title: str, unit: str, note: str) -> None:
        if note:  # a line above the bars; it stays
            said = f"{one_line(title)}: {one_line(note)}"
            self._progress.console.print(said, markup=False, highlight=False, soft_wrap=True, style="dim")
        self._task = self._progress.add_task(one_line(title), total=None, unit=unit, status="")

    def update(self, done: int, total: Optional[int], status: str) -> None:
        self._progress.update(self._task, completed=done, total=total, status=one_line(status))

    def end(self) -> None:
        if self._task is not None:
            task = self._progress.tasks[self._task]
            self._progress.update(self._task, total=task.total or 1, completed=task.total or 1)
            self._progress.stop_task(self._task)
            self._task = None


class _Lines:
    """Without a terminal: lines. A thread writes them, because a step may be silent for long while a model is loaded."""

    def __init__(self, console: Any) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._tell_now_and_then, name="umed-progress", daemon=True)
        self._title: Optional[str] = None
        self._unit, self._began, self._done, self._status = "", 0.0, 0, ""
        self._total: Optional[int] = None
        self._said = time.monotonic()
        # Time, count and total at the first update: the base of the rate.
        self._first: Optional[tuple[float, int, Optional[int]]] = None

    def start(self) -> None:
        self._thread.start()

    def stop(self, failed: bool) -> None:
        self._stopped.set()
        self._thread.join(5)

    def begin(self, title: str, unit: str, note: str) -> None:
        with self._lock:
            self._title, self._unit, self._began = one_line(title), unit, time.monotonic()
            self._done, self._total, self._status, self._first = 0, None, "", None
            self._say("started" + (f"; {note}" if note else ""))

    def update(self, done: int, total: Optional[int], status: str) -> None:
        with self._lock:
            # Another count, such as an evaluation inside the training, or the first one of a resumed step.
            if self._first is None or done < self._first[1] or total != self._first[2]:
                self._first = (time.monotonic(), done, total)
            self._done, self._total, self._status = done, total, one_line(status)

    def end(self) -> None:
        with self._lock:
            seconds = time.monotonic() - self._began
            if self._title is not None and (seconds >= _SHORT or self._status):
                made = f": {_count(self._done, self._total, self._unit)}, {self._status}" if self._status else ""
                self._say(f"done in {duration(seconds)}{made}")
            self._title = None

    def _tell_now_and_then(self) -> None:
        while not self._stopped.wait(max(self._said + SECONDS - time.monotonic(), 0)):
            with self._lock:
                if time.monotonic() - self._said < SECONDS:  # a step has ended or begun meanwhile
                    continue
                if self._title is not None:
                    self._say(self._now())
                self._said = time.monotonic()

    def _now(self) -> str:
        now = time.monotonic()
        if self._first is None:
            return f"running for {duration(now - self._began)}"
        began, before, _ = self._first
        parts = [_count(self._done, self._total, self._unit)]
        if self._done > before and now > began:
            rate = (self._done - before) / (now - began)
            parts.append(_rate(rate, self._unit))
            if self._total:
                parts.append(f"{duration((self._total - self._done) / rate)} left")
        return ", ".join([*parts, self._status] if self._status else parts)

    def _say(self, text: str) -> None:
        print(f"umed: {self._title}: {text}", file=self._console.file, flush=True)
        self._said = time.monotonic()


def _count(done: int, total: Optional[int], unit: str) -> str:
    """``step 3 of 130 (2 %)``."""
    if unit == "byte":
        return (
            f"{done / 1e9:.2f} of {(total or 0) / 1e9:.2f} GB ({_percent(done, total)})"
            if total
            else f"{done / 1e9:.2f} GB"
        )
    return f"{unit} {done} of {total} ({_percent(done, total)})" if total else f"{done} {_plural(unit)}"


def _percent(done: int, total: Optional[int]) -> str:
    return f"{100 * done // (total or 1)} %"


def _rate(rate: float, unit: str) -> str:
    if unit == "byte":
        return f"{rate / 1e6:.0f} MB/s"
    return f"{rate:.1f} {_plural(unit)}/s" if rate >= 1 else f"{1 / rate:.1f} s per {unit}"


def _plural(unit: str) -> str:
    return f"{unit[:-1]}ies" if unit.endswith("y") else f"{unit}s"


def duration(seconds: float) -> str:
    """``2 h 05 min``, ``3 min 10 s`` or ``12 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
