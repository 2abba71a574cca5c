"""The paper's Table 6 on the demo's studies, and the control that it lacks: stage 1 continued for stage 2's wall time.

Each seed draws its own studies and trains its own base and an early checkpoint of stage 1, the demo's, from which the paper's
rows go on. Stage 1 continued is the converged one, from which stage 2 and stage 1 go on once more. All rows of a seed answer the
same held-out studies, so they are compared with their start pair by pair. Intervals over several seeds resample the patients of
all seeds.

    python benchmarks/ablation.py runs/ablation --seeds 0,1,2
    python benchmarks/ablation.py runs/norms --seeds 10,11 --rows "full, GRPO; full, GRPO on raw rewards"     some rows only

Finished steps are not done again, so an interrupted benchmark goes on with the same command. ``--jobs`` runs side by side what
does not wait for one another. Writes ``table.md`` and ``results.json`` to the folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from subprocess import DEVNULL
from typing import Any

from intervals import differences, mean_difference

from umed_plugin.commands.demo.pipeline import DemoRun, DemoSettings, environment
from umed_plugin.evaluation.metrics.metric import Row as ScoredStudy
from umed_plugin.evaluation.results import Evaluation
from umed_plugin.evaluation.tables import formatted
from umed_plugin.terminal.progress import Steps

EARLY = "early"
SHOWN = {"accuracy": "accuracy", "mean IoU": "mean_iou", "vision relevance": "vision_relevance"}


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        name: as the table shows it.
        start: the row that it goes on from, or ``EARLY``.
        flags: stage 2's flags that differ from the demo's; ``None`` continues stage 1 for the wall time of the first row.
    """

    name: str
    start: str = EARLY
    flags: tuple[Any, ...] | None = ()


# The demo's scale of GRPO's advantages is taken back: PPO whitens its own.
PPO = ("--umed_algorithm", "ppo", "--umed_advantage_scale", "group", "--umed_kl_coef", 0.03, "--umed_gae_lambda", 1)
# The default suits states of a few thousand values; these have 128.
PPO = (*PPO, "--umed_value_learning_rate", 1e-3)
ROWS = (
    Row("full, GRPO"),
    Row("full, PPO", flags=PPO),
    Row("full, GRPO on raw rewards", flags=("--umed_reward_norm", "none")),
    Row("without VRR", flags=("--umed_rewards", "relevance,localization", "--umed_reward_weights", "4,2")),
    Row("without ALR", flags=("--umed_rewards", "relevance,vision_relevance", "--umed_reward_weights", "4,1")),
    Row("SFT + PPO on relevance", flags=(*PPO, "--umed_rewards", "relevance", "--umed_reward_weights", "4")),
    Row("stage 1 continued", flags=None),
    Row("stage 1 continued, then full, GRPO", start="stage 1 continued"),
    Row("stage 1 continued, then once more", start="stage 1 continued", flags=None),
)


class SeedRun:
    """One seed's checkpoints and evaluations under a folder; each is made once."""

    def __init__(self, folder: Path, seed: int, settings: DemoSettings) -> None:
        from rich.console import Console

        self.folder, self.seed = folder, seed
        self.demo = DemoRun(folder, seed, settings, Steps(Console(quiet=True)))
        self._times = folder / "seconds"
        self._times.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Studies, records, the base checkpoint and the early stage 1."""
        self.once("base", lambda: (self.demo.records(), self.demo.base_checkpoint()))
        self.once(EARLY, lambda: self.demo.instruction_tuning(EARLY))

    def row(self, row: Row, steps: int) -> None:
        """Train one row from its start; a continued stage 1 takes ``steps`` optimizer steps."""
        start, name = self.demo.checkpoint(folder_name(row.start)), folder_name(row.name)
        if row.flags is None:
            flags = ["--max_steps", steps, "--data_path", self.demo.rewarding_records]
            self.once(name, lambda: self.demo.instruction_tuning(name, start, flags))
        else:
            self.once(name, lambda: self.demo.rewarding(start, name, row.flags or ()))

    def evaluate(self, name: str) -> None:
        """Ask the checkpoint about the held-out studies, in a process of its own."""
        command = [sys.executable, "-m", "umed_plugin.cli", "evaluate", self.demo.checkpoint(name), "--batch-size", 50]
        command += ["--benchmark", self.folder / "data" / "records.json", "--out", self.folder / "evaluation" / name]
        command += ["--max-new-tokens", self.demo.settings.max_new_tokens]
        words = [str(word) for word in command]
        self.once(f"evaluation-{name}", lambda: subprocess.run(words, check=True, env=environment(), stdout=DEVNULL))

    def cases(self, name: str) -> list[ScoredStudy]:
        """The evaluated studies of a checkpoint, in the order of the records."""
        return read_cases(self.folder, name)

    def once(self, name: str, work: Callable[[], object]) -> None:
        """Do the work, unless it was done before under this name."""
        if (self._times / name).exists():
            return
        began = time.monotonic()
        work()
        (self._times / name).write_text(str(time.monotonic() - began))


def read_cases(folder: Path, name: str) -> list[ScoredStudy]:
    """The studies of ``evaluation/NAME`` in a demo's folder, in the order of the records."""
    return Evaluation.load(folder / "evaluation" / name).rows()


def folder_name(row_name: str) -> str:
    """A row's name as a folder's."""
    return "".join(letter if letter.isalnum() else "-" for letter in row_name)


def steps_of_the_same_time(runs: Sequence[SeedRun], like: Row) -> int:
    """How many steps of stage 1 take as long as ``like``.

    All seeds' runs do the same work, and what else a machine does only slows them: the fastest of each kind are compared.
    """
    tuned = [run.demo.checkpoint(EARLY) for run in runs]
    pace = min(training_seconds(checkpoint) / steps_taken(checkpoint) for checkpoint in tuned)
    return max(round(min(training_seconds(run.demo.checkpoint(folder_name(like.name))) for run in runs) / pace), 1)


def steps_taken(checkpoint: Path) -> int:
    """Optimizer steps of a finished training run."""
    return int(_trainer_state(checkpoint)["global_step"])


def training_seconds(checkpoint: Path) -> float:
    """Wall time of a finished training run from its first step to its last: a start takes as long as many small steps."""
    return float(_trainer_state(checkpoint)["log_history"][-1]["train_runtime"])


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")))


def run_all(runs: Sequence[SeedRun], rows: Sequence[Row], jobs: int) -> None:
    """Do everything, ``jobs`` at a time, each step after what it needs; the first row sets the time of a continued stage 1."""
    with ThreadPoolExecutor(jobs) as pool:
        _wait([pool.submit(run.prepare) for run in runs])
        _wait([pool.submit(run.row, rows[0], 0) for run in runs])
        steps = steps_of_the_same_time(runs, rows[0])  # the first row is one of stage 2
        _wait([pool.submit(run.row, row, steps) for row in rows if row.start == EARLY for run in runs])
        _wait([pool.submit(run.row, row, steps) for row in rows if row.start != EARLY for run in runs])
        names = ["base", EARLY, *(row.name for row in rows)]
        _wait([pool.submit(run.evaluate, folder_name(name)) for name in names for run in runs])


def _wait(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        future.result()


def results(runs: Sequence[SeedRun], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry a line of the table: its figures over all seeds, paired with its start, and each seed's own difference."""
    lines = [("base", "base", ""), ("stage 1", EARLY, "")]
    lines += [(row.name, folder_name(row.name), folder_name(row.start)) for row in rows]
    return [_line(title, name, start, runs) for title, name, start in lines]


def _line(title: str, name: str, start: str, runs: Sequence[SeedRun]) -> dict[str, Any]:
    figures: dict[str, Any] = {"name": title, "start": start}
    for metric, key in SHOWN.items():
        by_seed = [values_of(run.cases(name), key) for run in runs]
        figures[metric] = fmean(value for values in by_seed for value in values)
        if start:
            by_seed_rows = [differences(key, run.cases(start), run.cases(name), seed) for seed, run in enumerate(runs)]
            together = mean_difference([row for rows in by_seed_rows for row in rows])
            figures[f"{metric}_difference"], figures[f"{metric}_ci95"] = together
            alone = map(mean_difference, by_seed_rows)
            figures[f"{metric}_by_seed"] = [[mean, *(interval or [])] for mean, interval in alone]
    return figures


def values_of(cases: Sequence[ScoredStudy], key: str) -> list[float]:
    """A metric of the studies that have it: accuracy of all, the others of those with a lesion, as in `umed evaluate`."""
    return [case.values[key] for case in cases if key in case.values]


def markdown(entries: Sequence[dict[str, Any]]) -> str:
    """The table: each figure, and in brackets the paired difference from the row's start with its 95 % interval."""
    lines = [f"| | {' | '.join(SHOWN)} |", f"|---|{'---|' * len(SHOWN)}"]
    lines += [f"| {entry['name']} | {' | '.join(_cell(entry, metric) for metric in SHOWN)} |" for entry in entries]
    return "\n".join(lines)


def _cell(entry: dict[str, Any], metric: str) -> str:
    if not entry["start"]:
        return f"{entry[metric]:.3f}"
    difference = formatted(entry[f"{metric}_difference"], entry[f"{metric}_ci95"], "+.3f")
    return f"{entry[metric]:.3f} ({difference})"


def chosen_rows(names: str) -> list[Row]:
    """The rows of these names in the table's order; names are divided by semicolons, since some hold a comma.

    Raises:
        SystemExit: no row has such a name, or a row goes on from one that is left out, or a row of stage 1 lacks its time.
    """
    asked = {name.strip() for name in names.split(";")}
    if unknown := asked - {row.name for row in ROWS}:
        raise SystemExit(
            f"no row is named {', '.join(sorted(unknown))}; there are: {'; '.join(row.name for row in ROWS)}"
        )
    rows = [row for row in ROWS if row.name in asked]
    for row in rows:
        if row.start not in asked | {EARLY}:
            raise SystemExit(f"'{row.name}' goes on from '{row.start}': name that row too")
    if rows[0].flags is None:
        raise SystemExit(f"'{rows[0].name}' takes the time of a row of stage 2: name one too, such as '{ROWS[0].name}'")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="training runs side by side")
    parser.add_argument("--processes", type=int, default=2, help="processes of one training run, at most 12")
    parser.add_argument(
        "--rows", default=";".join(row.name for row in ROWS), help="divided by semicolons; default: all"
    )
    options = parser.parse_args(arguments)
    rows = chosen_rows(options.rows)
    settings = DemoSettings(processes=options.processes)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    runs = [SeedRun(options.out.resolve() / f"seed{seed}", seed, settings) for seed in seeds]
    run_all(runs, rows, options.jobs)
    entries = results(runs, rows)
    (options.out / "results.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    (options.out / "table.md").write_text(markdown(entries) + "\n", encoding="utf-8")
    print(markdown(entries))


if __name__ == "__main__":
    main()
