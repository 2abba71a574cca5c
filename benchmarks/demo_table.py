"""The demo's table in docs/results.md: each seed's checkpoints on held-out studies, and stage 2 minus stage 1 over all seeds.

    umed demo --seed 0 --out runs/seed0        and the same for other seeds, then
    python benchmarks/demo_table.py runs/seed0 runs/seed1 runs/seed2 --studies 3000

The demo asks 400 held-out studies, among which a difference in accuracy below 0.02 is lost. ``--studies`` draws more of them for
each folder's own seed and asks its three checkpoints; the answers stay in the folder, so a second call only prints.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from ablation import SHOWN, read_cases, values_of
from intervals import differences, mean_difference

from umed_plugin.commands.demo.pipeline import STAGES, DemoRun, DemoSettings
from umed_plugin.evaluation.metrics.metric import Row
from umed_plugin.evaluation.tables import formatted
from umed_plugin.terminal.progress import Steps

METRICS = ("mean IoU", "accuracy")


def ask_more(folder: Path, studies: int, steps: Steps) -> Path:
    """Ask a demo's checkpoints about held-out studies of its seed, once; returns the folder of the answers."""
    made = folder / f"held-out-{studies}"
    if (made / "done").exists():
        return made
    seed = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["seed"]
    demo = DemoRun(folder, seed, DemoSettings(), steps)
    asked = DemoRun(made, seed, DemoSettings(tuning=0, rewarding=0, val=0, test=studies), steps)
    records = asked.records()
    for stage, checkpoint in zip(STAGES, (demo.base, demo.checkpoint("tuned"), demo.exported)):
        asked.evaluate(stage, checkpoint, records)
    (made / "done").touch()
    return made


def table(folders: Mapping[str, Path]) -> str:
    """Markdown of named folders with answers: a line each, and one with the paired differences of all of them."""
    heads = [f"{title}: base | stage 1 | stage 2 | difference" for title in METRICS]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * (4 * len(METRICS))}"]
    together: dict[str, list[Row]] = {title: [] for title in METRICS}
    for name, folder in folders.items():
        cells = [name]
        cases = [read_cases(folder, stage) for stage in STAGES]
        for title in METRICS:
            paired = differences(SHOWN[title], *cases[1:], name)
            together[title] += paired
            cells += [f"{fmean(values_of(found, SHOWN[title])):.3f}" for found in cases] + [_with_interval(paired)]
        lines.append(f"| {' | '.join(cells)} |")
    cells = [cell for paired in together.values() for cell in ("", "", "", _with_interval(paired))]
    return "\n".join([*lines, f"| {' | '.join(['all', *cells])} |"])


def _with_interval(paired: Sequence[Row]) -> str:
    return formatted(*mean_difference(paired), "+.3f")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="what umed demo wrote")
    parser.add_argument("--studies", type=int, help="held-out studies to ask for instead of the demo's own answers")
    options = parser.parse_args(arguments)
    folders = {folder.name: folder.resolve() for folder in options.folders}
    if options.studies is not None:
        with Steps(Console(stderr=True)) as steps:
            folders = {name: ask_more(folder, options.studies, steps) for name, folder in folders.items()}
    print(table(folders))


if __name__ == "__main__":
    main()
