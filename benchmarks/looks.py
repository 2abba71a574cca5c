"""Does a description find a class that no training study named? Stage 1 on drawn shapes, asked with ``classes.NAME.looks``.

Each picture has two shapes that differ in brightness or form, and one of them is the finding. Six of the eight kinds of shape are
classes of the training split, with a name that says nothing and a description (``a bright ring``). The other two appear there
too, but never as the finding. Held-out pictures ask for these: by the bare name, which the model has never read, and by the
description. The score is that of ``--benchmark looks:RECIPE``.

    python benchmarks/looks.py runs/looks --seeds 0,1,2

Finished steps are not done again. Writes ``results.json`` to the folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from drawn_studies import SIDE, arguments, record, runs, shape

from umed_plugin.data.looks import looks_question
from umed_plugin.data.records import Record, record_geometry
from umed_plugin.evaluation.benchmarks.looks import OF_RECIPE, looks_questions
from umed_plugin.evaluation.benchmarks.recipe import record_questions
from umed_plugin.evaluation.evaluation_run import EvaluationSettings
from umed_plugin.evaluation.evaluator import evaluate_questions
from umed_plugin.evaluation.tables import formatted

SHADES, FORMS = {"bright": 0.95, "dark": 0.05}, ("disc", "ring", "bar", "pole")
NAMES = dict(
    zip(
        [(shade, form) for shade in SHADES for form in FORMS],
        ("velum", "corin", "tasma", "ortis", "lenor", "pilum", "sarda", "nomel"),
    )
)
UNSEEN = (("bright", "bar"), ("dark", "ring"))


def drawn(folder: Path, seed: int, train: int, test: int) -> list[Record]:
    """The studies: the finding of a training study is a seen kind, that of a held-out one an unseen kind."""
    generator = np.random.default_rng([seed, 7])
    seen = [kind for kind in NAMES if kind not in UNSEEN]
    return [
        _study(folder, f"{split}{number}", split, kinds[generator.integers(len(kinds))], generator)
        for split, count, kinds in (("train", train, seen), ("test", test, list(UNSEEN)))
        for number in range(count)
    ]


def _study(folder: Path, name: str, split: str, kind: tuple[str, str], generator: np.random.Generator) -> Record:
    others = [other for other in NAMES if other != kind]
    picture = np.full((SIDE, SIDE), 0.45) + generator.normal(0, 0.02, (SIDE, SIDE))
    boxes: list[list[float]] = []
    for shade, form in (kind, others[generator.integers(len(others))]):
        while True:
            size = generator.uniform(11, 16)
            x, y = generator.uniform(size, SIDE - size, 2)
            cover, box = shape(form, x, y, size)
            if (
                not boxes
                or min(abs(x - (boxes[0][0] + boxes[0][2]) / 2), 99) + abs(y - (boxes[0][1] + boxes[0][3]) / 2) > 40
            ):
                break
        boxes.append(box)
        picture = picture * (1 - cover) + SHADES[shade] * cover
    terms = {plain: [plain] for plain in NAMES.values()}
    looks = {plain: f"a {shade} {form}" for (shade, form), plain in NAMES.items()}
    made = record(name, split, picture, folder, ([NAMES[kind]], boxes[:1]), terms=terms, looks=looks)
    if split == "train" and (asked := looks_question(made, 1.0, 0)):
        made["conversations"][0]["value"] = f"<image>\n{asked}"
    return made


def main(given: Sequence[str] | None = None) -> None:
    """Train, ask, print a row for each seed."""
    counts = {"studies": (4000, "of the training split"), "test": (150, "held-out studies")}
    args = arguments(__doc__, given, **counts)
    results: dict[str, Any] = {}
    print("| seed | bare name | described | difference | IoU of trained classes | n |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for seed, run in runs(args):
        records = drawn(run.data, run.seed, args.studies, args.test)
        checkpoint = run.tuned("tuned", run.start_from(records))
        settings = EvaluationSettings(batch_size=50, max_new_tokens=80, device="cpu")
        held_out = [one for one in records if one["split"] == "test"]
        known = [one for one in records if one["split"] == "train"][: args.test]
        found = {
            what: evaluate_questions(
                checkpoint, OF_RECIPE.benchmark, looks_questions(record_questions(of, run.data)), settings
            ).metrics
            for what, of in (("unseen", held_out), ("trained", known))
        }
        results[seed] = found
        gain = found["unseen"]["iou_gain"]
        cells = [formatted(found["unseen"][f"mean_iou/{form}"]["value"], None) for form in ("bare", "described")]
        cells += [formatted(gain["value"], gain["ci95"], "+.3f")]
        cells += [formatted(found["trained"]["mean_iou/described"]["value"], None), str(len(held_out))]
        print(f"| {seed} | {' | '.join(cells)} |")
        (args.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    assert record_geometry(records[0]).mode == "pad"


if __name__ == "__main__":
    main()
