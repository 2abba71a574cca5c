"""Run long commands as child processes, with a log, progress, and the relevant error on failure.

If training under torchrun or DeepSpeed fails, the log ends with the launcher's traceback, which only says that a child failed.
The child's own traceback is somewhere above it; `what_went_wrong` finds it.

How to run: ``run_logged(["python", "-m", "llava.train.train_mem", ...], Path("run.log"), "training")``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umed_plugin.commands.run_logs import last_row, metrics_beside_a_bar, read_from, steps_in
from umed_plugin.commands.signals import held_back
from umed_plugin.errors import UmedError

# Environment variable of a command and of all that it starts.
MARK = "UMED_CHILD_OF"
_SECONDS_TO_END = 10
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
_TAIL = 6000  # bytes of a log that are read for the progress, five times a second


def run_logged(
    command: Sequence[str],
    log: Path,
    name: str,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    bars: bool = True,
) -> None:
    """Run a command to its end; append the command and its output to ``log``.

    Args:
        command: argument list.
        log: file; it and its folder are created if missing.
        name: of the command, for the error.
        cwd: working folder; by default this process's.
        environment: by default this process's.
        progress: called with (steps done, steps in all, last metrics in words), read from the log. Without a row of metrics, as
            in an evaluation, the words are empty.
        bars: read tqdm's bars as well as our own lines. Outside trainings, bars count loaded files and not the steps.

    However this call ends, by an error, Ctrl-C or a signal, none of the command's processes is left.

    Raises:
        UmedError: it ended with a status other than 0; the message shows the relevant part of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    with open(log, "ab") as stream:
        stream.write(f"{shlex.join(command)}\n".encode("utf-8", "surrogateescape"))
        stream.flush()
        began = stream.tell()
        marked = {**(os.environ if environment is None else environment), MARK: mark}
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=cwd, env=marked)
        try:
            metrics, runs = "", True
            while runs:
                time.sleep(0.2)
                runs = process.poll() is None  # asked before the log is read, so that its last lines are shown too
                if progress is None:
                    continue
                printed = read_from(log, max(began, log.stat().st_size - _TAIL))
                # The last row may be far above the end, so the words stay until another row is read.
                metrics = metrics_beside_a_bar(last_row(printed)) or metrics
                if steps := steps_in(printed, bars):
                    progress(*steps, metrics)
        finally:
            if process.poll() != 0:
                with held_back():
                    end_all(process, mark)
    if process.returncode:
        raise UmedError(f"{name} {_ending(process.returncode)}. From {log}:\n{what_went_wrong(read_from(log, began))}")


def end_all(process: subprocess.Popen[bytes], mark: str) -> None:
    """End a command and every process that it has started: SIGTERM, and SIGKILL to those that are left after ten seconds.

    torchrun and DeepSpeed start their workers in sessions of their own, and a worker whose parent was killed has another parent.
    So they are found as descendants and by the environment variable that all inherit.
    """
    import psutil

    family = {process.pid: psutil.Process(process.pid)} if process.poll() is None else {}
    for parent in list(family.values()):
        with contextlib.suppress(psutil.NoSuchProcess):
            family.update((child.pid, child) for child in parent.children(recursive=True))
    family.update((other.pid, other) for other in marked_processes(MARK, mark))
    left = _signalled(family.values(), "terminate")
    left.update((other.pid, other) for other in marked_processes(MARK, mark))
    _signalled(left.values(), "kill")
    process.wait()


def _signalled(processes: Iterable[Any], method: str) -> dict[int, Any]:
    """Signal all, and give those that are still there after `_SECONDS_TO_END`."""
    import psutil

    left = {process.pid: process for process in processes}
    for process in left.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            getattr(process, method)()
    end = time.monotonic() + _SECONDS_TO_END
    while (left := {pid: process for pid, process in left.items() if _runs(process)}) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def _runs(process: Any) -> bool:
    """Whether it is there. A zombie is not: in a container, nothing may collect an orphan's exit status."""
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def marked_processes(name: str, value: str) -> list[Any]:
    """The processes of this user, except this one, whose environment has ``name=value``."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(name) == value:
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess, OSError):
            continue  # another user's process, or already gone
    return found


def _ending(status: int) -> str:
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "was killed (SIGKILL), as Linux does when memory runs out"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


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
