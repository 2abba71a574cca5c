"""A build with pseudo-boxes that is killed with -9 and started again ends with the bytes of one that was not."""

from __future__ import annotations

import json
import signal
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support import forked
from support.drawn import write_recipe
from support.umed_runs import environment

from umed_plugin.checkpoints.safe_loading import load_pickle
from umed_plugin.pseudo_boxes.finder import FOLDER

pytestmark = [pytest.mark.llava, pytest.mark.run]
CSV = (
    "{reader: csv, files: labels.csv, image_root: images, no_finding: [''], "
    "columns: {file: file, lesion: label, patient: patient, modality: modality}}"
)
SPLIT = "{by: patient, fractions: {train: 1}}"
# Runs at the start of the build's process: states are kept after 5 steps, each step is noted, and one moment kills.
HOOK = """
import os, signal
import torch
from umed_plugin.pseudo_boxes import finder, map_training

map_training.SAVE_EVERY = 5

def killed_after(wrapped, number, file_of, left):
    count = []
    def called(*given, **named):
        wrapped(*given, **named)
        count.append(1)
        if len(count) == number:
            file = file_of(*given)
            os.truncate(file, left(os.path.getsize(file)))
            os.kill(os.getpid(), signal.SIGKILL)
    return called

step = map_training._step
def noted(*given):
    with open(os.environ["STEPS"], "a") as file:
        file.write(f"{given[-1]} ")
    step(*given)
map_training._step = noted
if os.environ["MOMENT"] == "the map trains":
    torch.save = killed_after(torch.save, 2, lambda state, file: file, lambda size: size // 2)
if os.environ["MOMENT"] == "boxes are written":
    kept = finder._KeptBoxes
    kept.add = killed_after(kept.add, 6, lambda kept, *box: kept._path, lambda size: size - 20)
"""


def build(recipe: Path, tower: Path, out: Path, hook: Path, moment: str = "") -> int:
    """The exit status of a build in a process of its own."""
    command = ["recipe", "build", recipe, "--out", out / "train.json", "--tower", tower, "--quiet", "--workers", "1"]
    env = {**environment(hook), "MOMENT": moment, "STEPS": str(out.with_suffix(".steps"))}
    status: int = forked.start([sys.executable, "-m", "umed_plugin.cli", *command], env=env).wait(timeout=200)
    return status


def boxes_of(out: Path) -> dict[str, list[Any]]:
    """The lines that a build can use, by image; of two equal ones either."""
    lines = [line for file in (out / FOLDER).glob("boxes-*.jsonl") for line in file.read_bytes().split(b"\n") if line]
    whole = [line for line in lines if int(line[:8], 16) == zlib.crc32(line[9:])]
    return {key: rest for key, *rest in map(json.loads, (line[9:] for line in whole))}


@pytest.mark.parametrize(
    ("moment", "steps"),
    [("the map trains", [*range(10), *range(5, 12), *range(12)]), ("boxes are written", [*range(12), *range(12)])],
)
def test_a_build_that_is_killed_ends_with_the_same_bytes(
    moment: str, steps: list[int], studies: Path, tower: Path, tmp_path: Path
) -> None:
    """The kill comes in the middle of a write: of the state after 10 of 12 steps, or of the line of the sixth of eight boxes."""
    recipe = write_recipe(studies, CSV, SPLIT, "pseudo_boxes: {shots: 5, steps: 12, least_score: 0.0}\n")
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert build(recipe, tower, whole, hook) == 0
    assert build(recipe, tower, killed, hook, moment) == -signal.SIGKILL
    assert not list(killed.glob("*.json")) and not list(killed.glob("*.png")), "nothing that looks like a result"
    halves = [file.name for file in (killed / FOLDER).iterdir() if file.name.endswith(".partial")]
    assert len(halves) == (moment == "the map trains")
    assert len(boxes_of(killed)) == (5 if moment == "boxes are written" else 0), "the sixth line is cut off"

    assert build(recipe, tower, killed, hook) == 0
    for name in ("train.json", "train.pseudo_boxes.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert list(map(int, (tmp_path / "killed.steps").read_text().split())) == steps
    assert boxes_of(killed) == boxes_of(whole) and len(boxes_of(whole)) == 8
    maps = [sorted(file.name for file in (folder / FOLDER).glob("map-*.pt")) for folder in (whole, killed)]
    assert maps[0] == maps[1] and maps[0]
    for name in maps[0]:
        expected, found = (load_pickle(folder / FOLDER / name)["network"] for folder in (whole, killed))
        assert set(found) == set(expected) and expected
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
