"""Which records a stage trains on: those of ``--umed_recipe`` and ``--data_path`` in one split, checked before a model is loaded.

Both stages use them: stage 1 through `umed_plugin.training.tuning_data`, stage 2 through `umed_plugin.training.rewarding_data`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from umed_plugin import files
from umed_plugin.checkpoints.prompt_templates import separators
from umed_plugin.data import record_writer
from umed_plugin.data.annotations import read_annotations
from umed_plugin.data.build import build_records
from umed_plugin.data.data_stamp import data_stamp
from umed_plugin.data.image_files import check_image_files
from umed_plugin.data.images import READERS
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.record_file import JoinedRecords, RecordFile, make_index, open_records
from umed_plugin.data.records import check_exists, not_records, save_records
from umed_plugin.data.splits import SPLITS
from umed_plugin.data.texts import read_json
from umed_plugin.errors import UmedError, note, warn
from umed_plugin.flags.rules import REWARDING
from umed_plugin.training.first_process import first_process_does
from umed_plugin.training.label_share import own_share


def training_records(data_args: Any, training_args: Any, split: str = "train") -> JoinedRecords:
    """The records of ``--umed_recipe`` and ``--data_path`` in one split; they are read when they are asked for.

    Raises:
        UmedError: a file cannot be read, an item cannot be trained on (`umed_plugin.data.items`), the split is empty, or records
            were written for another ``--image_aspect_ratio``.
    """
    flags = training_args.umed
    marks = separators(data_args.umed_run.model_args.version)
    parts: list[RecordFile] = []
    if flags.umed_recipe is not None:
        parts.append(_recipe_records(data_args, training_args, split, marks))
    if data_args.data_path is not None:
        parts.append(_file_records(data_args, flags, split, marks))
    records = JoinedRecords(parts)
    tells = training_args.process_index == 0
    if flags.umed_stage == REWARDING:
        records = _without_probes(records, tells)
    splits = records.texts("split")
    of_split = records.where(splits == split)
    if len(of_split) < len(records) and split == "train" and tells:
        _tell_other_splits(splits.tolist())
    if not of_split:
        found = ", ".join(map(repr, sorted(set(splits.tolist()))))
        raise UmedError(
            f"{data_args.data_path or flags.umed_recipe}: has no record of the split {split!r}; 'split' is {found or 'empty'}."
        )
    if split != "train":
        of_split = _with_true_boxes(of_split, split, tells)
    _check_aspect_ratio(of_split, data_args.image_aspect_ratio)
    if flags.umed_label_share is not None and split == "train":
        folder = data_args.image_folder or os.curdir
        of_split, divided = own_share(of_split, flags.umed_label_share, flags.umed_stage, folder)
        if tells:
            note(divided)
    if data_args.image_folder is None:
        # Paths of built records are absolute. os.path.join keeps them, but does not accept None before them.
        data_args.image_folder = os.curdir
    return of_split


def _with_true_boxes(records: JoinedRecords, split: str, tells: bool) -> JoinedRecords:
    """The held-out records that answers can be scored by. Stage 1 also trains on probes, and on items without true boxes."""
    labelled = records.where(records.column("labelled") & ~records.column("probe"))
    if not labelled:
        raise UmedError(
            f"--umed_val_every: none of the {len(records)} records of the split {split!r} has true boxes. Answers are scored by "
            "the records that `umed recipe build` writes."
        )
    if len(labelled) < len(records) and tells:
        note(
            f"{len(records) - len(labelled)} of {len(records)} held-out records have no true boxes, or are probes: they are not "
            "scored."
        )
    return labelled


def _without_probes(records: JoinedRecords, tells: bool) -> JoinedRecords:
    """Stage 2 rewards diagnoses with boxes; the answer to a probe is one of its options."""
    probes = records.column("probe")
    if probes.any() and tells:
        note(f"{int(probes.sum())} probes are left out: stage 1 trains on them, stage 2 does not.")
    return records.where(~probes) if probes.any() else records


def _tell_other_splits(splits: Sequence[str]) -> None:
    """Say how many records are not trained on, with the name of their split. A name that nothing reads is a warning."""
    others = Counter(name for name in splits if name != "train")
    unknown = {name: count for name, count in others.items() if name not in SPLITS}
    if unknown:
        named = ", ".join(f"{name!r} ({count})" for name, count in list(unknown.items())[:3])
        warn(f"records with the split {named} are used by nothing. Known splits: {', '.join(SPLITS)}.")
    note(f"{sum(others.values())} records of other splits ({', '.join(sorted(others))}) are left out of training.")


def _check_files(records: RecordFile, data_args: Any, flags: Any, split: str) -> None:
    """Look for the images of a records file. Those of a recipe were read when its records were built."""
    cached = flags.umed_image_cache is not None
    # Which images a feature cache holds is known once the tower is loaded: `QueryDataset.use_feature_cache` reads the others.
    has_features = flags.umed_stage == REWARDING and flags.umed_feature_cache is not None and split == "train"
    has_reading = records.column("has_reading")
    only_here = np.flatnonzero(has_reading)
    if len(only_here) and not cached:
        raise UmedError(
            f"--data_path {data_args.data_path}: {len(only_here)} of {len(records)} records (the first: "
            f"{records[only_here[0]].get('id')}) name an image that LLaVA does not read as it was annotated ('reading': a slice, "
            "a window). Give --umed_image_cache, or build the records again with images: umed recipe build."
        )
    check_image_files(
        records.where(~has_reading),
        data_args.image_folder or os.curdir,
        f"--data_path {data_args.data_path}",
        skip=flags.umed_on_bad_image == "skip",
        opened_by_llava=not cached and not has_features,
    )


def _file_records(data_args: Any, flags: Any, split: str, marks: Sequence[str]) -> RecordFile:
    """Records of a JSON file. Plain LLaVA items are accepted unless ``strict``: rewards need the true boxes."""
    file, where = Path(data_args.data_path), f"--data_path {data_args.data_path}"
    strict = flags.umed_stage == REWARDING
    if strict:
        check_exists(file)

    def opened() -> RecordFile:
        failed = partial(not_records if strict else _not_items, file)
        return open_records(file, where, marks, strict=strict, failed=failed)

    checked: list[RecordFile] = []

    def check() -> None:
        records = opened()
        _check_files(records.where(records.texts("split") == split), data_args, flags, split)
        checked.append(records)

    first_process_does(check, f"check the records of {where}")
    return checked[0] if checked else opened()


def _not_items(path: Path, error: Exception) -> UmedError:
    try:
        content = read_json(path)
    except UmedError as found:
        is_lines = path.name.endswith("l") or "Extra data: line 2" in str(found)
        lines = " It seems to be JSON lines: make one list of them." if is_lines else ""
        reason = str(found).removeprefix(f"{path}: ")
        return UmedError(
            f"--data_path {path}: is not JSON that can be read ({reason}). Expected: a list of LLaVA items.{lines}"
        )
    if isinstance(content, list):
        return UmedError(f"--data_path {path}: cannot be read item by item ({error}). Save it as UTF-8.")
    return UmedError(f"--data_path {path}: is not a list of LLaVA items, each with 'conversations'.")


def _check_aspect_ratio(records: JoinedRecords, image_aspect_ratio: str) -> None:
    """Boxes in the text are 0-1 of the square that the model sees, so records and training must agree on that square."""
    theirs = records.texts("aspect")
    other = np.flatnonzero((theirs != image_aspect_ratio) & (theirs != ""))
    if len(other):
        first = theirs[other[0]]
        raise UmedError(
            f"{len(other)} of {len(records)} records (the first: {records[other[0]].get('id')}) were written for "
            f"--image_aspect_ratio {first}, but training runs with {image_aspect_ratio}: every box would be in the wrong "
            f"place. Train with --image_aspect_ratio {first}, or build the records again with "
            f"`umed recipe build ... --image-aspect-ratio {image_aspect_ratio}`."
        )


def _recipe_records(data_args: Any, training_args: Any, split: str, marks: Sequence[str]) -> RecordFile:
    """The recipe's records, built into ``output_dir/umed_data`` by one process unless the same build exists already."""
    folder = Path(training_args.output_dir).resolve() / "umed_data" / ("" if split == "train" else split)
    file, where = folder / "records.json", training_args.umed.umed_recipe

    def build_and_index() -> None:
        _build_or_reuse(folder, split, data_args.image_aspect_ratio, training_args)
        make_index(file, where, marks, strict=True, failed=partial(not_records, file))

    first_process_does(build_and_index, f"build the records of {where}")
    check_exists(file)
    return open_records(file, where, marks, strict=True, failed=partial(not_records, file))


def _build_or_reuse(folder: Path, split: str, image_aspect_ratio: str, training_args: Any) -> None:
    """Write ``records.json`` and a stamp of all that it is built from, unless both exist and the stamp has not changed."""
    flags = training_args.umed
    recipe = load_recipe(flags.umed_recipe)
    file, stamp_file = folder / "records.json", folder / "build.json"
    options = {
        "image_aspect_ratio": image_aspect_ratio,
        "box_decimals": flags.umed_box_decimals,
        "seed": training_args.seed,
        "on_bad_image": flags.umed_on_bad_image,
        "render": flags.umed_image_cache is None,
    }
    stamp = {
        "recipe": recipe.path,
        "recipe_sha256": recipe.sha256,
        "writers": record_writer.WRITERS,
        "readers": READERS,
        **data_stamp(read_annotations(recipe, flags.umed_data_root)),
        **options,
    }
    if file.is_file() and _holds(stamp_file, stamp):
        note(f"recipe and data have not changed: the records in {file} are used again.")
        return
    # An interrupted build must not leave the old stamp beside records or images that it has replaced.
    stamp_file.unlink(missing_ok=True)
    records = build_records(
        recipe, out_dir=folder, split=split, data_root=flags.umed_data_root, progress=True, **options
    )
    for record in records:
        record["image"] = str(folder / record["image"])
    save_records(records, file)
    files.write_json(stamp_file, stamp)
    note(f"built {len(records)} records of {flags.umed_recipe} into {file}")


def _holds(file: Path, content: Any) -> bool:
    """Whether a JSON file holds this; a damaged one does not."""
    try:
        return bool(files.parse_json(file.read_text(encoding="utf-8")) == content)
    except (OSError, ValueError):
        return False
