"""Shared by `looks.py`, `phrases.py` and `similar_cases.py`: drawn studies as records, and a small checkpoint trained on them."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from umed_plugin.commands.demo.pipeline import DemoRun, DemoSettings
from umed_plugin.commands.demo.prior import corpus
from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint
from umed_plugin.data.records import Record, box_decimals, record_geometry, save_records
from umed_plugin.data.template_writer import write_conversation
from umed_plugin.terminal.progress import Steps

SIDE = 96


def arguments(description: str, given: Sequence[str] | None, **counts: tuple[int, str]) -> argparse.Namespace:
    """Parse the command line of a benchmark on drawn studies, which all need LLaVA's patches: these are applied.

    Args:
        description: the benchmark's docstring; its first line is shown.
        given: the arguments; None: those of the process.
        counts: further options, each a whole number: name -> (default, help).
    """
    from umed_plugin.patches import prepare_llava

    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0", help="separated by commas (default: 0)")
    shared = {"processes": (2, "that train side by side")}
    for name, (default, told) in {**counts, **shared}.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, help=f"{told} (default: {default})")
    parser.add_argument("--epochs", type=float, default=8, help="of stage 1 (default: 8)")
    parsed = parser.parse_args(given)
    prepare_llava()
    return parsed


def shape(form: str, x: float, y: float, size: float) -> tuple[np.ndarray, list[float]]:
    """Coverage 0-1 ``[SIDE, SIDE]`` of a shape around (x, y), and its box in pixels.

    Args:
        form: ``disc``, ``ring``, ``bar`` (wide) or ``pole`` (tall).
        size: half of the longer side, in pixels.
    """
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    across, down = abs(columns - x), abs(rows - y)
    half = {"bar": (size, size / 3), "pole": (size / 3, size)}.get(form, (size, size))
    if form in ("disc", "ring"):
        distance = np.hypot(across, down)
        cover = (distance < size) & ((distance > size / 2) | (form == "disc"))
    else:
        cover = (across < half[0]) & (down < half[1])
    return cover.astype(float), [x - half[0], y - half[1], x + half[0], y + half[1]]


def record(
    name: str, split: str, picture: np.ndarray, folder: Path, objects: tuple[list[str], list[list[float]]], **more: Any
) -> Record:
    """A record of a drawn picture (0-1), which is written to ``folder``; its conversation is the template writer's."""
    file = folder / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(np.clip(picture, 0, 1) * 255)).save(file)
    refs, boxes = objects
    made: Record = {
        "id": name,
        "image": f"{name}.png",
        "conversations": [],
        "objects": {"ref": refs, "bbox": [[round(value, 2) for value in box] for box in boxes], "bbox_type": "real"},
        "image_size": [SIDE, SIDE],
        "source": "drawn",
        "modality": "",
        "split": split,
        "answer_type": "grounded",
        "provenance": {"image_aspect_ratio": "pad", "box_decimals": 2, "seed": 0},
        **more,
    }
    words = random.Random(f"0:{name}")
    made["conversations"] = write_conversation(made, record_geometry(made), words, box_decimals(made))
    return made


class DrawnRun(DemoRun):
    """A small checkpoint without a prior, and stage 1 on drawn studies; finished steps are not done again.

    Args:
        out: folder of the run.
        seed: of weights and training.
        epochs: of stage 1.
        processes: that train side by side.
    """

    def __init__(self, out: Path, seed: int, epochs: float, processes: int) -> None:
        from rich.console import Console

        settings = DemoSettings(tuning_epochs=epochs, tuning_lr=2e-3, processes=processes)
        super().__init__(out, seed, settings, Steps(Console(quiet=True)))

    def start_from(self, records: Sequence[Record]) -> Path:
        """The small checkpoint, whose tokenizer knows the records' texts; returns the file of their training split."""
        file = self.data / "train.json"
        save_records([one for one in records if one["split"] == "train"], file)
        save_records([one for one in records if one["split"] == "test"], self.data / "test.json")
        if not (self.tiny / "config.json").is_file():
            texts = [turn["value"].replace("<image>\n", "") for one in records[:500] for turn in one["conversations"]]
            make_checkpoint(self.tiny, seed=self.seed, corpus=[*corpus(self.seed), *texts])
        return file

    def tuned(self, name: str, file: Path, *flags: Any) -> Path:
        """Stage 1 on a file of records, unless it is done."""
        checkpoint = self.checkpoint(name)
        if not (checkpoint / "config.json").is_file():
            self.instruction_tuning(name, self.tiny, ["--data_path", file, *flags])
        return checkpoint


def runs(args: argparse.Namespace) -> Iterator[tuple[str, DrawnRun]]:
    """Seed and run of each seed of the command line; `arguments` has read it."""
    for seed in args.seeds.split(","):
        yield seed, DrawnRun(args.out.resolve() / f"seed{seed}", int(seed), args.epochs, args.processes)
