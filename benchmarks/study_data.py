"""The records of a study: generated or of a recipe, the first N labelled ones, with noise on their boxes."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

from study_plan import Data
from study_recipes import GENERATED, recipe_named

from umed_plugin.commands.demo.studies import make_studies
from umed_plugin.data.build import build_records
from umed_plugin.data.recipes.options import HoldOut
from umed_plugin.data.recipes.recipe import AnyRecipe, Mixture
from umed_plugin.data.records import Record, box_decimals, load_records, record_geometry, save_records, true_boxes
from umed_plugin.data.template_writer import write_conversation
from umed_plugin.errors import UmedError


def make_data(folder: Path, data: Data, seed: int) -> Path:
    """Write ``records.json`` of all splits under ``folder``, once; returns its path. Another recipe needs another folder."""
    file = folder / "records.json"
    if not file.is_file():
        root = folder / "studies" if data.recipe == GENERATED or data.generated else None
        if root is not None:
            make_studies(root, seed=seed, train=data.train, val=data.val, test=data.test)
        elif data.data_root is not None:
            root = Path(os.path.expandvars(data.data_root))
        recipe = _recipe(data)
        records = build_records(recipe, out_dir=folder, image_aspect_ratio="pad", seed=seed, data_root=root, workers=1)
        if isinstance(recipe, Mixture):
            records.sort(key=_place)
        if data.folds is not None:
            records = in_folds(records, data.folds, seed)
        save_records(records, file)
    return file


def _recipe(data: Data) -> AnyRecipe:
    recipe = recipe_named(data.recipe)
    if data.hold_out is None:
        return recipe
    return recipe.model_copy(update={"hold_out": HoldOut(**data.hold_out)})


def _place(record: Record) -> bytes:
    """Where a record stands among those of all sources, so that the first N are of each of them."""
    return hashlib.sha256(record["id"].encode()).digest()


def in_folds(records: Sequence[Record], folds: int, fold: int) -> list[Record]:
    """The records with new splits: patients of fold ``fold`` are the test, those of the next one the validation.

    A hash puts patients into folds, so that all slices of one patient are in one split. Without a patient it is the image's.
    """
    test, val = fold % folds, (fold + 1) % folds
    names = {test: "test", val: "val"}
    return [{**record, "split": names.get(_fold_of(record, folds), "train")} for record in records]


def _fold_of(record: Record, folds: int) -> int:
    patient = f"{record.get('source')}/{record.get('patient') or record.get('image') or record['id']}"
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") % folds


def labelled_file(records_file: Path, size: int, noise: float, seed: int) -> Path:
    """A file beside the records with the first ``size`` training records and all held-out ones for validation, made once.

    Raises:
        UmedError: there are fewer.
    """
    file = records_file.with_name(f"labelled-{size}{f'-noise{noise:g}' if noise else ''}.json")
    if not file.is_file():
        records = load_records(records_file)
        train = [record for record in records if record["split"] == "train"]
        if len(train) < size:
            raise UmedError(
                f"{records_file}: has {len(train)} training records, and the study asks for {size}. Lower sizes."
            )
        chosen = [with_noise(record, noise, seed) for record in train[:size]]
        save_records(chosen + [record for record in records if record["split"] == "val"], file)
    return file


def with_noise(record: Record, noise: float, seed: int) -> Record:
    """The record as somebody labels it who draws each corner up to ``noise`` of the box's side away, in boxes and answer.

    The phrases of the answer are drawn anew by the record's id, the same for every noise above 0.
    """
    if not noise or not record["objects"]["bbox"]:
        return record
    rng = random.Random(f"{seed}/{record['id']}")
    width, height = record["image_size"]
    boxes = [_moved(box, noise, width, height, rng) for box in true_boxes(record)]
    moved = {**record, "objects": {**record["objects"], "bbox": boxes}}
    words = random.Random(f"{seed}/{record['id']}/words")
    turns = write_conversation(moved, record_geometry(moved), words, box_decimals(moved))
    return json.loads(json.dumps({**moved, "conversations": turns}))


def _moved(box: Sequence[float], noise: float, width: int, height: int, rng: random.Random) -> list[float]:
    x1, y1, x2, y2 = box
    across, down = noise * (x2 - x1), noise * (y2 - y1)
    limits = (width, height, width, height)
    shifts = (across, down, across, down)
    return [min(max(v + rng.uniform(-s, s), 0.0), float(limit)) for v, s, limit in zip(box, shifts, limits)]
