"""Run long commands as child processes, with a log, a progress bar, and the relevant error on failure.

If training under torchrun or DeepSpeed fails, the log ends with the launcher's traceback, which only says that a child failed.
The child's own traceback is somewhere above it; `what_went_wrong` finds it.

How to run: ``run_logged(["python", "-m", "llava.train.train_mem", ...], Path("run.log"), "training")``.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError

# "12/130 [00:05<00:51" of tqdm, which transformers' trainer uses too.
_STEP = re.compile(r"(\d+)/(\d+) \[")
_RANK = re.compile(r"^\[rank\d+\]:\s?", re.MULTILINE)
_SINGLE = r"Traceback \(most recent call last\):\n(?:(?:[ \t].*)?\n)+\S.*(?:\n(?!Traceback )\S.*){0,5}"
_CHAINED = r"\n\n(?:The above exception was|During handling of).*\n\n"
_TRACEBACK = re.compile(rf"^{_SINGLE}(?:{_CHAINED}{_SINGLE})*", re.MULTILINE)
_PLAIN_ERROR = re.compile(r"^umed(?:-run)?: error: .*(?:\n[ \t]+\S.*)*", re.MULTILINE)
# Errors that launchers and other ranks print as a consequence of the first failure.
_CONSEQUENCES = (
    "ChildFailedError",
    "CalledProcessError",
    "SignalException",
    "DistBackendError",
    "Connection closed by peer",
    "Connection reset by peer",
    "KeyboardInterrupt",
)
_LAST_LINES, _LONGEST = 15, 60


class Steps:
    """A progress bar per step, with its description."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self.task: Any = None

    def __enter__(self) -> Steps:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def begin(self, description: str) -> None:
        """Close the previous step's bar and open one of unknown length."""
        self.end()
        self.task = self.progress.add_task(description, total=None)

    def update(self, done: int, total: int) -> None:
        """Set the open bar."""
        self.progress.update(self.task, completed=done, total=total)

    def end(self) -> None:
        """Fill and close the open bar, if any."""
        if self.task is not None:
            task = self.progress.tasks[self.task]
            self.progress.update(self.task, total=task.total or 1, completed=task.total or 1)
            self.progress.stop_task(self.task)
            self.task = None


def run_logged(
    command: Sequence[str],
    log: Path,
    name: str,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run a command to its end; append the command and its output to ``log``.

    Args:
        command: argument list.
        log: file; it and its folder are created if missing.
        name: of the command, for the error.
        cwd: working folder; by default this process's.
        environment: by default this process's.
        progress: called with (steps done, steps in all), read from the last progress bar in the log.

    Raises:
        UmedError: it ended with a status other than 0; the message shows the relevant part of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as stream:
        stream.write(f"{shlex.join(command)}\n".encode())
        stream.flush()
        began = stream.tell()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=cwd, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                steps = _STEP.findall(read_from(log, max(began, log.stat().st_size - 6000))) if progress else []
                if steps and progress:
                    progress(int(steps[-1][0]), int(steps[-1][1]))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        raise UmedError(f"{name} {_ending(process.returncode)}. From {log}:\n{what_went_wrong(read_from(log, began))}")


def _ending(status: int) -> str:
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "was killed (SIGKILL), as Linux does when memory runs out"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def read_from(log: Path, start: int) -> str:
    """The log from byte ``start``, as text; tqdm's carriage returns become newlines."""
    with open(log, "rb") as stream:
        stream.seek(start)
        return stream.read().decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")


def what_went_wrong(printed: str) -> str:
    """The part of a failed command's output that gives the reason.

    That is an error message of this plugin if there is one; else the first traceback that is not a consequence of another rank's
    failure (the slowest rank may print it last); else the last lines.
    """
    plain = _RANK.sub("", printed)
    errors = _PLAIN_ERROR.findall(plain)
    if errors:
        return errors[0]
    tracebacks = [match.group(0) for match in _TRACEBACK.finditer(plain + "\n")]
    causes = [text for text in tracebacks if not any(word in _conclusion(text) for word in _CONSEQUENCES)]
    if causes:
        lines = causes[0].rstrip().splitlines()
        return "\n".join(lines if len(lines) <= _LONGEST else [lines[0], "  ...", *lines[-_LONGEST:]])
    return "\n".join([line for line in plain.splitlines() if line.strip()][-_LAST_LINES:])


def _conclusion(traceback: str) -> str:
    """The lines of a traceback with the exception: all after the last indented one."""
    lines = traceback.splitlines()
    last = max(index for index, line in enumerate(lines) if line[:1].isspace() or index == 0)
    return "\n".join(lines[last + 1 :])


def importable(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment (by default this process's) in which children can import the plugin, also from a checkout."""
    import umed_plugin

    environment = os.environ if environment is None else environment
    root = str(Path(umed_plugin.__file__).resolve().parent.parent)
    paths = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    return {**environment, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
