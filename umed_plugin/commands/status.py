"""``umed status RUN``: how far a run is, at which rate, how long it still takes, what it earns, and where its log is.

It reads what the run writes anyway: its lock, its logs, and the trainer's checkpoints. So it works for a run in another terminal,
under Slurm or nohup, and for one that has been killed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from umed_plugin.commands.run_logs import Progress, metrics_in_words, read_progress
from umed_plugin.errors import UmedError, say
from umed_plugin.files.locks import holder
from umed_plugin.terminal.progress import duration
from umed_plugin.terminal.text import one_line

_STALE = 600  # seconds without a line after which a running step may hang


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


def run(args: argparse.Namespace) -> int:
    """Print the lines."""
    folder = args.run_dir.resolve()
    if not folder.is_dir():
        raise UmedError(
            f"{folder}: there is no such folder. Give the --out of an upgrade or demo, or a training's --output_dir."
        )
    busy, ended = holder(folder), has_ended(folder)
    shown = _of_logs(folder, busy is not None, ended) or _of_checkpoints(folder)
    if not shown and not busy:
        raise UmedError(f"{folder}: holds no run: neither logs/, nor trainer_state.json, nor a process that writes it.")
    state = (
        f"running ({busy})" if busy else "done" if ended else "stopped before its end; the same command continues it"
    )
    say(f"{one_line(folder)}: {state}")
    for line in shown:
        say(f"  {line}")
    return 0 if busy or ended else 1


def has_ended(folder: Path) -> bool:
    """Whether the run has written what it writes last."""
    from umed_plugin.commands.report.run_folder import newest_state

    return (folder / "summary.json").is_file() or newest_state(folder) == folder / "trainer_state.json"


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
    if shown := metrics_in_words(found.row):
        lines.append(f"last: {shown}")
    return lines


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
