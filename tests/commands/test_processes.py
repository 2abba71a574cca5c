"""Long commands in processes of their own: what is logged, what is shown of a failure, and how the progress is read."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time

import pytest
from support.umed_runs import TWO_PROCESSES, environment
from support.waiting import has_ended

from umed_plugin.commands import processes
from umed_plugin.commands.processes import importable, run_logged, what_went_wrong
from umed_plugin.commands.run_logs import metrics_beside_a_bar, steps_in
from umed_plugin.errors import UmedError

# Rank 1 fails by itself; rank 0 waits for it in a collective act and fails because of it.
FAILS = """
import os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
def deep():
    raise KeyError("the reason that a person needs")
if os.environ["RANK"] == "1":
    deep()
dist.barrier()
"""


@pytest.mark.llava
def test_the_traceback_of_the_process_that_failed_is_found_above_torchruns_own(tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    launch = [sys.executable, "-m", "torch.distributed.run", *TWO_PROCESSES[1:-2], str(tmp_path / "fails.py")]
    with pytest.raises(UmedError) as failed:
        run_logged(launch, tmp_path / "logs" / "run.log", "stage 1", environment=environment())
    told = str(failed.value)
    assert told.startswith("stage 1 ended with status 1. From ") and str(tmp_path / "logs" / "run.log") in told
    assert "KeyError: 'the reason that a person needs'" in told and "in deep" in told
    assert "ChildFailedError" not in told and "Connection" not in told
    whole = (tmp_path / "logs" / "run.log").read_text()
    assert "ChildFailedError" in whole and whole.startswith(f"{sys.executable} -m torch.distributed.run")


@pytest.mark.parametrize(
    ("code", "shown", "not_shown"),
    [
        ("import sys; print('noise'); sys.exit('umed: error: --x 3: wrong.\\n  - do this')", "  - do this", "noise"),
        ("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise OSError('second') from e", "second", "nothing"),
        ("import sys; print('the last words'); sys.exit(3)", "the last words", "Traceback"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL", "Traceback"),
    ],
    ids=["plain", "chained", "status", "killed"],
)
def test_what_a_failed_command_says_is_shown(code, shown, not_shown, tmp_path):
    with pytest.raises(UmedError) as failed:
        run_logged([sys.executable, "-c", code], tmp_path / "run.log", "the run")
    assert shown in str(failed.value) and not_shown not in str(failed.value)


def test_both_ends_of_a_chained_traceback_are_shown():
    text = "".join(
        [
            'Traceback (most recent call last):\n  File "a.py", line 1, in <module>\n    f()\nValueError: first\n',
            "\nThe above exception was the direct cause of the following exception:\n\n",
            'Traceback (most recent call last):\n  File "a.py", line 3, in <module>\n    g()\nOSError: second\n',
        ]
    )
    assert "first" in what_went_wrong(f"noise\n{text}tail\n") and "second" in what_went_wrong(f"noise\n{text}tail\n")


def test_a_second_run_is_added_to_the_log_and_only_its_own_words_are_shown(tmp_path):
    log = tmp_path / "run.log"
    run_logged([sys.executable, "-c", "print('Traceback of the first')"], log, "the run")
    with pytest.raises(UmedError) as failed:
        run_logged([sys.executable, "-c", "raise ValueError('of the second')"], log, "the run")
    assert "of the second" in str(failed.value) and "of the first" not in str(failed.value)
    assert "of the first" in log.read_text()


def test_the_progress_is_that_of_the_last_bar(tmp_path):
    code = "import time; print('3/9 [00:01', end='\\r', flush=True); time.sleep(0.5)"
    seen = []
    run_logged([sys.executable, "-c", code], tmp_path / "run.log", "the run", progress=lambda *now: seen.append(now))
    assert set(seen) == {(3, 9, "")}


def test_the_last_metrics_stay_beside_the_bar_until_there_are_others(tmp_path):
    """Also when the row is far above the end of the log, and the bar overwrites itself many times.

    The command goes on when its last bar has been shown.
    """
    code = """
import os, sys, time
def shown(step):
    while not os.path.exists(f"{sys.argv[1]}/{step}"): time.sleep(.02)
print({'loss': 0.0, 'reward/total': 1.25, 'reward/relevance': 0.5, 'kl': 0.0123, 'epoch': 1.0}, flush=True)
print('3/9 [00:01', end='\\r', flush=True); shown(3)
for _ in range(1000): print('4/9 [00:01', end='\\r')
print(flush=True); shown(4)
print({'loss': '0.0', 'reward/total': '1.5', 'kl': '0.02'}); print({'train_loss': 0.1}); print('9/9 [00:02')
"""
    seen = []

    def progress(*now):
        seen.append(now)
        (tmp_path / str(now[0])).touch()

    run_logged([sys.executable, "-c", code, str(tmp_path)], tmp_path / "run.log", "the run", progress=progress)
    assert list(dict.fromkeys(seen)) == [
        (3, 9, "reward/total 1.25, kl 0.0123"),
        (4, 9, "reward/total 1.25, kl 0.0123"),
        (9, 9, "reward/total 1.5, kl 0.02"),
    ]


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"loss": 2.4726, "learning_rate": 0.1}, "loss 2.47"),
        ({"loss": 0.0, "reward/total": -0.5}, "reward/total -0.5"),
        ({"loss": float("nan")}, "loss nan"),
        ({"val/localization": 0.4}, ""),
    ],
)
def test_beside_a_bar_stands_what_the_stage_is_after(row, shown):
    assert metrics_beside_a_bar(row) == shown


def test_ctrl_c_ends_the_command_too(tmp_path):
    pid = tmp_path / "pid"

    def interrupt(*_):
        raise KeyboardInterrupt

    code = (
        f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); print('1/2 [', flush=True); time.sleep(60)"
    )
    with pytest.raises(KeyboardInterrupt):
        run_logged([sys.executable, "-c", code], tmp_path / "run.log", "the run", progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# A command under a signal: the command, its launcher, and a worker in a session of its own that does not listen to SIGTERM.
WORKER = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(60)
"""
LAUNCHER = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", os.environ["WORKER"], sys.argv[1]], start_new_session=True)
print("7/9 [00:01", flush=True)
time.sleep(60)
"""
COMMAND = """
import os, sys
from pathlib import Path
from umed_plugin import cli
from umed_plugin.commands import processes

def run(args):
    launch = [sys.executable, "-c", os.environ["LAUNCHER"], sys.argv[2]]
    processes.run_logged(launch, Path(sys.argv[1]), "stage 1")
    return 0

processes._SECONDS_TO_END = 0.5
cli.add_commands = lambda parsers: parsers.add_parser("work").set_defaults(run=run)
sys.exit(cli.main(["work"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_command_and_every_process_below_it(number, tmp_path):
    log, pid = tmp_path / "run.log", tmp_path / "pid"
    variables = {**importable(), "LAUNCHER": LAUNCHER, "WORKER": WORKER}
    argv = [sys.executable, "-c", COMMAND, str(log), str(pid)]
    # Under nohup, these tests would hand down that SIGHUP is ignored.
    heed = functools.partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen(argv, env=variables, stderr=subprocess.PIPE, text=True, preexec_fn=heed)  # noqa: PLW1509 (no threads)
    end = time.monotonic() + 20
    while not (pid.is_file() and pid.read_text()):
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert error == ("umed: interrupted\n" if number == signal.SIGINT else f"umed: ended by {number.name}\n")
    assert has_ended(int(pid.read_text()))


def test_a_command_that_fails_leaves_no_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_SECONDS_TO_END", 0.5)
    pid, env = tmp_path / "pid", {**importable(), "WORKER": WORKER}
    launcher = LAUNCHER.replace(
        "time.sleep(60)",
        "\nwhile not (os.path.exists(sys.argv[1]) and open(sys.argv[1]).read()): time.sleep(.01)\nsys.exit(3)",
    )
    with pytest.raises(UmedError, match="status 3"):
        run_logged([sys.executable, "-c", launcher, str(pid)], tmp_path / "log", "the run", environment=env)
    assert has_ended(int(pid.read_text()))


def test_lines_of_our_own_commands_are_read_and_bars_of_loading_are_not():
    log = "Loading: 2/2 [00:01\numed: answering: question 30 of 400 (7 %), 2.0 questions/s\nLoading: 1/2 [00:01\n"
    assert steps_in(log, bars=False) == steps_in(log, bars=True) == (30, 400)
    assert steps_in("Loading: 2/2 [00:01", bars=False) is None
