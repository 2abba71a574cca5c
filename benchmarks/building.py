"""Seconds of ``umed recipe build`` over large PNGs: with 1 and 2 processes, and when only the first build had to read them.

Every build is a command of its own, so its start and imports count. All builds must write the same JSON.

    python benchmarks/building.py [--help]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine
from PIL import Image

RECIPE = """
name: drawn
description: Noise with one bright square.
terms: {licence: CC0, url: "https://example.org"}
annotations:
  reader: csv
  files: boxes.csv
  columns: {file: file, box: [x1, y1, x2, y2], lesion: finding}
classes: {cyst: {name: cyst}}
split: {by: patient, fractions: {train: 1}}
"""


def arguments() -> argparse.Namespace:
    """The sizes, from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--side", type=int, default=1024, help="of an image, in pixels")
    parser.add_argument("--workers", default="1,2", help="numbers of processes (default: 1,2)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def write_images(folder: Path, count: int, side: int) -> None:
    """The data set, as if it were an hour old."""
    noise = np.random.default_rng(0).integers(0, 40, (side, side), dtype=np.uint8)
    rows, then = ["file,x1,y1,x2,y2,finding"], time.time() - 3600
    for index in range(count):
        pixels = np.roll(noise, index * 7, axis=0)
        pixels[side // 4 : side // 2, side // 4 : side // 2] = 200
        file = folder / f"{index}.png"
        Image.fromarray(pixels).save(file, compress_level=1)
        os.utime(file, (then, then))
        rows.append(f"{file.name},{side // 4},{side // 4},{side // 2},{side // 2},cyst")
    (folder / "boxes.csv").write_text("\n".join(rows), encoding="utf-8")
    (folder / "drawn.yaml").write_text(RECIPE, encoding="utf-8")


def build(data: Path, out: Path, workers: int) -> float:
    """Seconds of one build."""
    command = [sys.executable, "-m", "umed_plugin.cli", "recipe", "build", str(data / "drawn.yaml"), "--quiet"]
    began = time.perf_counter()
    subprocess.run(
        [*command, "--data-root", str(data), "--out", str(out / "train.json"), "--workers", str(workers)],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - began


def main() -> int:
    """Print a table; exit status 1 if the builds differ."""
    args = arguments()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_images(data, args.images, args.side)
        outs = []
        for workers in map(int, args.workers.split(",")):
            outs.append(Path(folder) / f"out{workers}")
            figures[f"first build, {workers} processes"] = build(data, outs[-1], workers)
        figures["second build"] = build(data, outs[0], 1)
        written = {(out / "train.json").read_bytes() for out in outs}
    print(f"{args.images} PNG of {args.side} x {args.side}\n\n| | seconds |\n| --- | --- |")
    for title, taken in figures.items():
        print(f"| {title.replace('1 processes', '1 process')} | {taken:.1f} |")
    print(f"\n{machine()}")
    if args.json:
        args.json.write_text(json.dumps(figures))
    return int(len(written) != 1)


if __name__ == "__main__":
    sys.exit(main())
