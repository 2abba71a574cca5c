"""Conditions other than kill -9 for `faults.py`: a row says what was tried, what came of it, and whether it is as it must be.

A full disk and a read-only folder are mounted where the user may mount, and are said to be left out elsewhere.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults import Inputs, Step, difference, end_of, serving, start, steps, undisturbed, variables

# (what was tried, what came of it, whether it is as it must be; None: not tried)
Row = tuple[str, str, "bool | None"]
STEPS = ("build", "merge", "convert", "evaluate", "stage1", "grpo")
FUZZED = ("dcm", "nii", "nii.gz", "tif", "png", "safetensors")
_SECONDS_TO_END = 10
_TRIES = 5


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[bool]:
    """Mount something at ``folder`` for the block; False where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def is_one_line(printed: str, words: str) -> bool:
    """Whether the reason is told in a line of ours, and no traceback is."""
    told = [line for line in printed.splitlines() if re.match(r"umed(-run)?: ", line) and re.search(words, line)]
    return bool(told) and "Traceback" not in printed


def full_disk(step: Step, inputs: Inputs, work: Path) -> Row:
    """A disk with half the room that the run needs; then room, and the same command."""
    whole, _ = undisturbed(step, inputs, work)
    needed = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file())
    place = work / step.name / "disk"
    with mounted(place, "-t", "tmpfs", "-o", f"size={max(16384, needed // 2)}", "tmpfs") as can:
        if not can:
            return f"{step.name}: disk full", "this user may not mount", None
        out = place / "out"
        with serving(step) as server:
            status, printed = end_of(start(step, inputs, out, server))
            told = is_one_line(printed, "No space left|Disk quota|full disk")
            subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
            again, after = end_of(start(step, inputs, out, server))
        equal = again == 0 and difference(step.state(whole), step.state(out)) <= 1e-6
        left = [path.name for path in place.rglob("*.partial")]
    shown = f"status {status}, {'one line' if told else 'NO one line'}; with room: "
    shown += "equal" if equal else f"status {again}, NOT equal"
    if left:
        shown += f"; left: {', '.join(left)}"
    if not (told and equal):
        print(printed[-1500:], after[-1500:])
    return f"{step.name}: disk full", shown, status != 0 and told and equal


def read_only(step: Step, inputs: Inputs, work: Path) -> Row:
    """An output folder on a file system that is mounted read-only."""
    place = work / step.name / "read-only"
    with mounted(place, "-t", "tmpfs", "-o", "size=1m", "tmpfs") as can:
        if not can:
            return f"{step.name}: read-only", "this user may not mount", None
        (place / "out").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        with serving(step) as server:
            status, printed = end_of(start(step, inputs, place / "out", server))
    told = is_one_line(printed, "Read-only file system")
    if not told:
        print(printed[-1500:])
    return (
        f"{step.name}: read-only",
        f"status {status}, {'one line' if told else 'NO one line'}",
        status in (1, 2) and told,
    )


def odd_environment(step: Step, inputs: Inputs, work: Path) -> Row:
    """No HOME, a TMPDIR that does not exist, LANG=C, and spaces and letters of other scripts in every path; a real process."""
    odd = work / step.name / "odd" / "Данные 数据 dir"
    shutil.rmtree(odd.parent, ignore_errors=True)
    shutil.copytree(inputs.folder, odd)
    moved = Inputs(odd)
    gone = ("HOME", "TMPDIR", "LANG", "LC_CTYPE", "LC_ALL", "PYTHONUTF8", "PYTHONIOENCODING")
    env = {name: value for name, value in variables().items() if name not in gone}
    env |= {"LC_ALL": "C", "TMPDIR": str(odd / "no such folder")}
    out, before = odd / "the output", os.environ.get("UMED_FRESH_RUNS")
    os.environ["UMED_FRESH_RUNS"] = "1"
    try:
        with serving(step) as server:
            status, printed = end_of(start(steps(moved)[step.name], moved, out, server, env, odd))
    finally:
        os.environ.pop("UMED_FRESH_RUNS") if before is None else None
    what = f"{step.name}: no HOME, no TMPDIR, LANG=C, odd paths"
    there = status == 0 and (step.result is None or (out / step.result).exists())
    if there and step.name in ("stage1", "grpo", "ppo"):
        there = difference(step.state(undisturbed(step, inputs, work)[0]), step.state(out)) <= 1e-6
    if not there:
        print(printed[-2000:])
    shutil.rmtree(odd.parent, ignore_errors=True)
    return what, "ended as elsewhere" if there else f"status {status}", there


def two_at_once(step: Step, inputs: Inputs, work: Path) -> Row:
    """The same command twice at the same time into one folder; again, where one had ended before the other wrote."""
    whole, _ = undisturbed(step, inputs, work)
    out = work / step.name / "two"
    for _ in range(_TRIES):
        shutil.rmtree(out, ignore_errors=True)
        with serving(step) as server:
            both = [start(step, inputs, out, server) for _ in range(2)]
            ends = sorted((end_of(process) for process in both), key=lambda end: end[0])
        equal = ends[0][0] == 0 and difference(step.state(whole), step.state(out)) <= 1e-6
        if [status for status, _ in ends] != [0, 0] or not equal:
            break
    else:
        return f"{step.name}: two at once", "they did not meet", None
    refused = ends[0][0] == 0 and ends[1][0] in (1, 2) and is_one_line(ends[1][1], r"\(process \d+\)")
    if not (refused and equal):
        print(*(printed[-1200:] for _, printed in ends), sep="\n---\n")
    shown = f"{'one refused, by the number of the other' if refused else f'statuses {[end[0] for end in ends]}'}; "
    return f"{step.name}: two at once", shown + ("equal" if equal else "NOT equal"), refused and equal


def sigterm(inputs: Inputs, work: Path, seed: int, times: int = 2) -> Iterator[Row]:
    """SIGTERM to a real `umed upgrade`, as Slurm sends it, at random moments; then the same command."""
    import psutil

    step = steps(inputs)["upgrade"]
    whole, seconds = undisturbed(step, inputs, work)
    draw, out = random.Random(f"sigterm:{seed}"), work / step.name / "ended"
    shutil.rmtree(out, ignore_errors=True)
    words = [str(word) for word in step.command(out, "")]
    for number in range(times):
        process = subprocess.Popen(words, env=variables(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        moment, began = draw.uniform(5, max(10.0, seconds)), time.monotonic()
        while not psutil.Process(process.pid).children() and process.poll() is None:
            time.sleep(0.05)  # the moments are those of a run that has begun its first step
        time.sleep(moment)
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        gone = _seconds_until_gone(below)
        status, took = process.wait(120), time.monotonic() - sent
        fine = status == 143 and gone <= _SECONDS_TO_END + 1
        shown = f"{len(below)} processes below it, gone after {gone:.1f} s; status {status} after {took:.1f} s"
        yield f"upgrade: SIGTERM {number + 1}, {time.monotonic() - began:.0f} s after its start", shown, fine
    status, printed = end_of(start(step, inputs, out, None))
    equal = status == 0 and difference(step.state(whole), step.state(out)) == 0
    yield "upgrade: the same command afterwards", "equal" if equal else f"status {status}: {printed[-500:]}", equal


def _seconds_until_gone(processes: list[Any]) -> float:
    """Until none of them runs; infinite after a minute. A zombie has ended."""
    import psutil

    began = time.monotonic()
    while time.monotonic() < began + 60:
        left = [process for process in processes if process.is_running()]
        try:
            if all(process.status() == psutil.STATUS_ZOMBIE for process in left):
                return time.monotonic() - began
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.05)
    return float("inf")


def fuzzed(kind: str, count: int, work: Path, seed: int) -> Row:
    """Changed files of one format: shown, or refused by our own error."""
    from support.fuzzed_images import outcomes

    with tempfile.TemporaryDirectory(dir=work) as folder:
        made = _fuzzed_weights if kind == "safetensors" else (lambda *how: outcomes(kind, *how))
        try:
            found: Counter[str] = made(count, Path(folder), seed)
        except Exception as error:  # noqa: BLE001  any is a fault, and is shown
            return f"{kind}: {count} changed files", f"{type(error).__name__}: {error}"[:300], False
    shown = ", ".join(f"{number} {what}" for what, number in sorted(found.items()))
    return f"{kind}: {count} changed files", shown, sum(found.values()) == count


def _fuzzed_weights(count: int, folder: Path, seed: int) -> Counter[str]:
    """Weight files whose header is changed: bytes, or offsets, shapes and types that make no sense."""
    import torch
    from safetensors.torch import save

    from umed_plugin.checkpoints.folder import read_tensors
    from umed_plugin.errors import UmedError

    whole = save({"a.weight": torch.arange(12.0).reshape(3, 4), "b.bias": torch.ones(5)})
    size = int.from_bytes(whole[:8], "little")
    draw, file, found = random.Random(f"safetensors:{seed}"), folder / "model.safetensors", Counter[str]()
    for _ in range(count):
        changed = bytearray(whole)
        if draw.random() < 0.5:
            changed = _changed_header(json.loads(whole[8 : 8 + size]), whole[8 + size :], draw)
        for _ in range(draw.randint(0, 4)):
            changed[draw.randrange(8 + size)] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        file.write_bytes(changed[: len(changed) if draw.random() < 0.8 else draw.randrange(len(changed))])
        try:
            tensors = read_tensors(file)
        except UmedError as error:
            assert file.name in str(error)
            found["refused"] += 1
        else:
            assert sum(tensor.numel() for tensor in tensors.values()) < 1000
            found["shown"] += 1
    return found


def _changed_header(header: dict[str, Any], data: bytes, draw: random.Random) -> bytearray:
    numbers = (0, 1, 7, 47, 48, 68, 69, 2**31, 2**40, 2**63, -1)
    entry = header[draw.choice(sorted(header))]
    what = draw.choice(["data_offsets", "shape", "dtype", "gone"])
    if what == "gone":
        entry.pop(draw.choice(sorted(entry)))
    elif what == "dtype":
        entry["dtype"] = draw.choice(["F64", "BOOL", "F8_E4M3", "?", "", 3])
    else:
        entry[what] = [draw.choice(numbers) for _ in range(draw.randint(0, 3))]
    text = json.dumps(header).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + data)


OF_STEPS: dict[str, Callable[[Step, Inputs, Path], Row]] = {
    "full": full_disk,
    "read-only": read_only,
    "environment": odd_environment,
    "two": two_at_once,
}
NAMES = (*OF_STEPS, "sigterm", "fuzz")


def print_table(conditions: str, known: dict[str, Step], inputs: Inputs, work: Path, count: int, seed: int) -> bool:
    """Try the conditions, print a line each, and return whether all is as it must be."""
    chosen = NAMES if conditions == "all" else tuple(conditions.split(","))
    unknown = [name for name in chosen if name.split(":")[0] not in NAMES]
    if unknown:
        raise SystemExit(f"--conditions {','.join(unknown)}: not known. Conditions: {', '.join(NAMES)}")
    print("| condition | what came of it | as it must be |\n|---|---|---|", flush=True)
    fine = True
    for name in chosen:
        for what, came, right in _rows(name, known, inputs, work, count, seed):
            print(f"| {what} | {came} | {'not tried' if right is None else 'yes' if right else 'NO'} |", flush=True)
            fine &= right is not False
    return fine


def _rows(name: str, known: dict[str, Step], inputs: Inputs, work: Path, count: int, seed: int) -> Iterator[Row]:
    """The lines of a condition; ``full:stage1`` is one for one step alone."""
    condition, _, only = name.partition(":")
    if condition == "sigterm":
        yield from sigterm(inputs, work, seed)
    elif condition == "fuzz":
        yield from (fuzzed(kind, count, work, seed) for kind in ([only] if only else FUZZED))
    else:
        yield from (OF_STEPS[condition](known[step], inputs, work) for step in ([only] if only else STEPS))
