"""``umed status RUN``: how far a run is, at which rate, how long it still takes, what it earns, and where its log is.

It reads what the run writes anyway: its lock, its logs, and the trainer's checkpoints. So it works for a run in another terminal,
under Slurm or nohup, and for one that has been killed.
"""

from __future__ import annotations

import argparse
import ast
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from umed_plugin.commands.processes import read_from, steps_in
from umed_plugin.errors import UmedError, say
from umed_plugin.files.locks import holder
from umed_plugin.terminal.progress import duration
from umed_plugin.terminal.text import one_line

_TAIL = 200_000  # bytes of a log that are read
_STALE = 600  # seconds without a line after which a running step may hang
# tqdm's "12/130 [00:05<00:51,  2.27it/s" and "1.43s/it", and our own "step 12 of 130 (9 %), 1.4 s per step".
_BAR_RATE = re.compile(r"(\d+)/(\d+) \[[\d:]+<[\d:?]+, +([\d.]+)(it/s|s/it)")
_LINE_RATE = re.compile(r"^umed: .*: \w+ (\d+) of (\d+) \([^)]*\), ([\d.]+) (\w+s/s|s per \w+)", re.MULTILINE)
_ROW = re.compile(r"^\{'.*\}$", re.MULTILINE)
_SHOWN = ("reward/", "val/", "kl", "loss")  # of the last row, in this order
_MOST = 8


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``status``."""
    parser = subparsers.add_parser(
        "status",
        help="how far a run is: step, rate, time left, last rewards, and where its log is",
        description="Say how far a run is, while it is running or after it was stopped. RUN is a folder of `umed upgrade` or "
        "`umed demo`, or the --output_dir of a training. Nothing is changed. Exit status 1 if the run has neither ended nor is "
        "going on.",
        epilog="examples:\n  umed status runs/upgrade\n  watch umed status runs/upgrade",
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="folder of the run")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Progress:
    """What a log says of its step.

    Attributes:
        done, total: steps.
        seconds: of one step; None if the log does not say.
        row: the last logged metrics.
    """

    done: int
    total: int
    seconds: Optional[float]
    row: dict[str, float]


def run(args: argparse.Namespace) -> int:
    """Print the lines."""
    folder = args.run_dir.resolve()
    if not folder.is_dir():
        raise UmedError(
            f"{folder}: there is no such folder. Give the --out of an upgrade or demo, or a training's --output_dir."
        )
    busy, ended = holder(folder), has_ended(folder)
    state = (
        f"running ({busy})" if busy else "done" if ended else "stopped before its end; the same command continues it"
    )
    say(f"{one_line(folder)}: {state}")
    shown = _of_logs(folder, busy is not None, ended) or _of_checkpoints(folder)
    if not shown and not busy:
        raise UmedError(f"{folder}: holds no run: neither logs/, nor trainer_state.json, nor a process that writes it.")
    for line in shown:
        say(f"  {line}")
    return 0 if busy or ended else 1


def has_ended(folder: Path) -> bool:
    """Whether the run has written what it writes last."""
    return any((folder / name).is_file() for name in ("summary.json", "trainer_state.json"))


def _of_logs(folder: Path, running: bool, ended: bool) -> list[str]:
    """Lines about the step whose log was written last; none without logs."""
    logs = sorted((folder / "logs").glob("*.log"), key=lambda log: log.stat().st_mtime)
    if not logs:
        return []
    log, age = logs[-1], time.time() - logs[-1].stat().st_mtime
    made = list((folder / "made").glob("*.json"))
    lines = [f"step: {log.stem.replace('_', ' ')}" + (f" (number {len(made)} of this run)" if made else "")]
    found = read_progress(log)
    if found is not None:
        lines += _lines(found, running)
    lines.append(f"log: {one_line(log)} (last line {duration(age)} ago)")
    if running and age > _STALE:
        lines.append(f"nothing was written for {duration(age)}. Look at the log and at the processes: it may hang.")
    if ended and (folder / "report.html").is_file():
        lines.append(f"report: {one_line(folder / 'report.html')}")
    return lines


def _lines(found: Progress, running: bool) -> list[str]:
    """Progress and last metrics, in words."""
    parts = [f"progress: {found.done} of {found.total} ({100 * found.done // max(found.total, 1)} %)"]
    if found.seconds is not None:
        parts.append(f"{found.seconds:.2g} s each")
        if running and found.done < found.total:
            parts.append(f"{duration(found.seconds * (found.total - found.done))} left")
    lines = [", ".join(parts)]
    names = [name for start in _SHOWN for name in found.row if name.startswith(start)]
    if names:
        lines.append("last: " + ", ".join(f"{name} {found.row[name]:.3g}" for name in dict.fromkeys(names[:_MOST])))
    return lines


def read_progress(log: Path) -> Optional[Progress]:
    """What the end of a log says of its step; None if there is no progress in it."""
    text = read_from(log, max(0, log.stat().st_size - _TAIL))
    text = text[text.rfind("umed-run ") + 1 :]  # of the last attempt: each begins with its command
    steps = steps_in(text, bars=True)
    if steps is None:
        return None
    rates = _LINE_RATE.findall(text) or [rate for rate in _BAR_RATE.findall(text) if int(rate[1]) == steps[1]]
    seconds = None
    if rates and float(rates[-1][2]):
        number, unit = float(rates[-1][2]), rates[-1][3]
        seconds = 1 / number if unit.endswith("/s") else number
    return Progress(*steps, seconds, _last_row(text))


def _last_row(text: str) -> dict[str, float]:
    """The metrics of the last row that the trainer printed; transformers 5 prints them as strings."""
    for line in reversed(_ROW.findall(text)):
        try:
            row = ast.literal_eval(line)
            found = {str(name): float(value) for name, value in row.items()}
        except (ValueError, SyntaxError, TypeError):
            continue
        if not any(name.startswith("train_") for name in found):
            return found
    return {}


def _of_checkpoints(folder: Path) -> list[str]:
    """Lines about a training that was started by hand: its log is wherever its output was sent."""
    from umed_plugin.commands.report.run_folder import read_training

    training = read_training(folder)
    if training is None:
        return []
    row = training.log[-1] if training.log else {}
    metrics = {name: float(value) for name, value in row.items() if isinstance(value, (int, float))}
    lines = _lines(Progress(training.steps, training.of_steps, None, metrics), running=False)
    lines[0] += ", as of its last checkpoint"
    if training.stage is None:
        lines.append("it has no umed.json: it was started without umed-run, or without --umed_stage")
    return lines
