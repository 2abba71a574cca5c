"""Readers of annotation formats, and what is done with their result whatever the format: classes, patients, splits.

A new format is a function registered here (or ``my_module:my_reader`` in a recipe) that returns `Annotated` items.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Union

from umed_plugin.annotations import coco, mask, table, voc, yolo  # noqa: F401  (they register themselves)
from umed_plugin.annotations.base import ANNOTATION_READERS, Annotated
from umed_plugin.errors import did_you_mean
from umed_plugin.recipe import Recipe
from umed_plugin.recipe_faults import Faults
from umed_plugin.recipe_options import SPLITS

__all__ = ["ANNOTATION_READERS", "Annotated", "AnnotationSet", "read_annotations"]


@dataclass
class AnnotationSet:
    """All annotations of a recipe.

    Attributes:
        root: data root.
        items: images that are on disk, with plain class names, patient and split.
        missing: items whose image is not on disk.
        left_out: reason -> number of images left out on purpose.
        faults: what is wrong; nothing may be built while there are any.
    """

    root: Path
    items: list[Annotated] = field(default_factory=list)
    missing: list[Annotated] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    faults: Faults = field(default_factory=Faults)


def read_annotations(recipe: Recipe, data_root: Optional[Union[str, Path]] = None) -> AnnotationSet:
    """Read what a recipe describes; mistakes in the data are noted in ``faults``, not raised.

    Raises:
        UmedError: there is no data folder at all.
    """
    found = AnnotationSet(recipe.root(data_root))
    reader = ANNOTATION_READERS.get(recipe.annotations.reader)
    items = reader(recipe.annotations, found.root, found.faults)
    items = _with_plain_names(items, recipe, found)
    _set_patients(items, recipe)
    if recipe.split.by == "patient":
        _deal_out(items, recipe)
    for item in items:
        item.modality = item.modality or recipe.modality
        (found.items if item.image.is_file() else found.missing).append(item)
    return found


def _with_plain_names(items: list[Annotated], recipe: Recipe, found: AnnotationSet) -> list[Annotated]:
    unknown: Counter[str] = Counter()
    first: dict[str, str] = {}
    kept: list[Annotated] = []
    for item in items:
        for name in item.classes:
            if name not in recipe.classes and name not in recipe.ignore_classes:
                unknown[name] += 1
                first.setdefault(name, item.where)
        if any(name in recipe.ignore_classes for name in item.classes):
            found.left_out["holds an ignored class"] += 1
        elif not item.classes and recipe.negatives == "drop":
            found.left_out["negative"] += 1
        elif all(name in recipe.classes for name in item.classes):
            item.classes = [recipe.classes[name].name for name in item.classes]
            kept.append(item)
    for name, count in unknown.items():
        found.faults.add(
            first[name],
            f"class {name!r} ({count} boxes) is not in the recipe.{did_you_mean(name, recipe.classes)} "
            f"Allowed: {', '.join(recipe.classes)}. Add it to classes or ignore_classes of {recipe.path}",
        )
    return kept


def _set_patients(items: list[Annotated], recipe: Recipe) -> None:
    pattern = recipe.split.patient_pattern
    for item in items:
        stem = item.image.name.split(".nii")[0] if ".nii" in item.image.name else item.image.stem
        named = re.search(pattern, item.image.name) if pattern else None
        item.patient = item.patient or (named.group(1) if named else stem)


def _deal_out(items: list[Annotated], recipe: Recipe) -> None:
    """Give every patient a split: in the order of a hash, the first share is train, the next val, the rest test."""

    def rank(patient: str) -> str:
        return hashlib.sha256(f"{recipe.split.seed}:{patient}".encode()).hexdigest()

    patients = sorted({item.patient for item in items}, key=rank)
    split_of: dict[str, str] = {}
    end, share = 0, 0.0
    for split in SPLITS:
        share += recipe.split.fractions.get(split, 0.0)
        start, end = end, round(share * len(patients))
        split_of.update(dict.fromkeys(patients[start:end], split))
    for item in items:
        item.split = split_of[item.patient]
