"""Commands that take long: run in a process of their own, with what they print in a log, a progress bar, and their error found.

Training under torchrun or DeepSpeed ends with the launcher's own traceback, which says no more than that a child has failed; the
child's stands somewhere above it. `what_went_wrong` finds that one.

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

# tqdm's "12/130 [00:05<00:51": its own bars and those of transformers' trainer.
_STEP = re.compile(r"(\d+)/(\d+) \[")
_RANK = re.compile(r"^\[rank\d+\]:\s?", re.MULTILINE)
_ONE = r"Traceback \(most recent call last\):\n(?:(?:[ \t].*)?\n)+\S.*(?:\n(?!Traceback )\S.*){0,5}"
_CHAINED = r"\n\n(?:The above exception was|During handling of).*\n\n"
_TRACEBACK = re.compile(rf"^{_ONE}(?:{_CHAINED}{_ONE})*", re.MULTILINE)
_SAID_PLAINLY = re.compile(r"^umed(?:-run)?: error: .*(?:\n[ \t]+\S.*)*", re.MULTILINE)
# What launchers and the other processes of a run print because of the first one's failure.
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
    """One progress bar for each step, with what is being done."""

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
        """Close the bar of the step before and open one of unknown length."""
        self.end()
        self.task = self.progress.add_task(description, total=None)

    def update(self, done: int, total: int) -> None:
        """Set the open bar."""
        self.progress.update(self.task, completed=done, total=total)

    def end(self) -> None:
        """Fill the open bar, if any."""
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
    """Run a command to its end; it and what it prints are added to ``log``.

    Args:
        command: argument list.
        log: file; made with its folder.
        name: of the command, for the error.
        cwd: folder to run it in; by default this process's.
        environment: by default this process's.
        progress: called with (steps done, steps in all) whenever the log's last bar has moved.

    Raises:
        UmedError: it ended with another status than 0; the message shows what of the log says why.
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
        return "was killed (SIGKILL), as Linux does with a process when memory runs out"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def read_from(log: Path, start: int) -> str:
    """A log from a byte on, as text; tqdm's carriage returns become line ends."""
    with open(log, "rb") as stream:
        stream.seek(start)
        return stream.read().decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")


def what_went_wrong(printed: str) -> str:
    """The part of what a failed command printed that says why.

    That is an error in this plugin's words if there is one; else the first traceback that is not about another process's
    failure, which the slowest process of a run may print last; else the last lines.
    """
    plain = _RANK.sub("", printed)
    said = _SAID_PLAINLY.findall(plain)
    if said:
        return said[0]
    tracebacks = [found.group(0) for found in _TRACEBACK.finditer(plain + "\n")]
    causes = [text for text in tracebacks if not any(word in _conclusion(text) for word in _CONSEQUENCES)]
    if causes:
        lines = causes[0].rstrip().splitlines()
        return "\n".join(lines if len(lines) <= _LONGEST else [lines[0], "  ...", *lines[-_LONGEST:]])
    return "\n".join([line for line in plain.splitlines() if line.strip()][-_LAST_LINES:])


def _conclusion(traceback: str) -> str:
    """The lines of a traceback that name the exception: all after the last indented one."""
    lines = traceback.splitlines()
    last = max(index for index, line in enumerate(lines) if line[:1].isspace() or index == 0)
    return "\n".join(lines[last + 1 :])


def importable(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment (this process's by default) with the plugin importable in children, from a checkout too."""
    import umed_plugin

    environment = os.environ if environment is None else environment
    root = str(Path(umed_plugin.__file__).resolve().parent.parent)
    paths = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    return {**environment, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
