"""Progress: lines where there is no terminal, a bar where there is one, and nothing when it is not wanted."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from umed_plugin.terminal import progress
from umed_plugin.terminal.console import console
from umed_plugin.terminal.progress import Steps, duration, tracked


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    yield
    progress.be_quiet(False)


def wait_for(text: str, shown: io.StringIO) -> None:
    end = time.monotonic() + 10
    while not re.search(text, shown.getvalue()):
        assert time.monotonic() < end, shown.getvalue()
        time.sleep(0.01)


def test_a_file_gets_lines_with_step_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    shown = io.StringIO()
    with Steps(console(file=shown)) as steps:
        steps.begin("stage 1", note="log: a.log")
        wait_for("stage 1: running for 0 s", shown)
        steps.update(10, 130)
        time.sleep(0.02)
        steps.update(20, 130)
        steps.update(20, 130, "loss 2.5")
        wait_for(r"umed: stage 1: step 20 of 130 \(15 %\), [\d.]+ steps/s, \d+ s left, loss 2\.5\n", shown)
        steps.begin("stage\x1b[2J\n2", "byte")
        steps.update(10**9, 2 * 10**9, "half\x07")
        wait_for(r"1\.00 of 2\.00 GB \(50 %\), half\\x07\n", shown)
        steps.begin("drawing", "study")
        steps.update(10, 130)
        time.sleep(0.02)
        steps.update(30, 130)
        wait_for(r"umed: drawing: study 30 of 130 \(23 %\), [\d.]+ studies/s, \d+ s left\n", shown)
    lines = shown.getvalue().splitlines()
    assert lines[0] == "umed: stage 1: started; log: a.log" and "umed: stage\\x1b[2J\\n2: started" in lines
    assert all(line.startswith(("umed: stage", "umed: drawing")) for line in lines)


def test_a_new_step_has_half_a_minute_before_its_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: the thread's work is done here, and the second step begins while it waits."""
    now, waited, shown = [0.0], [], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    steps = Steps(console(file=shown))
    steps.begin("stage 1")

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        if len(waited) == 1:
            now[0] = 20.0
            steps.begin("report")
            assert seconds == 30
            now[0] = 30.0
        else:
            now[0] += seconds
        return len(waited) > 2

    monkeypatch.setattr(steps._lines._stopped, "wait", wait)
    steps._lines._tell_now_and_then()
    assert waited == [30, 20, 30]
    started = ["stage 1: started", "stage 1: done in 20 s", "report: started"]
    assert shown.getvalue().splitlines() == [f"umed: {line}" for line in (*started, "report: running for 30 s")]


def test_a_resumed_step_is_timed_from_where_it_went_on(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    lines = progress._Lines(console(file=shown))
    lines.begin("stage 2", "step", "")
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines.update(1000, 1100, "")
    lines.update(1005, 1100, "")
    assert lines._now() == "step 1005 of 1100 (91 %), 2.0 s per step, 3 min 10 s left"


def test_a_terminal_gets_a_bar_and_no_lines() -> None:
    shown = io.StringIO()
    with Steps(console(file=shown, force_terminal=True, width=120)) as steps:
        steps.begin("[red]\x1b]0;owned\x07")
        steps.update(3, 9, "[bold]")
    text = shown.getvalue()
    assert "[red]\\x1b]0;owned\\x07" in text and "step 3 of 9 (33 %)" in text and "[bold]" in text
    assert "umed:" not in text and "\x07" not in text


def test_a_terminal_shows_once_where_the_log_is_and_the_metrics_beside_the_bar() -> None:
    shown = io.StringIO()
    with Steps(console(file=shown, force_terminal=True, width=120)) as steps:
        steps.begin("stage 2", note="log: /runs/logs/stage_2.log")
        steps.update(30, 1300, "reward/total 1.25, kl 0.0123")
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.getvalue())
    assert text.count("stage 2: log: /runs/logs/stage_2.log\n") == 1
    assert "step 30 of 1300 (2 %) reward/total 1.25, kl 0.0123" in text


def test_on_a_narrow_terminal_the_numbers_stay_whole() -> None:
    shown = io.StringIO()
    with Steps(console(file=shown, force_terminal=True, width=80)) as steps:
        steps.begin("stage 2: rewarding")
        steps.update(30, 1300, "reward/total 1.25, kl 0.0123")
    assert "step 30 of 1300 (2 %)" in shown.getvalue() and "0:00:00" in shown.getvalue()
    assert "0.0123" in shown.getvalue() and "\u2026" not in shown.getvalue()


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress.be_quiet(True)
    assert list(tracked([1, 2], "items", "item")) == [1, 2]
    with Steps(console(stderr=True)) as steps:
        steps.begin("one")
        steps.update(1, 2)
    assert capsys.readouterr() == ("", "")
    progress.be_quiet(False)
    assert list(tracked([1, 2], "items", "item")) == [1, 2]
    assert capsys.readouterr().err == "umed: items: started\n"


@pytest.mark.parametrize(("seconds", "shown"), [(12.4, "12 s"), (190, "3 min 10 s"), (7500, "2 h 05 min")])
def test_durations_are_read_at_a_glance(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.llava
@pytest.mark.parametrize(
    ("terminal", "quiet", "shown"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_transformers_shows_bars_only_where_ours_are_shown(
    terminal: bool, quiet: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    monkeypatch.setattr(progress, "make_console", lambda **how: console(file=io.StringIO(), force_terminal=terminal))
    progress.be_quiet(quiet)
    with progress.library_bars():
        assert logging.is_progress_bar_enabled() == shown
    assert logging.is_progress_bar_enabled(), "as it was before"


def test_progress_imports_no_transformers() -> None:
    code = "import sys, umed_plugin.terminal.progress; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
