"""Pseudo-boxes on the demo's studies with their boxes hidden: how well the map finds lesions, and what stage 1 learns from it.

    python benchmarks/pseudo_boxes.py runs/pseudo --seeds 10,11,12 --choose     which peak_share, on other studies
    python benchmarks/pseudo_boxes.py runs/pseudo --seeds 0,1,2                 the figures, with two controls
    python benchmarks/pseudo_boxes.py runs/pseudo --seeds 0,1,2 --stage-1       stage 1 on pseudo-boxes and on true ones

The recipe reads the class of each study and no box. AUROC compares the map's peaks on studies with and without a lesion that
neither trained it nor set its level (nan: there is none). Pointing is the share of studies whose peak lies in a lesion. IoU is
that of the one pseudo-box with the nearest lesion, 0 where there is no box. "Kept" are the studies whose peak reaches
least_score. Controls: a map of 0 steps, and one that was trained on pictures in which nothing was drawn.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
from ablation import steps_taken

from umed_plugin.commands.demo.pipeline import DemoRun, DemoSettings
from umed_plugin.commands.demo.studies import make_studies
from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint
from umed_plugin.data.annotations import read_annotations
from umed_plugin.data.build import build_records
from umed_plugin.data.images.drawing import read_pixels
from umed_plugin.data.recipes.pseudo_boxes import PseudoBoxRule
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.records import Record, record_geometry, save_records, true_boxes, with_pseudo_boxes
from umed_plugin.evaluation.benchmarks.recipe_cases import headline
from umed_plugin.grounding.boxes import iou_matrix
from umed_plugin.pseudo_boxes import PseudoBoxes
from umed_plugin.pseudo_boxes.box_rule import box_of
from umed_plugin.pseudo_boxes.finder import divided
from umed_plugin.pseudo_boxes.map_training import MapSettings, trained_map
from umed_plugin.pseudo_boxes.synthesis import KINDS, NOTHING, Picture
from umed_plugin.terminal.progress import Steps

SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CONTROLS = {"trained": {}, "0 steps": {"steps": 0}, "nothing drawn": {"kinds": (NOTHING,)}}
HIDDEN = """
name: demo_labels
description: The demo's studies with their classes and without their boxes.
terms: {licence: Apache-2.0, url: "umed demo --out DIR"}
annotations:
  reader: csv
  files: annotations.csv
  columns: {file: file, lesion: lesion, patient: patient, split: split, modality: modality, slice: slice}
  no_finding: [""]
pseudo_boxes: {normal: negatives, seed: SEED, STEPS}
classes:
  nodule: {name: nodule, synonyms: [nodular opacity]}
  cyst: {name: cyst, synonyms: [cystic change]}
  effusion: {name: effusion, synonyms: [fluid collection]}
  calcification: {name: calcification, synonyms: [calcified focus]}
split: {by: column}
"""


def hidden_recipe(folder: Path, seed: int, steps: int = 300) -> Path:
    """Write the recipe that reads no box."""
    path = folder / "demo_labels.yaml"
    path.write_text(HIDDEN.replace("SEED", str(seed)).replace("STEPS", f"steps: {steps}"), encoding="utf-8")
    return path


class Seed:
    """One seed's studies, tower and normal images.

    Args:
        folder: of the seed.
        seed: of studies, tower and maps.
        studies: number of studies whose boxes are hidden.
        steps: of a map.
    """

    def __init__(self, folder: Path, seed: int, studies: int, steps: int) -> None:
        self.seed, self.steps = seed, steps
        data = folder / "studies"
        if not (data / "annotations.csv").is_file():
            make_studies(data, seed=seed, train=studies, val=0, test=0)
        checkpoint = folder / "llava-mistral-tiny"
        if not (checkpoint / "config.json").is_file():
            make_checkpoint(checkpoint, seed=seed)
        self.finder = PseudoBoxes(checkpoint, folder)
        truth = build_records(load_recipe("demo_studies"), out_dir=folder, data_root=data)
        labels = read_annotations(load_recipe(hidden_recipe(folder, seed, steps)), data)
        chosen = {(str(item.image), item.slice): item for item in self.finder.normals(labels.normals)}
        self.pictures = {record["id"]: self._picture(record, folder) for record in truth}
        self.studies: dict[str, list[Record]] = defaultdict(list)
        shots: dict[str, list[Any]] = defaultdict(list)
        for record in truth:
            item = chosen.get((str(data / record["provenance"]["original"]), record["provenance"]["slice"]))
            if item is None:
                self.studies[record["modality"]].append(record)
            else:
                shots[record["modality"]].append(SimpleNamespace(item=item, picture=self.pictures[record["id"]]))
        self.shots = dict(shots)

    def _picture(self, record: Record, folder: Path) -> Picture:
        return self.finder.tower.picture(read_pixels(folder / record["image"]), record_geometry(record))

    def measure(self, peak_shares: Sequence[float], **changes: Any) -> dict[str, Any]:
        """Figures of all modalities together; ``changes`` are fields of `MapSettings`."""
        settings = MapSettings(**{"seed": self.seed, "steps": self.steps, "kinds": KINDS, **changes})
        points, kept, aurocs = [], [], []
        ious: dict[float, list[float]] = {share: [] for share in peak_shares}
        for modality, records in self.studies.items():
            training, held_out = divided(self.shots[modality])
            trained = trained_map(
                self.finder.tower, [s.picture for s in training], [s.picture for s in held_out], settings
            )
            scores: dict[bool, list[float]] = {True: [], False: []}
            for record in records:
                picture = self.pictures[record["id"]]
                anomalies = trained.of([picture])[0]
                lesions = record_geometry(record).to_square(true_boxes(record))
                scores[bool(lesions)].append(float(np.where(picture.inside, anomalies, -1).max()))
                if not lesions:
                    continue
                points.append(_points_at(anomalies, picture, lesions))
                kept.append(scores[True][-1] >= trained.highest)
                for share in peak_shares:
                    box, _ = box_of(anomalies, picture.inside, trained.level, share)
                    ious[share].append(0.0 if box is None else float(iou_matrix([box], lesions).max()))
            aurocs += [(auroc(scores[True], scores[False]), len(scores[True]))] if scores[False] else []
        of_kept = {share: [value for value, keep in zip(values, kept) if keep] for share, values in ious.items()}
        count_of = sum(count for _, count in aurocs)
        return {
            "auroc": sum(value * count for value, count in aurocs) / count_of if count_of else float("nan"),
            "pointing": fmean(points),
            "kept": fmean(kept),
            "iou": {share: fmean(values) for share, values in ious.items()},
            "iou of kept": {share: fmean(values) if values else 0.0 for share, values in of_kept.items()},
            "images": len(points),
        }


def _points_at(anomalies: np.ndarray, picture: Picture, lesions: Sequence[Any]) -> float:
    row, column = np.unravel_index(int(np.where(picture.inside, anomalies, -1).argmax()), anomalies.shape)
    x, y = (column + 0.5) / anomalies.shape[1], (row + 0.5) / anomalies.shape[0]
    return float(any(x1 <= x < x2 and y1 <= y < y2 for x1, y1, x2, y2 in lesions))


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The share of pairs in which the positive is higher; equal ones count half."""
    higher = np.asarray(positive)[:, None] - np.asarray(negative)[None, :]
    return float((higher > 0).mean() + 0.5 * (higher == 0).mean())


def stage_1(folder: Path, seed: int, settings: DemoSettings, steps: int) -> dict[str, Any]:
    """Stage 1 of the demo on true boxes and on pseudo-boxes of the same studies; both are asked about the same held-out ones."""
    from rich.console import Console

    kept = folder / "stage_1.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    demo = DemoRun(folder, seed, settings, Steps(Console(quiet=True)))
    records = demo.records()
    demo.base_checkpoint()
    recipe = load_recipe(hidden_recipe(folder, seed, steps))
    finder = PseudoBoxes(demo.base, demo.data, sheet=folder / "pseudo_boxes.png")
    pseudo = build_records(recipe, out_dir=demo.data, split="train", data_root=demo.data / "studies", find_boxes=finder)
    save_records(pseudo, demo.data / "pseudo.json")
    truth = {record["provenance"]["original"]: record for record in records}
    overlaps = [
        float(iou_matrix(true_boxes(record), true_boxes(truth[record["provenance"]["original"]])).max())
        for record in with_pseudo_boxes(pseudo)
    ]
    found: dict[str, Any] = {"pseudo-boxes": len(overlaps), "their IoU": fmean(overlaps)}
    on_true = demo.instruction_tuning("true")
    # Fewer records have a pseudo-box than have a true one: both trainings take the same number of optimizer steps.
    as_long = ["--data_path", demo.data / "pseudo.json", "--max_steps", steps_taken(on_true)]
    for name, checkpoint in (("true", on_true), ("pseudo", demo.instruction_tuning("pseudo", flags=as_long))):
        found[name] = headline(demo.evaluate(name, checkpoint, records))
    kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--studies", type=int, default=600, help="studies whose boxes are hidden")
    parser.add_argument("--steps", type=int, default=300, help="of a map")
    parser.add_argument("--peak-share", type=float, default=PseudoBoxRule().peak_share)
    parser.add_argument("--choose", action="store_true", help="IoU by peak_share")
    parser.add_argument("--stage-1", action="store_true", help="train stage 1 on pseudo-boxes and on true ones")
    parser.add_argument("--tuning", type=int, default=2000, help="studies of stage 1")
    options = parser.parse_args(arguments)
    out, rows = options.out.resolve(), []
    for seed in map(int, options.seeds.split(",")):
        if options.stage_1:
            sizes = DemoSettings(tuning=options.tuning, rewarding=0, val=0)
            found = stage_1(out / f"stage-1-seed{seed}", seed, sizes, options.steps)
            cells = [f"{found['pseudo-boxes']}", f"{found['their IoU']:.3f}"]
            for name in ("true", "pseudo"):
                low, high = found[name]["mean_iou_ci95"] or (float("nan"),) * 2
                cells.append(f"{found[name]['mean_iou']:.3f} ({low:.3f} to {high:.3f})")
            cells += [f"{found[name]['accuracy']:.3f}" for name in ("true", "pseudo")]
            rows.append([str(seed), *cells])
            continue
        made = Seed(out / f"seed{seed}", seed, options.studies, options.steps)
        shares = SHARES if options.choose else (options.peak_share,)
        for name, changes in {"trained": {}}.items() if options.choose else CONTROLS.items():
            found = made.measure(shares, **changes)
            figures = [f"{found[key]:.3f}" for key in ("auroc", "pointing", "kept")]
            ious = [f"{found['iou'][share]:.3f} / {found['iou of kept'][share]:.3f}" for share in shares]
            rows.append([f"{seed}: {name}", str(found["images"]), *figures, *ious])
            print(" | ".join(rows[-1]), flush=True)
    if options.stage_1:
        heads = ["seed", "pseudo-boxes", "their IoU", "test IoU, true", "test IoU, pseudo", "accuracy, true", "pseudo"]
    else:
        heads = ["seed", "studies", "AUROC", "pointing", "kept", *(f"IoU at {share}: all / kept" for share in shares)]
    print(table(heads, rows))


if __name__ == "__main__":
    main()
