"""One image, one record: entries of the same image are merged, and a box that is given twice is one box.

Two records of an image would each teach that the lesions of the other are not there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Optional

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.annotations.finding import real_path
from umed_plugin.data.images import slice_count
from umed_plugin.data.recipes.recipe import Recipe
from umed_plugin.errors import UmedError
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box, iou_matrix

# Boxes of one class that overlap more are probably one lesion, marked twice or by several readers.
MOST_OVERLAP = 0.5
_MOST_COMPARED = 1000  # boxes of one image


def name_whole_files(items: Sequence[Annotated], recipe: Optional[Recipe] = None) -> None:
    """Set the slice to None where a file with one slice is named both as a whole and by slice 0: they are one image.

    Only files that are named both ways are opened.

    Args:
        recipe: of the items; None: each item has its own.
    """
    folders: dict[str, str] = {}
    files: dict[str, list[Annotated]] = {}
    for item in items:
        if item.slice in (None, 0):
            files.setdefault(real_path(str(item.image), folders), []).append(item)
    for named in files.values():
        if len({item.slice for item in named}) == 2 and _has_one_slice(named[0], recipe or named[0].recipe):
            for item in named:
                item.slice = None


def _has_one_slice(item: Annotated, recipe: Recipe) -> bool:
    # What cannot be read is told when the image is.
    with contextlib.suppress(UmedError):
        return item.image.exists() and slice_count(item.image, recipe.image.slice_axis) == 1
    return False


def without_repeated_images(items: Sequence[Annotated], recipe: Recipe, faults: Faults) -> list[Annotated]:
    """The items with those of one image (and slice, and phrase) merged, whatever path they name it by.

    It is a fault if they contradict each other: one with and one without a lesion, or in different splits.
    """
    first: dict[tuple[object, ...], Annotated] = {}
    merged: list[str] = []
    folders: dict[str, str] = {}
    for item in items:
        earlier = first.setdefault((real_path(str(item.image), folders), item.slice, item.phrase), item)
        if earlier is item:
            continue
        contradiction = _contradiction(earlier, item, recipe)
        if contradiction:
            faults.add(item.where, f"is about {item.image.name} again, like {earlier.where}, {contradiction}")
            continue
        merged.append(f"{earlier.where} and {item.where}")
        earlier.boxes = [*earlier.boxes, *item.boxes]
        earlier.classes = [*earlier.classes, *item.classes]
        earlier.left_out = earlier.left_out or item.left_out
        earlier.dropped_boxes += item.dropped_boxes
        for name in ("size", "window", "patient", "modality", "copy_of"):
            setattr(earlier, name, getattr(earlier, name) or getattr(item, name))
    if merged:
        faults.remark(
            "images", f"{len(merged)} entries are about an image that has one, and are merged with it: {merged[0]}"
        )
    return list(first.values())


def _contradiction(first: Annotated, item: Annotated, recipe: Recipe) -> str:
    if recipe.split.by != "patient" and first.split != item.split:
        return f"but in split {item.split or '(none)'}, and there in {first.split or '(none)'}"
    if bool(first.classes or first.dropped_boxes) != bool(item.classes or item.dropped_boxes):
        what = "label" if first.labels or item.labels else "box"
        return (
            f"but only one of the two has a {what}. An entry without one says that the image has no lesion. Remove it"
        )
    if first.patient and item.patient and first.patient != item.patient:
        return f"but of patient {item.patient!r}, and there of {first.patient!r}"
    if first.report != item.report:
        return "but with another report"
    for name in ("size", "window"):
        here, there = getattr(item, name), getattr(first, name)
        if here is not None and there is not None and tuple(here) != tuple(there):
            return f"but with {name} {here}, and there with {there}"
    if has_boxes_of_two_sizes((first, item), recipe):
        return (
            f"but only one of the two states a size ({first.size or item.size}), and image.other_size scales its boxes"
        )
    return "" if first.normalised == item.normalised else "but in another unit"


def has_boxes_of_two_sizes(items: Sequence[Annotated], recipe: Recipe) -> bool:
    """Whether boxes of one image are in pixels of a stated size, which is scaled, and others in pixels of the file."""
    if recipe.image.other_size == "stop" or all(item.size is None for item in items):
        return False
    return any(item.size is None and item.boxes and not item.normalised for item in items)


def drop_repeated_boxes(items: Sequence[Annotated], faults: Faults) -> None:
    """Keep one of several equal boxes of a class or phrase, and remark on those of a class that overlap by more than half."""
    overlapping, first = 0, ""
    for item in items:
        seen: set[tuple[object, ...]] = set()
        kept: list[int] = []
        for index, (box, name) in enumerate(zip(item.boxes, item.classes)):
            key = ("" if item.phrase else name, *(round(value, 6 if item.normalised else 3) for value in box))
            if key in seen:
                of = "phrase" if item.phrase else "class"
                faults.left_out["boxes", f"the same box of the same {of} twice"] += 1
            else:
                kept.append(index)
            seen.add(key)
        if len(kept) < len(item.boxes):
            item.boxes = [item.boxes[index] for index in kept]
            item.classes = [item.classes[index] for index in kept]
        found = overlapping_count(item.boxes, item.classes)
        overlapping += found
        first = first or (item.where if found else "")
    if overlapping:
        faults.remark(
            first,
            f"{overlapping} boxes overlap another of their class by IoU > {MOST_OVERLAP}. Each is read as a lesion. Did "
            "several readers mark the same one?",
        )


def overlapping_count(boxes: Sequence[Box], classes: Sequence[str]) -> int:
    """Number of boxes that overlap an earlier one of their class by more than half."""
    if len(boxes) < 2:
        return 0
    # A file of strangers may hold 100,000 boxes of one image, which would be compared in 80 GB.
    boxes = boxes[:_MOST_COMPARED]
    overlap = iou_matrix(boxes, boxes)
    return sum(
        any(overlap[i, j] > MOST_OVERLAP and classes[i] == classes[j] for j in range(i)) for i in range(1, len(boxes))
    )
