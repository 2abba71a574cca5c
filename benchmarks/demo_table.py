"""README's table of the demo: each seed's held-out figures, and stage 2 minus stage 1 over all of them.

    umed demo --seed 0 --out runs/seed0        and the same for other seeds, then
    python benchmarks/demo_table.py runs/seed0 runs/seed1 runs/seed2

The last line takes the paired differences of all studies of all folders together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from umed_plugin.evaluate import mean_interval

# Title, key in summary.json, key of a study in predictions.jsonl, whether studies without a lesion count.
METRICS = (("mean IoU", "mean_iou", "set_iou", False), ("accuracy", "accuracy", "accuracy", True))
BEFORE, AFTER = "instruction_tuning", "rewarding"


def differences(folder: Path, key: str, negatives: bool) -> list[float]:
    """Stage 2 minus stage 1 of each held-out study of a demo's folder."""
    before, after = (_studies(folder / "evaluation" / stage / "predictions.jsonl") for stage in (BEFORE, AFTER))
    pairs = zip(before, after)
    return [new[key] - old[key] for old, new in pairs if negatives or old["true_boxes"]]


def _studies(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(folders: Sequence[Path]) -> str:
    """Markdown, one line a folder and one for all of them."""
    heads = [f"{title}: base | stage 1 | stage 2 | difference" for title, *_ in METRICS]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * (4 * len(METRICS))}"]
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        cells = [folder.name]
        for _, metric, _, _ in METRICS:
            found = summary["comparison"][metric]
            cells += [f"{summary[stage][metric]:.3f}" for stage in ("base", BEFORE, AFTER)]
            cells.append(_difference(found["difference"], found["ci95"]))
        lines.append(f"| {' | '.join(cells)} |")
    cells = ["all"]
    for _, _, key, negatives in METRICS:
        together = [value for folder in folders for value in differences(folder, key, negatives)]
        cells += ["", "", "", _difference(fmean(together), mean_interval(together))]
    return "\n".join([*lines, f"| {' | '.join(cells)} |"])


def _difference(mean: float, interval: Any) -> str:
    low, high = interval
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="what umed demo wrote")
    print(table(parser.parse_args(arguments).folders))


if __name__ == "__main__":
    main()
