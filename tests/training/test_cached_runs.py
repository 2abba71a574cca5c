"""Whole trainings with ``--umed_image_cache``: the numbers of a run without it, and no image decoded once the cache is there."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import torch
from support.umed_runs import train_flags, umed_run, weights

from umed_plugin.commands.demo.studies import make_studies
from umed_plugin.data.build import build_records
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.records import save_records

STUDIES = 8
TUNING = shlex.split("--umed_stage instruction_tuning --num_train_epochs 2")
REWARDING = shlex.split(
    "--umed_stage rewarding --umed_num_candidates 2 --umed_max_new_tokens 8 --max_steps 3 --lora_enable True --lora_r 4"
)


def test_both_stages_from_the_cache_are_those_without_and_open_no_image(tiny_mistral: Path, tmp_path: Path) -> None:
    """DICOM, NIfTI and PNG; the runs without a cache read what a build has rendered."""
    studies = tmp_path / "studies"
    make_studies(studies, train=STUDIES, val=0, test=0)
    rendered = records(studies, tmp_path / "rendered", render=True)
    in_place = records(studies, tmp_path / "in_place", render=False)
    cached = ["--umed_image_cache", str(tmp_path / "cache")]

    plain = [
        run(tiny_mistral, rendered, tmp_path / f"plain-{n}", *stage) for n, stage in enumerate((TUNING, REWARDING))
    ]
    cold = run(tiny_mistral, in_place, tmp_path / "cold", *TUNING, *cached)
    assert cold == plain[0]
    assert len(list((tmp_path / "cache").rglob("*.square"))) == STUDIES

    # Of the same size and time, but no images any more: whoever opens one fails.
    for file in [*studies.rglob("*.*"), *(tmp_path / "rendered").rglob("*.png")]:
        status = file.stat()
        file.write_bytes(bytes(status.st_size))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    warm = [
        run(tiny_mistral, in_place, tmp_path / f"warm-{n}", *stage, *cached)
        for n, stage in enumerate((TUNING, REWARDING))
    ]
    assert warm == plain
    for n in range(2):
        expected, found = weights(tmp_path / f"plain-{n}"), weights(tmp_path / f"warm-{n}")
        assert set(found) == set(expected) and expected
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    without = umed_run(command(tiny_mistral, rendered, tmp_path / "without", *TUNING))
    assert without.returncode == 1 and "cannot" in without.stderr, "the images were still there"


def records(studies: Path, folder: Path, *, render: bool) -> Path:
    built = build_records(load_recipe("demo_studies"), out_dir=folder, data_root=studies, split="train", render=render)
    assert len(built) == STUDIES
    assert sum("reading" in record for record in built) == (0 if render else 6), "two of the studies are 8-bit PNG"
    save_records(built, folder / "records.json")
    return folder / "records.json"


def command(checkpoint: Path, data: Path, out: Path, *flags: str) -> list[str]:
    return ["python", "-m", "llava.train.train_mem", *train_flags(checkpoint, data, out, *flags)]


def run(checkpoint: Path, data: Path, out: Path, *flags: str) -> list[dict[str, Any]]:
    """What the training logged, times aside."""
    done = umed_run(command(checkpoint, data, out, *flags))
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second", "seconds", "memory")
    return [{name: value for name, value in line.items() if not any(t in name for t in timed)} for line in history]
