"""Whether boxes can be in the unit that the recipe states. What needs no image is said before one is downloaded."""

from __future__ import annotations

from collections.abc import Sequence

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.recipes.readers import ReaderOptions
from umed_plugin.data.recipes.recipe import Recipe
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box

# From so many boxes on, it is no chance that all lie in the first 100 pixels of images that are more than four times as large.
_ENOUGH_FOR_PERCENT = 20
_SIDE_FOR_PERCENT = 400
# Nor that all end near 1000 in x and in y, in images of several sizes, of which more than a third of each side lies beyond.
_ENOUGH_FOR_THOUSANDTHS = 20
_SIDE_FOR_THOUSANDTHS = 1600
_NEAR_THOUSAND = 950
_Sized = Sequence[tuple[Box, Annotated, tuple[int, int]]]


def check_units(items: Sequence[Annotated], faults: Faults) -> None:
    """Add a fault for boxes that must be in another unit than the recipe states, split by split.

    Files differ more often than rows: the JSON of one split may be in fractions, and the other in pixels.
    """
    for split in dict.fromkeys(item.split for item in items):
        boxes = [(box, item) for item in items if item.split == split for box in item.boxes]
        _check_fractions([pair for pair in boxes if not pair[1].normalised], faults)
        check_by_size([(box, item, item.size) for box, item in boxes if item.size and not item.normalised], faults)
        _check_pixels([pair for pair in boxes if pair[1].normalised], faults)
        _check_read_as_percent(
            [pair for pair in boxes if pair[1].normalised and _in_percent(pair[1].recipe.annotations)], faults
        )


def within_first_pixel(box: Box) -> bool:
    """Whether a box in pixels is probably one in fractions of its image."""
    return all(-0.01 <= value <= 1.01 for value in box) and any(box)


def _in_percent(options: ReaderOptions) -> bool:
    return options.in_percent_ or getattr(options, "normalised", False) == "percent"


def _advice(options: ReaderOptions, unit: str) -> str:
    """What to write if boxes are in another unit, or that the format has but one."""
    if "normalised" in type(options).model_fields:
        return f" Then: normalised: {unit} (annotations.normalised)"
    return f" The reader {options.reader} takes {'percent' if options.in_percent_ else 'pixels'} alone"


def _check_fractions(boxes: list[tuple[Box, Annotated]], faults: Faults) -> None:
    small = [(box, item) for box, item in boxes if within_first_pixel(box)]
    _tell_small(small, boxes, "pixel", 1, faults)


def _check_read_as_percent(boxes: list[tuple[Box, Annotated]], faults: Faults) -> None:
    """Fractions that are read as percent lie within the first hundredth of each side."""
    small = [(box, item) for box, item in boxes if within_first_pixel(_times(box, 100))]
    _tell_small(small, boxes, "percent of its image", 100, faults)


def _times(box: Box, factor: float) -> Box:
    return box[0] * factor, box[1] * factor, box[2] * factor, box[3] * factor


def _tell_small(
    small: list[tuple[Box, Annotated]], boxes: list[tuple[Box, Annotated]], what: str, factor: float, faults: Faults
) -> None:
    """A fault if most boxes may be fractions, else a remark; the first is shown times ``factor``, as the file states it."""
    if not small:
        return
    box, item = small[0]
    shown = [round(value, 4) for value in _times(box, factor)]
    message = f"box {shown} lies within the first {what}, like {len(small)} of {len(boxes)} boxes. Are these fractions?"
    if 2 * len(small) > len(boxes):
        faults.add(item.where, message + _advice(item.recipe.annotations, "true"))
    else:
        faults.remark(item.where, message)


def check_by_size(boxes: _Sized, faults: Faults) -> None:
    """Remark on boxes in pixels that are probably in percent or in thousandths, of one split.

    Args:
        boxes: each with its item, and with width and height of its image in pixels.
    """
    # What a reader computes from masks is in pixels.
    written = [one for one in boxes if not _is_computed(one[1].recipe.annotations)]
    _check_percent(written, faults)
    _check_thousandths(written, faults)


def _is_computed(options: ReaderOptions) -> bool:
    return options.from_masks_ or options.stored_frame_


def _check_percent(boxes: _Sized, faults: Faults) -> None:
    large = [(box, item) for box, item, size in boxes if min(size) >= _SIDE_FOR_PERCENT]
    if len(large) < _ENOUGH_FOR_PERCENT or any(not -1 <= value <= 101 for box, _ in large for value in box):
        return
    if any(value > 1.01 for box, _ in large for value in box):
        faults.remark(
            large[0][1].where,
            f"all {len(large)} boxes lie in 0-100, and their images have {_SIDE_FOR_PERCENT} pixels or more on a side. Are these "
            f"percent?{_advice(large[0][1].recipe.annotations, 'percent')}",
        )


def _check_thousandths(boxes: _Sized, faults: Faults) -> None:
    """A grid of 1000 by 1000 on images of every size, as vision models write boxes. In smaller images it would leave them."""
    large = [(box, item, size) for box, item, size in boxes if min(size) >= _SIDE_FOR_THOUSANDTHS]
    if len(large) < _ENOUGH_FOR_THOUSANDTHS or len({size for _, _, size in large}) == 1:
        return
    furthest = [max(box[corner] for box, _, _ in large) for corner in (2, 3)]
    # VOC's conventions shift by one.
    if min(furthest) <= _NEAR_THOUSAND or any(not -1 <= value <= 1001 for box, _, _ in boxes for value in box):
        return
    item = large[0][1]
    takes_fractions = "normalised" in type(item.recipe.annotations).model_fields
    divide = "divide them by 1000, and write normalised: true (annotations.normalised)"
    multiply = "multiply x by width / 1000, and y by height / 1000"
    faults.remark(
        item.where,
        f"all {len(boxes)} boxes lie in 0-1000, up to {furthest[0]:g} in x and {furthest[1]:g} in y, and {len(large)} of them "
        f"are of images with {_SIDE_FOR_THOUSANDTHS} pixels or more on a side. Are these thousandths, as Qwen-VL and Gemini "
        "write them? "
        f"Then {divide if takes_fractions else multiply}. Gemini writes y before x (image.box_axes: yx)",
    )


def _check_pixels(boxes: list[tuple[Box, Annotated]], faults: Faults) -> None:
    large = [(box, item) for box, item in boxes if any(value > 2 or value < -1 for value in box)]
    if large:
        box, item = large[0]
        options = item.recipe.annotations
        key = " (annotations.normalised)" if "normalised" in type(options).model_fields else ""
        read_as = (
            "percent (0-100). Are these pixels?"
            if _in_percent(options)
            else "fractions (0-1). Are these pixels or percent?"
        )
        faults.add(
            item.where,
            f"box {[round(value, 4) for value in box]} is far outside of its image, like {len(large)} of {len(boxes)} boxes, "
            f"since coordinates are read as {read_as}{key}",
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
