"""Whether boxes can be in the unit that the recipe states. All of this is known before an image is downloaded."""

from __future__ import annotations

from collections.abc import Sequence

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.recipes.recipe import Recipe
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box

_HINT = "(annotations.normalised)"
# From so many boxes on, it is no chance that all lie in the first 100 pixels of images that are more than four times as large.
_ENOUGH_FOR_PERCENT = 20
_SIDE_FOR_PERCENT = 400


def check_units(items: Sequence[Annotated], faults: Faults) -> None:
    """Add a fault for boxes that must be in another unit than the recipe states, split by split.

    Files differ more often than rows: the JSON of one split may be in fractions, and the other in pixels.
    """
    for split in dict.fromkeys(item.split for item in items):
        boxes = [(box, item) for item in items if item.split == split for box in item.boxes]
        _check_fractions([pair for pair in boxes if not pair[1].normalised], faults)
        _check_percent([pair for pair in boxes if not pair[1].normalised], faults)
        _check_pixels([pair for pair in boxes if pair[1].normalised], faults)


def _check_fractions(boxes: list[tuple[Box, Annotated]], faults: Faults) -> None:
    small = [(box, item) for box, item in boxes if all(-0.01 <= value <= 1.01 for value in box) and any(box)]
    if not small:
        return
    box, item = small[0]
    shown = [round(value, 4) for value in box]
    message = f"box {shown} lies within the first pixel, like {len(small)} of {len(boxes)} boxes. Are these fractions?"
    if 2 * len(small) > len(boxes):
        faults.add(item.where, f"{message} Then: normalised: true {_HINT}")
    else:
        faults.remark(item.where, message)


def _check_percent(boxes: list[tuple[Box, Annotated]], faults: Faults) -> None:
    large = [(box, item) for box, item in boxes if item.size is not None and min(item.size) >= _SIDE_FOR_PERCENT]
    if len(large) < _ENOUGH_FOR_PERCENT or any(not -1 <= value <= 101 for box, _ in large for value in box):
        return
    if any(value > 1.01 for box, _ in large for value in box):
        faults.remark(
            large[0][1].where,
            f"all {len(large)} boxes lie in 0-100, and their images have {_SIDE_FOR_PERCENT} pixels or more on a side. Are these "
            f"percent? Then: normalised: percent {_HINT}",
        )


def _check_pixels(boxes: list[tuple[Box, Annotated]], faults: Faults) -> None:
    large = [(box, item) for box, item in boxes if any(value > 2 or value < -1 for value in box)]
    if large:
        box, item = large[0]
        faults.add(
            item.where,
            f"box {[round(value, 4) for value in box]} is far outside of its image, like {len(large)} of {len(boxes)} boxes, "
            f"since coordinates are read as fractions (0-1). Are these pixels or percent? {_HINT}",
        )


def check_stated_sizes(missing: Sequence[Annotated], recipe: Recipe, faults: Faults) -> None:
    """Add a fault for each box that leaves the size that the annotations state. `build` compares with the images on disk."""
    for item in missing:
        if item.size is None or item.normalised:
            continue
        width, height = item.size if recipe.image.box_axes == "xy" else item.size[::-1]
        for box in item.boxes:
            outside = max(-box[0], -box[1], box[2] - width, box[3] - height)
            if outside > recipe.box_tolerance:
                faults.add(
                    item.where,
                    f"box {[round(value, 2) for value in box]} leaves the size {item.size[0]}x{item.size[1]} which the "
                    f"annotations state for {item.image.name}, by {outside:.1f} px. Allowed: {recipe.box_tolerance:g} "
                    "(box_tolerance)",
                )
