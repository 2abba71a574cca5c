"""From annotated images to images with boxes that fit them: each is read, and its boxes are checked against its size.

Boxes go from the annotations' frame to pixels of the file, to the slice as it is shown, and to their tile of a montage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np

from umed_plugin.data.annotations import Annotated, AnnotationSet
from umed_plugin.data.annotations.finding import did_you_mean_file
from umed_plugin.data.annotations.units import check_by_size
from umed_plugin.data.images.frames import BoxFrame, frame_remarks, size_fault
from umed_plugin.data.images.options import UsedOptions
from umed_plugin.data.images.windows import plain_window
from umed_plugin.data.prepared import Prepared, rendered_name
from umed_plugin.data.reading import Request, Seen
from umed_plugin.data.reading.looks import NO_PIXELS, look_at
from umed_plugin.data.recipes.image_options import preset_misfit
from umed_plugin.data.volumes import MontageItem, choose_slices, shown_slices
from umed_plugin.errors import UmedError
from umed_plugin.grounding.boxes import Box, is_degenerate
from umed_plugin.grounding.geometry import ImageGeometry, Montage
from umed_plugin.terminal.progress import tracked

# A lesion is not trained on when LLaVA's centre crop leaves less than this fraction of its area: nobody could find it.
LEAST_VISIBLE = 0.1
# What was seen of each image, and its pixels (empty where they were not read).
Looks = Generator[tuple[Seen, np.ndarray], None, None]


def prepare(
    items: Sequence[Annotated],
    annotations: AnnotationSet,
    bad_images: list[UmedError],
    title: Optional[str] = None,
    look: Optional[Callable[[Sequence[Annotated]], Looks]] = None,
) -> Iterator[Prepared]:
    """Read every image and fit its boxes.

    Wrong boxes are added to ``annotations.faults``, images left out to ``annotations.left_out``, unreadable ones to
    ``bad_images``.

    Args:
        title: of the progress bar; None shows none.
        look: gives what is seen of each image; None: reads them here, with their pixels.
    """
    used, whole = UsedOptions(), len(items) == len(annotations.items)
    # Of images whose size no annotation states. Recipe and split -> boxes with their item and the size of its file.
    unsized: dict[tuple[str, str], list[tuple[Box, Annotated, tuple[int, int]]]] = defaultdict(list)
    items = choose_slices(items, bad_images, annotations.left_out)
    with contextlib.closing((look or _read_here)(items)) as looks:
        # The looks come first: at their end they tidy up.
        pairs = zip(looks, items)
        for (seen, pixels), item in pairs if title is None else tracked(pairs, f"{title}: images", "image", len(items)):
            if seen.fault is not None:
                bad_images.append(UmedError(seen.fault))
                continue
            prepared = _fit_to_image(item, seen, pixels, annotations)
            if prepared is not None:
                if item.size is None and not item.normalised:
                    boxes = [(box, item, prepared.file_size) for box in item.boxes]
                    unsized[item.recipe.name, item.split] += boxes
                used.add(item.recipe, item.image, is_grey_levels=prepared.is_grey_levels, exif=prepared.exif)
                yield prepared
    if whole and not bad_images:
        annotations.unused_options += used.unused(annotations.told_options)
    for found in unsized.values():
        check_by_size(found, annotations.faults)


def _read_here(items: Sequence[Annotated]) -> Looks:
    for item in items:
        try:
            yield look_at(request(item, None))
        except UmedError as error:
            yield Seen(fault=str(error)), NO_PIXELS


def requests_of(items: Sequence[Annotated], out_dir: Optional[Path]) -> list[Request]:
    """What to read of each item. Pictures that are not the same are rendered to files of their own, whoever writes first.

    Two sentences of one slice, shown in two windows, would else be written to one file by two processes at once.

    Args:
        items: all of a build, so that every process gives them the same names.
        out_dir: as for `request`.
    """
    requests = [request(item, out_dir) for item in items]
    shown: dict[str, set[str]] = {}
    for one in requests:
        shown.setdefault(one.rendered, set()).add(_digest(one))
    return [
        one if len(shown[one.rendered]) == 1 else replace(one, rendered=f"{one.rendered[:-4]}-{_digest(one)}.png")
        for one in requests
    ]


def _digest(one: Request) -> str:
    """What is shown of a file, in a few letters."""
    return hashlib.sha256(json.dumps(one.reading).encode()).hexdigest()[:12]


def request(item: Annotated, out_dir: Optional[Path]) -> Request:
    """What to read of an item.

    Args:
        out_dir: folder for rendered images; None renders none.
    """
    return Request(
        path=str(item.image),
        slice=item.slice,
        reading=_reading(item),
        no_window=item.recipe.image.window == "column" and item.window is None,
        out_dir=None if out_dir is None else str(out_dir),
        rendered=rendered_name(item),
    )


def missing_image(item: Annotated, look_for_near: bool = True) -> UmedError:
    """The error for an annotated image that is not on disk; with the name that was probably meant, which takes time to find."""
    picture = item.not_on_disk() or item.image
    meant = did_you_mean_file(picture, item.root) if look_for_near else ""
    return UmedError(f"{picture}: no such image, but {item.where} names it.{meant} Get it from {item.recipe.terms.url}")


def _fit_to_image(item: Annotated, seen: Seen, pixels: np.ndarray, annotations: AnnotationSet) -> Optional[Prepared]:
    """An image with its boxes; None after a fault, or if it is left out."""
    options, shown = item.recipe.image, seen.shown(pixels)
    if seen.window_missing:
        annotations.faults.add(item.where, "the window column is empty, and image.window is 'column'")
        return None
    misfit = None if seen.is_grey_levels else preset_misfit(options.window, item.modality)
    if misfit:
        annotations.faults.add(item.where, f"image.window {misfit}")
        return None
    frame = BoxFrame(options.box_frame, shown)
    claimed = tuple(item.size or frame.size)
    fault = size_fault(claimed, frame, item.image.name, options.other_size)
    if fault:
        annotations.faults.add(item.where, fault)
        return None
    annotations.read += 1
    for kind, detail in frame_remarks(frame, bool(item.boxes)):
        annotations.image_remarks[kind].append(f"{item.image.name}{f': {detail}' if detail else ''}")
    boxes = [_in_pixels(box, item.normalised, options.box_axes == "yx", frame.size, claimed) for box in item.boxes]
    fitted = [_fit(box, frame.size, item, annotations) for box in boxes]
    kept = [i for i, box in enumerate(fitted) if box is not None]
    if item.boxes and not kept:
        annotations.left_out["only degenerate boxes"] += 1
        return None  # an image with lesions must not become a negative
    # Boxes follow the image: first as the slice is turned for display, then to their tile of a montage.
    moved = frame.to_shown([box for box in fitted if box is not None])
    size = shown.orientation.size
    if isinstance(item, MontageItem):
        montage = Montage(*size, len(item.tiles))
        size, moved = montage.size, montage.apply_boxes(moved, [item.tile_of_box[i] for i in kept])
    order = sorted(range(len(kept)), key=lambda i: (moved[i][1], moved[i][0]))
    return Prepared(
        item,
        size,
        boxes=[moved[i] for i in order],
        classes=[item.classes[kept[i]] for i in order],
        shown=pixels,
        by_llava=seen.by_llava,
        reading={} if seen.by_llava else _reading(item),
        is_grey_levels=seen.is_grey_levels,
        exif=seen.exif,
        evaluated=seen.evaluated,
        rendered=seen.rendered,
        burned_in=seen.burned_in,
        labels=list(item.labels),
        file_size=frame.size,
    )


def _reading(item: Annotated) -> dict[str, Any]:
    """Arguments of `load_image` for an image that LLaVA cannot read itself."""
    options = item.recipe.image
    return {
        "window": item.window if options.window == "column" else plain_window(options.window),
        "offset": options.offset,
        "orientation": options.orientation,
        "slice": shown_slices(item),
        "slice_axis": options.slice_axis,
        "volume": options.volume,
        "pixels": options.pixels,
        **({"beside": [str(view) for view in item.views]} if item.views else {}),
    }


def _in_pixels(box: Box, normalised: bool, swapped: bool, frame: tuple[int, int], claimed: tuple[int, ...]) -> Box:
    """A box of the annotations in pixels of the file.

    Args:
        swapped: the box is yxyx.
        frame: width and height of the file, in pixels.
        claimed: width and height on which the box was drawn, in pixels.
    """
    x1, y1, x2, y2 = (box[1], box[0], box[3], box[2]) if swapped else box
    width, height = frame if normalised else (frame[0] / claimed[0], frame[1] / claimed[1])
    return (x1 * width, y1 * height, x2 * width, y2 * height)


def _fit(box: Box, frame: tuple[int, int], item: Annotated, annotations: AnnotationSet) -> Optional[Box]:
    """The box cut to its image if it leaves it by no more than the tolerance; None after a fault or when dropped."""
    recipe, faults = item.recipe, annotations.faults
    width, height = frame
    outside = max(-box[0], -box[1], box[2] - width, box[3] - height)
    rounded = [round(value, 2) for value in box]
    if not all(map(math.isfinite, box)):
        faults.add(item.where, f"box {rounded} of {item.image.name} is not of numbers. A box has four finite ones")
        return None
    if not is_degenerate(box) and outside > recipe.box_tolerance:
        faults.add(
            item.where,
            f"box {rounded} leaves {item.image.name} ({width}x{height}) by {outside:.1f} px. "
            f"Allowed: {recipe.box_tolerance:g} (box_tolerance). Is annotations.convention right?",
        )
        return None
    x1, y1, x2, y2 = box
    fitted = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if is_degenerate(fitted) or min(fitted[2] - fitted[0], fitted[3] - fitted[1]) < recipe.least_box_side:
        if recipe.degenerate_boxes == "stop":
            thin = f"is thinner than least_box_side {recipe.least_box_side:g}" if not is_degenerate(fitted) else ""
            faults.add(
                item.where,
                f"box {rounded} of {item.image.name} {thin or 'has no area'}. Is annotations.convention right? "
                "To leave slivers out: degenerate_boxes: drop",
            )
        else:
            annotations.dropped_boxes += 1
        return None
    return fitted


def leave_what_is_seen(prepared: Prepared, geometry: ImageGeometry, tally: dict[str, int]) -> bool:
    """Drop lesions that the centre crop removes and trim the others to what the model sees; False if none is left."""
    if not prepared.boxes:
        return True
    shares = [geometry.visible_fraction(box) for box in prepared.boxes]
    seen = [i for i, share in enumerate(shares) if share >= LEAST_VISIBLE]
    tally["lost"] += len(shares) - len(seen)
    tally["cut"] += sum(LEAST_VISIBLE <= share < 1 for share in shares)
    tally["emptied"] += not seen
    prepared.classes = [prepared.classes[i] for i in seen]
    # A box that is entirely visible keeps its exact numbers.
    trimmed = geometry.from_square(geometry.to_square(prepared.boxes))
    prepared.boxes = [prepared.boxes[i] if shares[i] == 1 else trimmed[i] for i in seen]
    return bool(seen)
