"""Do similar cases help where the picture alone does not say the class? Stage 1 with and without ``--umed_similar 3``.

Each of many sites has a texture of its own, and one class: its studies all show the same grey disc, whose class is the site's.
So the disc says where the finding is, and only other studies of the site say what it is. Neighbours are the nearest training
studies by the tower's mean patch feature. Held-out studies are of the same sites, other patients.

    python benchmarks/similar_cases.py runs/similar --seeds 0,1,2

Finished steps are not done again. Writes ``results.json`` to the folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from drawn_studies import SIDE, arguments, record, runs, shape

from umed_plugin.data.records import Record
from umed_plugin.evaluation.evaluator import evaluate
from umed_plugin.evaluation.results import Evaluation, compare
from umed_plugin.evaluation.tables import formatted

NAMES = ("nodule", "cyst", "calcification", "effusion")


def drawn(folder: Path, seed: int, sites: int, of_each: int) -> list[Record]:
    """``of_each`` training studies and one held-out study of each site."""
    generator = np.random.default_rng([seed, 11])
    records = []
    for site in range(sites):
        texture = {
            "grey": generator.uniform(0.2, 0.7),
            "period": generator.uniform(4, 24),
            "angle": generator.uniform(0, np.pi),
            "contrast": generator.uniform(0.05, 0.2),
        }
        name = NAMES[generator.integers(len(NAMES))]
        for number in range(of_each + 1):
            split = "train" if number < of_each else "test"
            records.append(_study(folder, f"site{site}-{number}", split, name, texture, generator))
    return records


def _study(
    folder: Path, name: str, split: str, lesion: str, texture: dict[str, float], generator: np.random.Generator
) -> Record:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    along = columns * np.cos(texture["angle"]) + rows * np.sin(texture["angle"])
    waves = np.sin(2 * np.pi * along / texture["period"] + generator.uniform(0, 2 * np.pi))
    picture = texture["grey"] + texture["contrast"] * waves + generator.normal(0, 0.02, (SIDE, SIDE))
    size = generator.uniform(8, 14)
    cover, box = shape("disc", *generator.uniform(size, SIDE - size, 2), size)
    picture = picture * (1 - cover) + 0.95 * cover
    terms = {plain: [plain] for plain in NAMES}
    return record(name, split, picture, folder, ([lesion], [box]), terms=terms, patient=name)


def main(given: Sequence[str] | None = None) -> None:
    """Train both, ask, print a row for each seed."""
    args = arguments(
        __doc__,
        given,
        sites=(200, "each with one held-out study"),
        of_each=(6, "training studies of a site"),
        similar=(3, "K"),
    )
    results: dict[str, Any] = {}
    print("| seed | trained and asked without | trained with, asked without | with K | with - without | n |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for seed, run in runs(args):
        records = drawn(run.data, run.seed, args.sites, args.of_each)
        file = run.start_from(records)
        without = run.tuned("without", file)
        # Half of the records are under the stock template and have no cases: what stock LLaVA is asked.
        with_cases = run.tuned("with", file, "--umed_similar", args.similar)
        ask = {"batch_size": 50, "max_new_tokens": 80, "device": "cpu"}
        cases = {"similar": args.similar, "similar_from": file}
        asked = str(run.data / "test.json")
        found: dict[str, Evaluation] = {
            "without": evaluate(without, asked, **ask),
            "asked without": evaluate(with_cases, asked, **ask),
            "with": evaluate(with_cases, asked, **ask, **cases),
        }
        gain = compare(found["without"], found["with"])["accuracy"]
        values = {name: evaluation.metrics["accuracy"]["value"] for name, evaluation in found.items()}
        results[seed] = {**values, "difference": gain}
        cells = [formatted(value, None) for value in values.values()]
        print(f"| {seed} | {' | '.join(cells)} | {formatted(gain['difference'], gain['ci95'], '+.3f')} | {gain['n']} |")
        (args.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
