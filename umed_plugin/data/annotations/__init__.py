"""Readers of annotation formats, and the steps that follow for every format: classes, patients, splits, negatives.

A new format is one new module in this package, with a function under `register_reader` that returns `Annotated` items, and the
model of its options. Users name their own as ``my_module:my_reader`` in a recipe.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Optional, Union

from umed_plugin.data.annotations.base import Annotated, AnnotationSet
from umed_plugin.data.annotations.consensus import one_reading
from umed_plugin.data.annotations.effects import tell_unused_image_options, tell_unused_rules
from umed_plugin.data.annotations.finding import real_path
from umed_plugin.data.annotations.hold_out import hold_out
from umed_plugin.data.annotations.inside import check_inside, with_possible_paths
from umed_plugin.data.annotations.labels import check_labels
from umed_plugin.data.annotations.merging import drop_repeated_boxes, name_whole_files, without_repeated_images
from umed_plugin.data.annotations.mixing import mixed, trim_negatives
from umed_plugin.data.annotations.negatives import choose_negatives, listed_negatives, may_be_negative
from umed_plugin.data.annotations.one_image import in_one_image, is_negative, note_unread, tell_divided_volumes
from umed_plugin.data.annotations.patients import (
    set_patients,
    tell_empty_files,
    tell_empty_splits,
    tell_headers,
    tell_shared_patients,
)
from umed_plugin.data.annotations.phrases import leave_out_without_phrase
from umed_plugin.data.annotations.splits import deal_out, without_copies_held_out
from umed_plugin.data.annotations.units import check_stated_sizes, check_units
from umed_plugin.data.annotations.unlisted import tell_unlisted
from umed_plugin.data.recipes.readers import READERS, ReaderOptions, register_reader
from umed_plugin.data.recipes.recipe import AnyRecipe, Mixture, Recipe
from umed_plugin.errors import did_you_mean
from umed_plugin.faults import Faults

__all__ = ["Annotated", "AnnotationSet", "ReaderOptions", "read_annotations", "register_reader"]


def read_annotations(recipe: AnyRecipe, data_root: Optional[Union[str, Path]] = None) -> AnnotationSet:
    """Read what a recipe describes. Mistakes in the data are collected in ``faults``, not raised.

    Raises:
        UmedError: there is no data folder.
    """
    if isinstance(recipe, Mixture):
        annotations = mixed(recipe, recipe.root(data_root), _read_and_choose)
        hold_out(annotations, recipe.hold_out, {name: source.name for name, source in recipe.recipes.items()})
        if recipe.hold_out is not None:
            trim_negatives(annotations, recipe)
    else:
        annotations = _read(recipe, recipe.root(data_root))
        hold_out(annotations, recipe.hold_out, {})
        # Those that are held out are no positives of their split.
        choose_negatives(recipe, annotations)
    annotations.left_out = +annotations.left_out
    return annotations


def _read_and_choose(recipe: Recipe, root: Path) -> AnnotationSet:
    annotations = _read(recipe, root)
    choose_negatives(recipe, annotations)
    annotations.left_out = +annotations.left_out
    return annotations


def _read(recipe: Recipe, root: Path) -> AnnotationSet:
    annotations = AnnotationSet(root)
    faults = annotations.faults
    reader = READERS.get(recipe.annotations.reader)
    annotated = with_possible_paths(reader(recipe.annotations, root, faults), faults)
    named = list(annotated)
    leave_out_without_phrase(annotated, recipe, faults)
    name_whole_files(annotated, recipe)
    # Of all readers: the next step keeps the boxes of one, or those that several agree on.
    met = Counter(name for item in annotated for name in item.classes)
    _check_names(annotated, recipe, faults)
    annotated = one_reading(annotated, recipe, faults)
    annotated = without_repeated_images(annotated, recipe, faults)
    if any(item.report for item in annotated):
        met.update(recipe.classes)  # what reports name is searched for when their records are written
    items = _with_plain_names(_without_left_out(annotated, annotations), recipe, annotations)
    items += listed_negatives(annotated, recipe, annotations)
    if recipe.annotations.names_images_ and recipe.phrase is None:
        tell_unlisted([*named, *items], faults)
    note_unread(items, annotated, recipe)
    check_labels(items, recipe, faults)
    tell_unused_rules(recipe, met, sum(item.is_negative for item in items), faults)
    unused = tell_unused_image_options((item.image for item in items), recipe.image, faults)
    annotations.told_options = {(recipe.name, option) for option in unused}
    check_inside(items, recipe, root, faults)
    drop_repeated_boxes(items, faults)
    _deal_out(items, recipe, annotations)
    items, copies = without_copies_held_out(items)
    annotations.left_out["augmented copy in val or test"] += copies
    for item in items:
        item.modality = item.modality or recipe.modality
        (annotations.items if item.is_there else annotations.missing).append(item)
    check_units(items, faults)
    check_stated_sizes(annotations.missing, recipe, faults)
    tell_headers(annotations.items, recipe.split, faults)
    annotations.normals = [item for image in in_one_image(annotations.items) if is_negative(image) for item in image]
    annotations.left_out = +annotations.left_out
    return annotations


def _deal_out(items: list[Annotated], recipe: Recipe, annotations: AnnotationSet) -> None:
    """Set patient and split of every image, and say where that is not what the recipe asks for."""
    for item in items:
        item.recipe, item.root = recipe, annotations.root
    set_patients(items, recipe.split, annotations.root, annotations.faults)
    if recipe.split.by == "patient":
        deal_out(items, recipe.split)
    tell_divided_volumes(items, recipe, annotations.faults)
    if recipe.split.by == "patient":
        # A mixture chooses from its sources, and says itself which of its splits are empty.
        if not recipe.mixture:
            tell_empty_splits(items, recipe.split.fractions, annotations.faults)
        return
    if recipe.split.by == "file":
        tell_empty_files(items, recipe, annotations.faults)
    tell_shared_patients(items, annotations.faults)


def _without_left_out(items: list[Annotated], annotations: AnnotationSet) -> list[Annotated]:
    for item in items:
        if item.dropped_boxes and not item.boxes:
            item.left_out = item.left_out or "all of its boxes are left out"
        if item.left_out:
            annotations.left_out[item.left_out] += 1
    return [item for item in items if not item.left_out]


def _check_names(items: list[Annotated], recipe: Recipe, faults: Faults) -> None:
    """A fault for each class that the recipe does not name, also where only one of several readers has it."""
    unknown: Counter[str] = Counter()
    first: dict[str, str] = {}
    what: dict[str, str] = {}
    wanted = recipe.annotations.readers and recipe.annotations.readers.use
    for item in items:
        if item.left_out or (wanted and item.reader not in ("", wanted)):
            continue
        for name in item.classes:
            if name not in recipe.classes and name not in recipe.ignore_classes:
                unknown[name] += 1
                what[name] = "boxes" if item.boxes else "images"
                first.setdefault(name, item.where)
    for name, count in unknown.items():
        faults.add(
            first[name],
            f"class {name!r} ({count} {what[name]}) is not in the recipe.{did_you_mean(name, recipe.classes)} "
            f"Allowed: {', '.join(recipe.classes)}. Add it to classes or ignore_classes of {recipe.path}",
        )


def _with_plain_names(items: list[Annotated], recipe: Recipe, annotations: AnnotationSet) -> list[Annotated]:
    kept: list[Annotated] = []
    folders: dict[str, str] = {}
    ignored = {
        (real_path(str(item.image), folders), item.slice)
        for item in items
        if any(name in recipe.ignore_classes for name in item.classes)
    }
    annotations.left_out["holds an ignored class"] += len(ignored)
    for item in items:
        if ignored and (real_path(str(item.image), folders), item.slice) in ignored:
            continue  # an image has one item for each of its phrases
        if item.report:
            kept.append(item)
        elif not item.classes and recipe.negatives.use == "drop":
            annotations.left_out["negative"] += 1
        elif not item.classes and not may_be_negative(item, recipe, annotations.root):
            annotations.left_out["without a lesion, but not one of negatives.only"] += 1
        elif all(name in recipe.classes for name in item.classes):
            names = [recipe.classes[name].name for name in item.classes]
            # Two names of one class on an image without boxes are one label.
            item.classes = names if item.boxes else list(dict.fromkeys(names))
            kept.append(item)
    return kept
