"""Readers of annotation formats, and what is done with their result whatever the format: classes, patients, splits.

A new format is one new module in this package, with a function under `register_reader` that returns `Annotated` items, and the
model of its options. Users name their own as ``my_module:my_reader`` in a recipe.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Optional, Union

from umed_plugin.data.annotations.base import Annotated, AnnotationSet
from umed_plugin.data.annotations.mixing import mixed
from umed_plugin.data.annotations.splits import deal_out, picked_by_hash, set_patients, without_copies_held_out
from umed_plugin.data.annotations.table import read_negative_list
from umed_plugin.data.recipes.readers import READERS, ReaderOptions, register_reader
from umed_plugin.data.recipes.recipe import AnyRecipe, Mixture, Recipe
from umed_plugin.errors import did_you_mean

__all__ = ["Annotated", "AnnotationSet", "ReaderOptions", "read_annotations", "register_reader"]


def read_annotations(recipe: AnyRecipe, data_root: Optional[Union[str, Path]] = None) -> AnnotationSet:
    """Read what a recipe describes; mistakes in the data are noted in ``faults``, not raised.

    Raises:
        UmedError: there is no data folder at all.
    """
    if isinstance(recipe, Mixture):
        return mixed(recipe, recipe.root(data_root), _read)
    return _read(recipe, recipe.root(data_root))


def _read(recipe: Recipe, root: Path) -> AnnotationSet:
    found = AnnotationSet(root)
    reader = READERS.get(recipe.annotations.reader)
    read = reader(recipe.annotations, found.root, found.faults)
    items = _with_plain_names(_without_left_out(read, found), recipe, found)
    items += _listed_negatives({item.image for item in read}, recipe, found)
    set_patients(items, recipe.split)
    if recipe.split.by == "patient":
        deal_out(items, recipe.split)
    items, copies = without_copies_held_out(items)
    found.left_out["augmented copy in val or test"] += copies
    for item in items:
        item.modality = item.modality or recipe.modality
        item.recipe, item.root = recipe, found.root
        (found.items if item.image.exists() else found.missing).append(item)
    _choose_negatives(recipe, found)
    found.left_out = +found.left_out
    return found


def _without_left_out(items: list[Annotated], found: AnnotationSet) -> list[Annotated]:
    for item in items:
        if item.left_out:
            found.left_out[item.left_out] += 1
    return [item for item in items if not item.left_out]


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
        elif not item.classes and recipe.negatives.use == "drop":
            found.left_out["negative"] += 1
        elif not item.classes and not _may_be_negative(item, recipe, found.root):
            found.left_out["without a lesion, but not one of negatives.only"] += 1
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


def _may_be_negative(item: Annotated, recipe: Recipe, root: Path) -> bool:
    pattern = recipe.negatives.only
    return pattern is None or re.search(pattern, os.path.relpath(item.image, root)) is not None


def _listed_negatives(annotated: set[Path], recipe: Recipe, found: AnnotationSet) -> list[Annotated]:
    """Images of the list that are on disk; one that the annotations know is what they say."""
    listed = recipe.negatives.listed
    if listed is None:
        return []
    kept: list[Annotated] = []
    for item in read_negative_list(listed, recipe.annotations, found.root, found.faults):
        if item.image in annotated:
            found.left_out["listed as negative, but annotated"] += 1
        elif not item.image.is_file():
            found.left_out["listed as negative, not on disk"] += 1
        elif _may_be_negative(item, recipe, found.root):
            kept.append(item)
        else:
            found.left_out["listed as negative, but not one of negatives.only"] += 1
    return kept


def _choose_negatives(recipe: Recipe, found: AnnotationSet) -> None:
    """Leave as many negatives in each split as ``per_positive`` allows."""
    if recipe.negatives.per_positive is None:
        return
    positives = Counter(item.split for item in found.items if item.boxes)
    chosen = [item for item in found.items if item.boxes]
    for split in sorted({item.split for item in found.items}):
        negatives = [item for item in found.items if not item.boxes and item.split == split]
        wanted = round(recipe.negatives.per_positive * positives[split])
        chosen += picked_by_hash(negatives, wanted, recipe.split.seed)
    found.left_out["negative above negatives.per_positive"] += len(found.items) - len(chosen)
    kept = {id(item) for item in chosen}
    found.items = [item for item in found.items if id(item) in kept]
