"""Do boxes follow the phrase? Stage 1 on drawn pictures with two shapes each, asked for one of them at a time.

Each picture has two shapes that differ in brightness and form, and a phrase for each: ``bright ring``, ``dark bar``. Every pair
of picture and phrase is a record. Held-out pictures are asked as written, and with the two phrases swapped while the true boxes
stay. A model that boxes what stands out, whatever it is asked, scores alike in both.

    python benchmarks/phrases.py runs/phrases --seeds 0,1,2

Finished steps are not done again. Writes ``results.json`` to the folder.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from drawn_studies import SIDE, arguments, record, runs, shape

from umed_plugin.data.phrase_writer import write_phrase_conversation
from umed_plugin.data.records import Record, box_decimals, record_geometry
from umed_plugin.evaluation.benchmarks.recipe import RECIPE, record_questions
from umed_plugin.evaluation.evaluation_run import EvaluationSettings
from umed_plugin.evaluation.evaluator import evaluate_questions
from umed_plugin.evaluation.metrics.metric import compare_rows
from umed_plugin.evaluation.tables import formatted

SHADES, FORMS = {"bright": 0.95, "dark": 0.05}, ("disc", "ring", "bar", "pole")
KINDS = [(shade, form) for shade in SHADES for form in FORMS]
SHOWN = ("mean_iou", "acc_at_50", "integer_iou", "integer_acc_at_50")


def drawn(folder: Path, seed: int, train: int, test: int) -> list[Record]:
    """Two records for each picture, one for each of its phrases."""
    generator = np.random.default_rng([seed, 11])
    counts = {"train": train, "test": test}
    pictures = [(split, number) for split, count in counts.items() for number in range(count)]
    return [one for split, number in pictures for one in _phrases(folder, f"{split}{number}", split, generator)]


def _phrases(folder: Path, name: str, split: str, generator: np.random.Generator) -> list[Record]:
    picture = np.full((SIDE, SIDE), 0.45) + generator.normal(0, 0.02, (SIDE, SIDE))
    kinds = [KINDS[index] for index in generator.choice(len(KINDS), 2, replace=False)]
    boxes: list[list[float]] = []
    # One in each half, left or right, so that neither covers the other.
    for half, (shade, form) in zip(generator.permutation(2), kinds):
        size = generator.uniform(11, 16)
        x = generator.uniform(size, SIDE / 2 - size) + half * SIDE / 2
        cover, box = shape(form, x, generator.uniform(size, SIDE - size), size)
        boxes.append(box)
        picture = picture * (1 - cover) + SHADES[shade] * cover
    phrases = [f"{shade} {form}" for shade, form in kinds]
    return [
        _record(name, split, picture, folder, phrase, (box, other))
        for phrase, box, other in zip(phrases, boxes, reversed(phrases))
    ]


def _record(
    name: str, split: str, picture: np.ndarray, folder: Path, phrase: str, about: tuple[list[float], str]
) -> Record:
    box, other = about
    more = {"answer_type": "phrase", "phrase": phrase, "patient": name, "terms": {"shape": ["shape"]}}
    made = record(name, split, picture, folder, (["shape"], [box]), **more)
    made |= {"id": f"{name}: {phrase}", "other_phrase": other}
    return _asked(made)


def _asked(made: Record) -> Record:
    words = random.Random(f"0:{made['id']}")
    turns = write_phrase_conversation(made, record_geometry(made), words, box_decimals(made))
    return {**made, "conversations": turns}


def swapped(records: Sequence[Record]) -> list[Record]:
    """The records, each asked for the other phrase of its picture, with its own true box."""
    return [{**_asked({**one, "phrase": one["other_phrase"]}), "id": one["id"]} for one in records]


def main(given: Sequence[str] | None = None) -> None:
    """Train, ask both ways, print a row for each seed and figure."""
    counts = {"pictures": (2000, "of the training split"), "test": (100, "held-out pictures")}
    args = arguments(__doc__, given, **counts)
    results: dict[str, Any] = {}
    print("| seed | figure | asked as written | phrases swapped | difference | n |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for seed, run in runs(args):
        records = drawn(run.data, run.seed, args.pictures, args.test)
        checkpoint = run.tuned("tuned", run.start_from(records))
        settings = EvaluationSettings(batch_size=50, max_new_tokens=40, device="cpu")
        held_out = [one for one in records if one["split"] == "test"]
        plain, other = (
            evaluate_questions(checkpoint, RECIPE, record_questions(asked, run.data), settings)
            for asked in (held_out, swapped(held_out))
        )
        differences = compare_rows(RECIPE.metrics(plain.rows()), other.rows(), plain.rows())
        results[seed] = {"as_written": plain.metrics, "swapped": other.metrics, "difference": differences}
        for name in SHOWN:
            gain = differences[name]
            cells = [formatted(found.metrics[name]["value"], found.metrics[name]["ci95"]) for found in (plain, other)]
            cells += [formatted(gain["difference"], gain["ci95"], "+.3f"), str(gain["n"])]
            print(f"| {seed} | {name} | {' | '.join(cells)} |", flush=True)
        (args.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
