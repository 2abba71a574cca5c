"""Long commands in processes of their own: what is logged, what is shown of a failure, and how the progress is read."""

from __future__ import annotations

import os
import sys

import pytest
from support.umed_runs import TWO_PROCESSES, environment

from umed_plugin.commands.processes import run_logged, what_went_wrong
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
    assert set(seen) == {(3, 9)}


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
