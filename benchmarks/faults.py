"""Fault campaign: small runs of each command are killed with -9 at random moments, started again, and compared at the end.

    python benchmarks/faults.py WORK --moments 50 [--only stage1,merge] [--conditions sigterm,full,...] [--fuzzed 10000]

For each step an undisturbed run comes first. Then one run per moment is killed, with all that it has started, at a moment drawn
uniformly from the undisturbed run's duration. The same command follows until it ends well. Weights must then be equal, and files
equal byte for byte. A result that is there after the kill must be the whole result. For the writer and the judge, requests that a
server on loopback was sent twice are compared with those whose reply had not reached the ledger at the kill.

WORK keeps inputs, undisturbed runs and one line per moment: the same command goes on where it stopped. `fault_conditions.py` has
the other conditions: signals, a full disk, read-only folders, odd environments, two runs at once, changed headers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_steps import Inputs, Step, difference, file_states, steps
from support import forked
from support.judge_server import judge_server, score
from support.umed_runs import environment

KEY = "sk-test-0123456789"


@dataclass
class Paying:
    """A server that answers by what it is asked, as the writer's model or as a judge, after ``seconds``."""

    server: Any
    seconds: float
    writes: bool = False

    def __post_init__(self) -> None:
        self.server.answer = self._answer

    def _answer(self, asked: Any) -> Any:
        from support.writer_server import good

        time.sleep(self.seconds)  # as a model would take: some requests are always in flight
        if self.writes:
            return good(asked)
        return score(int(hashlib.sha256(asked.text.encode()).hexdigest(), 16) % 11)

    def counts(self) -> Counter[str]:
        """Request -> how often it was sent."""
        return Counter(asked.request_id if self.writes else asked.text for asked in list(self.server.asked))


@contextmanager
def serving(step: Step) -> Iterator[Paying | None]:
    """The step's server on loopback; None if it needs none."""
    if step.ledger is None:
        yield None
        return
    with judge_server(lambda asked: score(0)) as server:
        yield Paying(server, 0.2, step.name == "writer")


def variables(more: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a run."""
    return {**environment(), "OPENAI_API_KEY": KEY, "TOKENIZERS_PARALLELISM": "false", **(more or {})}


def start(
    step: Step, inputs: Inputs, out: Path, server: Paying | None, env: dict[str, str] | None = None, cwd: Any = None
) -> Any:
    """The step's command, forked from a process that has imported torch where that can be done."""
    out.mkdir(parents=True, exist_ok=True)
    step.ready(out)
    words = [str(word) for word in step.command(out, server.server.url if server else "")]
    used = env or variables()
    used = {**used, "PYTHONPATH": os.pathsep.join([str(inputs.folder / "data"), used["PYTHONPATH"]])}
    if forked.wanted(words):
        return forked.Forked(words, env=used, cwd=cwd, new_session=True, forks_too=step.forks_too)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=used, cwd=cwd, start_new_session=True, **streams)


def end_of(process: Any) -> tuple[int, str]:
    """(exit status, what was printed) of a run that is waited for."""
    if isinstance(process, forked.Forked):
        done = process.done(1200)
        return done.returncode, done.stdout + done.stderr
    printed = process.communicate(timeout=1200)[0]
    return process.returncode, printed


def undisturbed(step: Step, inputs: Inputs, work: Path) -> tuple[Path, float]:
    """The folder of the run that is not killed, and how many seconds it took."""
    out, took = work / step.name / "whole", work / step.name / "seconds"
    if not took.is_file():
        shutil.rmtree(work / step.name, ignore_errors=True)
        for name in ("warm-up", "whole"):  # the first start may import what later ones have
            with serving(step) as server:
                began = time.monotonic()
                status, printed = end_of(start(step, inputs, out.with_name(name), server))
                seconds = time.monotonic() - began
            if status:
                raise SystemExit(f"{step.name}: the undisturbed run ended with {status}:\n{printed[-3000:]}")
        took.write_text(str(seconds))
    return out, float(took.read_text())


@dataclass
class Outcome:
    """What came of one moment."""

    step: str
    moment: float
    killed: bool = False
    ended_well: bool = False
    difference: float = float("inf")
    half: bool = False
    twice: int = 0
    in_flight: int = 0
    said: str = field(default="", repr=False)

    @property
    def equal(self) -> bool:
        """As documented for a resumed training: within 1e-6, which the tests of resuming pin too."""
        return self.ended_well and self.difference <= 1e-6


def one_moment(step: Step, inputs: Inputs, work: Path, moment: float) -> Outcome:
    """Kill a run at ``moment`` seconds, start it again until it ends, and compare it with the undisturbed one."""
    whole, out = work / step.name / "whole", work / step.name / f"at-{moment:.4f}"
    shutil.rmtree(out, ignore_errors=True)
    outcome = Outcome(step.name, moment)
    with serving(step) as server:
        process = start(step, inputs, out, server)
        until = time.monotonic() + moment
        while process.poll() is None and time.monotonic() < until:
            time.sleep(min(0.01, max(0.0, until - time.monotonic())))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        outcome.killed = process.wait() == -signal.SIGKILL
        outcome.in_flight = _unkept(out, step, server)
        if outcome.killed and step.result is not None and (out / step.result).exists():
            outcome.half = _differs_in(step, whole, out)
        if outcome.killed:
            status, outcome.said = end_of(start(step, inputs, out, server))
            outcome.ended_well = status == 0
        if outcome.ended_well:
            outcome.difference = difference(step.state(whole), step.state(out))
        if server is not None:
            outcome.twice = sum(count - 1 for count in server.counts().values())
    if outcome.equal or not outcome.killed:
        shutil.rmtree(out, ignore_errors=True)
    return outcome


def _differs_in(step: Step, whole: Path, out: Path) -> bool:
    """Whether a result that a killed run has left is not the whole one."""
    try:
        expected, found = (file_states(folder) for folder in (whole, out))
        if step.state is file_states:
            of_result = [name for name in expected if name.split("/")[0] == step.result]
            return any(found.get(name) != expected[name] for name in of_result)
        return difference(step.state(whole), step.state(out)) > 1e-6
    except Exception:  # noqa: BLE001  whatever cannot be read is not whole
        return True


def _unkept(out: Path, step: Step, server: Paying | None) -> int:
    """Requests that the server has been sent and whose replies are not in the ledger."""
    if server is None:
        return 0
    ledger = out / str(step.ledger)
    kept = ledger.read_bytes().count(b"\n") if ledger.is_file() else 0
    return max(0, len(server.server.asked) - kept)


def campaign(
    step: Step, inputs: Inputs, work: Path, moments: int, seed: int, at_a_time: int, until: float
) -> list[Outcome]:
    """All moments of a step, those of earlier calls first."""
    _, seconds = undisturbed(step, inputs, work)
    file, lock = work / step.name / "moments.jsonl", threading.Lock()
    outcomes = [Outcome(**json.loads(line)) for line in file.read_text().splitlines()] if file.is_file() else []
    draw = random.Random(f"{step.name}:{seed}")
    drawn = [draw.uniform(0, seconds) for _ in range(3 * moments)]
    left = [moment for moment in drawn if moment not in {outcome.moment for outcome in outcomes}]

    def next_one(moment: float) -> None:
        with lock:
            if sum(outcome.killed for outcome in outcomes) >= moments or time.monotonic() > until:
                return
        outcome = one_moment(step, inputs, work, moment)
        with lock, file.open("a") as stream:
            outcomes.append(outcome)
            stream.write(json.dumps(vars(outcome)) + "\n")
        if outcome.killed and (not outcome.equal or outcome.half or outcome.twice > outcome.in_flight):
            print(f"FAULT {outcome}\n{outcome.said[-1500:]}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(next_one, left))
    return outcomes


HEAD = (
    "| step | undisturbed run | moments | ended well | equal | bit for bit | half taken for whole | sent twice | in flight |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def row(outcomes: list[Outcome], seconds: float, step: Step) -> str:
    """A step's line of the table."""
    killed = [outcome for outcome in outcomes if outcome.killed]
    equal = sum(outcome.equal for outcome in killed)
    exact = sum(outcome.ended_well and outcome.difference == 0 for outcome in killed)
    well = sum(outcome.ended_well for outcome in killed)
    paid = [str(sum(getattr(o, name) for o in killed)) if step.ledger else "" for name in ("twice", "in_flight")]
    half = sum(outcome.half for outcome in killed)
    return f"| {step.name} | {seconds:.1f} s | {len(killed)} | {well} | {equal} | {exact} | {half} | {paid[0]} | {paid[1]} |"


def arguments() -> argparse.Namespace:
    """The sizes, from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path, help="folder for inputs, runs and outcomes; the same command goes on there")
    parser.add_argument("--moments", type=int, default=50, help="kills of each step (default: 50)")
    parser.add_argument("--only", help="steps, separated by commas (default: all); 'none' for the conditions alone")
    parser.add_argument("--conditions", default="", help="names of fault_conditions.py, separated by commas, or 'all'")
    parser.add_argument("--fuzzed", type=int, default=10_000, help="changed files of each format (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--at-a-time", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no moment after so long")
    return parser.parse_args()


def main() -> int:
    """Print the tables; exit status 1 if a moment or a condition showed a fault."""
    args = arguments()
    os.nice(5)
    from umed_plugin.patches import prepare_llava

    prepare_llava()
    work = args.work.resolve()
    inputs = Inputs(work / "inputs")
    known, until = steps(inputs), time.monotonic() + 60 * args.minutes
    chosen = [name for name in (args.only.split(",") if args.only else known) if name != "none"]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SystemExit(f"--only {','.join(unknown)}: no such step. Steps: {', '.join(known)}")
    rows, fine = [], True
    for name in chosen:
        outcomes = campaign(known[name], inputs, work, args.moments, args.seed, args.at_a_time, until)
        killed = [outcome for outcome in outcomes if outcome.killed]
        fine &= all(o.equal and not o.half and o.twice <= o.in_flight for o in killed)
        rows.append(row(outcomes, undisturbed(known[name], inputs, work)[1], known[name]))
        print(rows[-1], file=sys.stderr, flush=True)
    if rows:
        print(f"seed {args.seed}\n\n{HEAD}\n" + "\n".join(rows))
    if args.conditions:
        import fault_conditions

        fine &= fault_conditions.print_table(args.conditions, known, inputs, work, args.fuzzed, args.seed)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
