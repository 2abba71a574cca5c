"""From an empty folder: images with labels alone, and by one `umed upgrade` a checkpoint that draws boxes, measured on true ones.

    python benchmarks/labels_day.py runs/day

Draws 400 pictures with one lesion each into a folder for each class, 16 normal ones into another, and 200 held-out studies of the
demo with their true boxes. A small checkpoint with random weights is upgraded: pseudo-boxes, stage 1, stage 2, and an
evaluation of each on the true boxes. Prints the three rows. The same command continues a stopped run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from umed_plugin.commands.demo.pipeline import environment
from umed_plugin.commands.demo.prior import corpus
from umed_plugin.commands.demo.studies import draw_study, make_studies
from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint

RECIPE = """
name: day_labels
description: Drawn pictures in one folder for each class.
terms: {licence: Apache-2.0, url: "https://example.org"}
modality: X-ray
annotations: {reader: folders, files: ., no_finding: [normal]}
pseudo_boxes: {normal: negatives, shots: 16, seed: SEED, steps: STEPS}
classes:
  nodule: {name: nodule, synonyms: [nodular opacity]}
  cyst: {name: cyst, synonyms: [cystic change]}
  effusion: {name: effusion, synonyms: [fluid collection]}
  calcification: {name: calcification, synonyms: [calcified focus]}
split: {by: patient, fractions: {train: 1}}
"""
# As in the demo, whose model is as small.
SETTINGS: dict[str, Any] = {
    "method": "full",
    "instruction_tuning.learning_rate": 3e-3,
    "instruction_tuning.projector_learning_rate": "null",
    "instruction_tuning.batch_size": 16,
    "instruction_tuning.accumulation": 1,
    "rewarding.learning_rate": 1e-4,
    "rewarding.projector_learning_rate": "null",
    "rewarding.batch_size": 12,
    "rewarding.accumulation": 1,
    "rewarding.temperature": 0.5,
    "rewarding.max_new_tokens": 104,
    "rewarding.reward_weights": "[4, 2, 1]",
    "rewarding.flags": "{umed_kl_coef: 0.015, umed_advantage_scale: batch, umed_judge: classes}",
    "evaluation.max_new_tokens": 104,
    "evaluation.recipe": "demo_studies",
}


def draw(folder: Path, labelled: int, normal: int, seed: int) -> None:
    """Write ``labelled`` pictures with one lesion and ``normal`` ones without into the folders of their classes."""
    left, number = {True: labelled, False: normal}, 0
    while any(left.values()):
        picture, lesions = draw_study(np.random.default_rng([seed, 77, number]))
        number += 1
        if len(lesions) > 1 or not left[bool(lesions)]:
            continue
        left[bool(lesions)] -= 1
        target = folder / (lesions[0].name if lesions else "normal") / f"{number:05}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(np.clip(picture, 0, 1) * 255)).save(target)


def command(out: Path, options: argparse.Namespace) -> list[str]:
    """Write the images, the recipe and the checkpoint unless they are there, and return the one command."""
    images, studies, checkpoint = out / "images", out / "studies", out / "llava-mistral-tiny"
    if not (checkpoint / "config.json").is_file():
        draw(images, options.labelled, options.normal, options.seed)
        make_studies(studies, seed=options.seed, train=0, val=0, test=options.test)
        (out / "labels.yaml").write_text(
            RECIPE.replace("SEED", str(options.seed)).replace("STEPS", str(options.map_steps)), encoding="utf-8"
        )
        make_checkpoint(checkpoint, seed=options.seed, corpus=corpus(options.seed))
    settings = {
        **SETTINGS,
        "evaluation.data_root": studies,
        "instruction_tuning.steps": options.steps[0],
        "rewarding.steps": options.steps[1],
        "seed": options.seed,
    }
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    words = [sys.executable, "-m", "umed_plugin.cli", "upgrade", checkpoint, "--recipe", out / "labels.yaml"]
    return [str(word) for word in [*words, "--data-root", images, "--out", out / "run", *sets]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the upgrade and print its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--labelled", type=int, default=400)
    parser.add_argument("--normal", type=int, default=16)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--map-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, nargs=2, default=[600, 60], help="optimizer steps of the stages")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run(command(out, options), check=True, env=environment())
    summary = json.loads((out / "run" / "summary.json").read_text(encoding="utf-8"))
    print("| | accuracy | mean IoU | 95 % interval | IoU >= 0.5 |\n|---|---|---|---|---|")
    for stage in ("base", "instruction_tuning", "rewarding"):
        row = summary[stage]
        low, high = row["mean_iou_ci95"] or (float("nan"), float("nan"))
        figures = f"{row['accuracy']:.3f} | {row['mean_iou']:.3f} | {low:.3f} to {high:.3f} | {row['acc_at_50']:.3f}"
        print(f"| {stage} | {figures} |")


if __name__ == "__main__":
    main()
