"""Seconds and memory from a JSON of many records to the first batch: all in memory, as an index is made, and with the index.

Each way runs in a process of its own, as each rank of a training run does. ``whole`` is how records were read before: the whole
list, every item checked, all of it kept. All ways read the same 16 records, and know the length of every record.

    python benchmarks/records.py [--help]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

from umed_plugin.data.items import check_items
from umed_plugin.data.record_file import open_records
from umed_plugin.data.records import Record, RecordsCheck
from umed_plugin.data.texts import read_json
from umed_plugin.errors import UmedError

BATCH = 16


def arguments() -> argparse.Namespace:
    """The size, from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--way", choices=("whole", "index"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_records(file: Path, count: int) -> None:
    """Records like those of a data set with eight classes: about 2.5 kB each."""
    rng = random.Random(0)
    names = ["nodule", "mass", "cyst", "effusion", "opacity", "atelectasis", "fracture", "cardiomegaly"]
    with file.open("w", encoding="utf-8") as out:
        for index in range(count):
            text = json.dumps(record(index, names, rng), indent=1)
            out.write(("[\n" if index == 0 else ",\n") + text)
        out.write("\n]\n")


def record(index: int, names: list[str], rng: random.Random) -> Record:
    """One record of three boxes."""
    boxes = [[x, y, x + 50.5, y + 40.25] for x, y in ((rng.randint(0, 400), rng.randint(0, 400)) for _ in range(3))]
    told = " ".join(f"At [0.{index % 90 + 10}, 0.20, 0.35, 0.40] lies a {rng.choice(names)}." for _ in boxes)
    return {
        "id": f"drawn/{index}.png",
        "image": f"/data/drawn/images/{index:06d}.png",
        "conversations": [
            {"from": "human", "value": "<image>\nIs anything abnormal in this image? Mark each finding."},
            {"from": "gpt", "value": told},
        ],
        "objects": {"ref": [rng.choice(names) for _ in boxes], "bbox": boxes, "bbox_type": "real"},
        "image_size": [512, 512],
        "terms": {name: [name, f"{name} of the chest", f"area that looks like {name}"] for name in names},
        "source": "drawn",
        "split": "train",
        "answer_type": "grounded",
        "provenance": {"recipe": "drawn", "recipe_sha256": "0" * 64, "image_aspect_ratio": "pad", "seed": 0},
    }


def run_one(way: str, file: Path) -> dict[str, Any]:
    """Read a batch in this process, and what that took."""
    before, began, used = peak_mb(), time.perf_counter(), time.process_time()
    records: Any
    if way == "whole":
        check, records = RecordsCheck(file), read_json(file)
        for each in records:
            check.add(each)
        check.finish()
        records = check_items(records, file.name, ["</s>"])
        lengths = [sum(len(turn["value"].split()) for turn in each["conversations"]) for each in records]
    else:
        records = open_records(file, file.name, ["</s>"], strict=True, failed=lambda error: UmedError(str(error)))
        lengths = records.column("words").tolist()
    batch = [records[index] for index in random.Random(1).sample(range(len(records)), min(BATCH, len(records)))]
    return {
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - used,
        "mb": peak_mb() - before,
        "words": sum(lengths),
        "ids": [each["id"] for each in batch],
    }


def peak_mb() -> float:
    """Peak memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def in_new_process(way: str, file: Path) -> dict[str, Any]:
    """What `run_one` says in another process."""
    command = [sys.executable, __file__, "--way", way, "--file", str(file)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> int:
    """Print a table; exit status 1 if the ways do not agree."""
    args = arguments()
    if args.way:
        print(json.dumps(run_one(args.way, args.file)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.json"
        write_records(file, args.records)
        print(f"{args.records} records, {file.stat().st_size / 1e6:.0f} MB\n")
        ways = {"whole list in memory": "whole", "first start": "index", "next start": "index"}
        figures = {title: in_new_process(way, file) for title, way in ways.items()}
    print(
        "| | seconds to the first batch | of the processor | MB at most, above the imports |\n| --- | --- | --- | --- |"
    )
    for title, figure in figures.items():
        print(f"| {title} | {figure['seconds']:.1f} | {figure['processor_seconds']:.1f} | {figure['mb']:.0f} |")
    print(f"\n{machine()}")
    if args.json:
        args.json.write_text(json.dumps(figures))
    return int(len({(figure["words"], tuple(figure["ids"])) for figure in figures.values()}) != 1)


if __name__ == "__main__":
    sys.exit(main())
