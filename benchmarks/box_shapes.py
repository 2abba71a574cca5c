"""How the boxes of a study's answers look: well formed or not, and how large; and what one constant box would score.

    python benchmarks/box_shapes.py OUT

OUT is the folder of `study.py`, with its checkpoints and evaluations. The constant box is the median of a seed's training boxes.
Answers of all seeds are taken together.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from umed_plugin.data.records import Record, load_records, record_geometry, true_boxes
from umed_plugin.errors import UmedError
from umed_plugin.grounding.boxes import Box, is_degenerate, parse_boxes, set_iou


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row for each arm, and the score of the constant box."""
    (out,) = map(Path, sys.argv[1:] if arguments is None else arguments)
    print("| arm | answers | without a box | malformed boxes per answer | mean area of a box |\n|---|---|---|---|---|")
    for arm, answers in sorted(answers_by_arm(out).items()):
        boxes = [box for text in answers for box in parse_boxes(text)]
        whole = [box for box in boxes if not is_degenerate(box)]
        without = sum(not parse_boxes(text) for text in answers) / len(answers)
        area = statistics.mean((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in whole) if whole else 0.0
        malformed = (len(boxes) - len(whole)) / len(answers)
        print(f"| {arm} | {len(answers)} | {without:.2f} | {malformed:.2f} | {area:.2f} |")
    scores = [score for seed in sorted(out.glob("work/seed*")) for score in constant_scores(studies_of(seed))]
    if scores:
        print(f"\none constant box: mean IoU {statistics.mean(scores):.3f} on {len(scores)} held-out studies")


def answers_by_arm(out: Path) -> dict[str, list[str]]:
    """Arm, as its folder is named without the seed -> the answers of all seeds."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in sorted(out.glob("work/seed*/checkpoints/*/evaluation/predictions.jsonl")):
        arm = file.parents[1].name.partition("-")[2]
        found[arm] += [json.loads(line)["answer"] for line in file.read_text(encoding="utf-8").splitlines()]
    if not found:
        raise UmedError(f"{out}: has no evaluations below work/. Give the OUT of a study that has trained here.")
    return found


def studies_of(seed: Path) -> Path:
    """The records of a seed; beside a data set on disk lie the generated studies that its base was trained on."""
    return next(iter(sorted(seed.glob("data-*/records.json"))), seed / "data" / "records.json")


def constant_scores(file: Path) -> list[float]:
    """IoU with the boxes of each held-out study of the box whose sides are the medians of the training boxes."""
    records = load_records(file)
    train = [box for record in records if record["split"] == "train" for box in _in_square(record)]
    if not train:
        return []
    box: Box = tuple(map(statistics.median, zip(*train)))  # type: ignore[assignment]
    tested = [_in_square(record) for record in records if record["split"] == "test"]
    return [set_iou([box], true) for true in tested if true]


def _in_square(record: Record) -> list[Box]:
    return record_geometry(record).to_square(true_boxes(record))


if __name__ == "__main__":
    main()
