"""Images without a lesion: a CSV that lists them, and which and how many of them a recipe uses."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from umed_plugin.data.annotations.base import Annotated, AnnotationSet
from umed_plugin.data.annotations.cells import RowCheck, cell_of, columns_exist, last_column, titled
from umed_plugin.data.annotations.effects import Applied
from umed_plugin.data.annotations.finding import ImageFolders, Renamed, annotation_file, real_path
from umed_plugin.data.annotations.inside import with_possible_paths
from umed_plugin.data.annotations.merging import without_repeated_images
from umed_plugin.data.annotations.one_image import in_one_image, is_negative, picked_images
from umed_plugin.data.annotations.table import checked_split
from umed_plugin.data.recipes.options import Column, NegativeList
from umed_plugin.data.recipes.readers import ReaderOptions
from umed_plugin.data.recipes.recipe import Recipe
from umed_plugin.data.texts import read_numbered_rows
from umed_plugin.faults import Faults


def may_be_negative(item: Annotated, recipe: Recipe, root: Path) -> bool:
    """False for an image that may show a lesion nobody marked, by ``negatives.only``."""
    pattern = recipe.negatives.only
    return pattern is None or re.search(pattern, os.path.relpath(item.image, root)) is not None


def listed_negatives(annotated: Sequence[Annotated], recipe: Recipe, annotations: AnnotationSet) -> list[Annotated]:
    """Listed images that are on disk. For an image that the annotations cover, the annotations count."""
    listed = recipe.negatives.listed
    if listed is None:
        return []
    folders: dict[str, str] = {}
    covered = {real_path(str(item.image), folders) for item in annotated}
    kept: list[Annotated] = []
    for item in _read_list(listed, recipe, annotations):
        if real_path(str(item.image), folders) in covered:
            annotations.left_out["listed as negative, but annotated"] += 1
        elif not item.image.exists():
            annotations.left_out["listed as negative, not on disk"] += 1
        elif may_be_negative(item, recipe, annotations.root):
            kept.append(item)
        else:
            annotations.left_out["listed as negative, but not one of negatives.only"] += 1
    return kept


def choose_negatives(recipe: Recipe, annotations: AnnotationSet) -> None:
    """Keep as many negatives in each split as ``per_positive`` allows. A volume that is shown as one image counts once."""
    if recipe.negatives.per_positive is None:
        return
    images = in_one_image(annotations.items)
    positives = [image for image in images if not is_negative(image)]
    counts = Counter(image[0].split for image in positives)
    kept = {id(item) for image in positives for item in image}
    for split in sorted({item.split for item in annotations.items}):
        negatives = [image for image in images if is_negative(image) and image[0].split == split]
        wanted = round(recipe.negatives.per_positive * counts[split])
        kept |= {id(item) for item in picked_images(negatives, wanted, recipe.split.seed)}
        annotations.left_out["negative above negatives.per_positive"] += max(0, len(negatives) - wanted)
    annotations.items = [item for item in annotations.items if id(item) in kept]


def _read_list(listed: NegativeList, recipe: Recipe, annotations: AnnotationSet) -> list[Annotated]:
    """The images that a CSV lists as having no lesion, each once. They lie in the folders of the annotated images.

    ``rename`` and ``split_values`` of the annotations hold for them too. An image that has rows of both kinds, as from several
    readers, is no negative.
    """
    faults, root, options = annotations.faults, annotations.root, recipe.annotations
    path = annotation_file(root, listed.files, faults)
    rows = faults.read(read_numbered_rows, path, listed.delimiter) if path is not None else None
    if path is None or not rows:
        return []
    header, data = titled(rows, listed.header)
    if not columns_exist(_columns(listed), header, path, faults):
        return []
    folders = ImageFolders(options, root, "", path.parent, faults)
    names = Renamed(getattr(options, "rename", None))
    applied = Applied({f"negatives.listed.only_rows.{title}": values for title, values in listed.only_rows.items()})
    items: dict[str, Annotated] = {}
    others: set[str] = set()
    last = last_column(_columns(listed), header)
    check = RowCheck(path, header, last, faults, listed.delimiter, "negatives.listed", listed.header)
    for number, row in check.filled_rows(data):
        where, file = f"{path}:{number}", cell_of(row, header, listed.file)
        for title in listed.only_rows:
            applied.meet(f"negatives.listed.only_rows.{title}", cell_of(row, header, title))
        if not file:
            continue
        if not all(cell_of(row, header, title) in values for title, values in listed.only_rows.items()):
            others.add(file)
            continue
        if file in items:
            continue
        item = Annotated(folders.find(names.of(file)), [], [], where, patient=cell_of(row, header, listed.patient))
        if listed.split is not None:
            values = getattr(options, "split_values", {})
            item.split = checked_split(cell_of(row, header, listed.split), values, where, faults)
        items[file] = item
    names.tell(path, faults)
    applied.tell(faults)
    if not items:
        faults.no_effect(path, "lists no image without a lesion, so negatives.listed has no effect")
    once = without_repeated_images(with_possible_paths(list(items.values()), faults), recipe, faults)
    positive = _real_paths(others, options, root, path)
    real: dict[str, str] = {}
    kept = [item for item in once if real_path(str(item.image), real) not in positive]
    annotations.left_out["listed as negative, but not in all of its rows"] += len(once) - len(kept)
    return kept


def _real_paths(files: set[str], options: ReaderOptions, root: Path, path: Path) -> set[str]:
    """Where the files of rows that are no negatives lie. What is wrong with their names is nobody's concern."""
    folders, names = ImageFolders(options, root, "", path.parent), Renamed(getattr(options, "rename", None))
    images = [Annotated(folders.find(names.of(file)), [], [], str(path)) for file in files]
    real: dict[str, str] = {}
    return {real_path(str(item.image), real) for item in with_possible_paths(images, Faults())}


def _columns(listed: NegativeList) -> list[tuple[str, Column]]:
    """(recipe key, column) of every column that must exist."""
    named = [("file", listed.file), ("patient", listed.patient), ("split", listed.split)]
    named += [("only_rows", title) for title in listed.only_rows]
    return [(f"negatives.listed.{role}", column) for role, column in named if column is not None]
