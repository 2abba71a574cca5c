"""Readers of annotation formats, and the steps that follow for every format: classes, patients, splits, negatives.

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
    """Read what a recipe describes. Mistakes in the data are collected in ``faults``, not raised.

    Raises:
        UmedError: there is no data folder.
    """
    if isinstance(recipe, Mixture):
        return mixed(recipe, recipe.root(data_root), _read)
    return _read(recipe, recipe.root(data_root))


def _read(recipe: Recipe, root: Path) -> AnnotationSet:
    annotations = AnnotationSet(root)
    reader = READERS.get(recipe.annotations.reader)
    annotated = reader(recipe.annotations, annotations.root, annotations.faults)
    items = _with_plain_names(_without_left_out(annotated, annotations), recipe, annotations)
    items += _listed_negatives({item.image for item in annotated}, recipe, annotations)
    set_patients(items, recipe.split)
    if recipe.split.by == "patient":
        deal_out(items, recipe.split)
    items, copies = without_copies_held_out(items)
    annotations.left_out["augmented copy in val or test"] += copies
    for item in items:
        item.modality = item.modality or recipe.modality
        item.recipe, item.root = recipe, annotations.root
        (annotations.items if item.image.exists() else annotations.missing).append(item)
    _choose_negatives(recipe, annotations)
    annotations.left_out = +annotations.left_out
    return annotations


def _without_left_out(items: list[Annotated], annotations: AnnotationSet) -> list[Annotated]:
    for item in items:
        if item.left_out:
            annotations.left_out[item.left_out] += 1
    return [item for item in items if not item.left_out]


def _with_plain_names(items: list[Annotated], recipe: Recipe, annotations: AnnotationSet) -> list[Annotated]:
    unknown: Counter[str] = Counter()
    first: dict[str, str] = {}
    kept: list[Annotated] = []
    for item in items:
        for name in item.classes:
            if name not in recipe.classes and name not in recipe.ignore_classes:
                unknown[name] += 1
                first.setdefault(name, item.where)
        if any(name in recipe.ignore_classes for name in item.classes):
            annotations.left_out["holds an ignored class"] += 1
        elif not item.classes and recipe.negatives.use == "drop":
            annotations.left_out["negative"] += 1
        elif not item.classes and not _may_be_negative(item, recipe, annotations.root):
            annotations.left_out["without a lesion, but not one of negatives.only"] += 1
        elif all(name in recipe.classes for name in item.classes):
            item.classes = [recipe.classes[name].name for name in item.classes]
            kept.append(item)
    for name, count in unknown.items():
        annotations.faults.add(
            first[name],
            f"class {name!r} ({count} boxes) is not in the recipe.{did_you_mean(name, recipe.classes)} "
            f"Allowed: {', '.join(recipe.classes)}. Add it to classes or ignore_classes of {recipe.path}",
        )
    return kept


def _may_be_negative(item: Annotated, recipe: Recipe, root: Path) -> bool:
    pattern = recipe.negatives.only
    return pattern is None or re.search(pattern, os.path.relpath(item.image, root)) is not None


def _listed_negatives(annotated: set[Path], recipe: Recipe, annotations: AnnotationSet) -> list[Annotated]:
    """Listed images that are on disk. For an image that the annotations cover, the annotations count."""
    listed = recipe.negatives.listed
    if listed is None:
        return []
    kept: list[Annotated] = []
    for item in read_negative_list(listed, recipe.annotations, annotations.root, annotations.faults):
        if item.image in annotated:
            annotations.left_out["listed as negative, but annotated"] += 1
        elif not item.image.is_file():
            annotations.left_out["listed as negative, not on disk"] += 1
        elif _may_be_negative(item, recipe, annotations.root):
            kept.append(item)
        else:
            annotations.left_out["listed as negative, but not one of negatives.only"] += 1
    return kept


def _choose_negatives(recipe: Recipe, annotations: AnnotationSet) -> None:
    """Keep as many negatives in each split as ``per_positive`` allows."""
    if recipe.negatives.per_positive is None:
        return
    positives = Counter(item.split for item in annotations.items if item.boxes)
    chosen = [item for item in annotations.items if item.boxes]
    for split in sorted({item.split for item in annotations.items}):
        negatives = [item for item in annotations.items if not item.boxes and item.split == split]
        wanted = round(recipe.negatives.per_positive * positives[split])
        chosen += picked_by_hash(negatives, wanted, recipe.split.seed)
    annotations.left_out["negative above negatives.per_positive"] += len(annotations.items) - len(chosen)
    kept = {id(item) for item in chosen}
    annotations.items = [item for item in annotations.items if id(item) in kept]
