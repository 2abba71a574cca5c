"""What the log of a running command says of it: steps done, rate, and the trainer's last metrics.

`umed status`, the bars and the half-minute lines of `umed upgrade` and `umed demo` all read it here. A log may be read at any
moment, so its last line may be half written.

How to run: ``read_progress(Path("runs/upgrade/logs/stage_2_rewarding.log"))``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

_TAIL = 200_000  # bytes of a log that are read
# "12/130 [00:05<00:51" of tqdm, which transformers' trainer uses too, and "umed: answering: question 12 of 130 (9 %)" of ours.
_BAR = re.compile(r"(\d+)/(\d+) \[")
_LINE = re.compile(r"^umed: .*: \w+ (\d+) of (\d+) \(", re.MULTILINE)
# tqdm's "12/130 [00:05<00:51,  2.27it/s" and "1.43s/it", and our own "step 12 of 130 (9 %), 1.4 s per step".
_BAR_RATE = re.compile(r"(\d+)/(\d+) \[[\d:]+<[\d:?]+, +([\d.]+)(it/s|s/it)")
_LINE_RATE = re.compile(r"^umed: .*: \w+ (\d+) of (\d+) \([^)]*\), ([\d.]+) (\w+s/s|s per \w+)", re.MULTILINE)
_ROW = re.compile(r"^\{'.*\}$", re.MULTILINE)
_NO_NUMBER = re.compile(r"(?<=: )-?(?:nan|inf)(?=[,}])")
_SHOWN = ("reward/", "val/", "kl", "loss")  # of the last row, in this order
_MOST = 8
# Beside a bar: what stage 2 raises, else what stage 1 lowers. GRPO's loss is near 0 by construction and says nothing.
_BESIDE_A_BAR = (("reward/total", "kl"), ("loss",))


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


def read_from(log: Path, start: int) -> str:
    """The log from byte ``start``, as text; tqdm's carriage returns become newlines."""
    with open(log, "rb") as stream:
        stream.seek(start)
        return stream.read().decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")


def steps_in(printed: str, bars: bool) -> Optional[tuple[int, int]]:
    """(steps done, steps in all) of the last progress line, or else of the last bar, in a log; None if there is neither."""
    found = _LINE.findall(printed) or (_BAR.findall(printed) if bars else [])
    return (int(found[-1][0]), int(found[-1][1])) if found else None


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
    return Progress(*steps, seconds, last_row(text))


def last_row(printed: str) -> dict[str, float]:
    """The metrics of the last row that the trainer printed, empty without one; transformers 5 prints them as strings."""
    for line in reversed(_ROW.findall(printed)):
        try:
            row = ast.literal_eval(_NO_NUMBER.sub(r"'\g<0>'", line))
            found = {str(name): float(value) for name, value in row.items()}
        except (ValueError, SyntaxError, TypeError):
            continue
        if not any(name.startswith("train_") for name in found):
            return found
    return {}


def metrics_in_words(row: Mapping[str, float]) -> str:
    """``reward/relevance 0.5, reward/total 1.25, kl 0.01``: the rewards, the validation, KL and loss of a row; at most eight."""
    names = dict.fromkeys(name for start in _SHOWN for name in row if name.startswith(start))
    return _words(row, [*names][:_MOST])


def metrics_beside_a_bar(row: Mapping[str, float]) -> str:
    """``reward/total 1.25, kl 0.01`` in stage 2, ``loss 2.5`` in stage 1; empty if the row has none of them."""
    for names in _BESIDE_A_BAR:
        if shown := _words(row, [name for name in names if name in row]):
            return shown
    return ""


def _words(row: Mapping[str, float], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {row[name]:.3g}" for name in names)
