"""Select the images of volumes and series: each annotated slice, the slice with the largest lesion, or a montage of slices.

A recipe selects with ``image: {slices: montage, tiles: 9}``. Boxes stay with their slices; `geometry.Montage` moves them to their
tiles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Optional

from umed_plugin.data.annotations import Annotated
from umed_plugin.data.annotations.one_image import in_one_image
from umed_plugin.data.images import slice_count
from umed_plugin.errors import UmedError


@dataclass
class MontageItem(Annotated):
    """Several slices of a volume as one image.

    Attributes:
        tiles: index of the slice in each tile, from the first tile on.
        tile_of_box: index from 0 of the tile of each box. Boxes are in pixels of their own slice.
    """

    tiles: tuple[int, ...] = ()
    tile_of_box: tuple[int, ...] = ()


def choose_slices(items: Sequence[Annotated], bad_images: list[UmedError], left_out: Counter[str]) -> list[Annotated]:
    """The images that recipes make from annotated slices, in the order of the first slice of each volume.

    Args:
        items: annotated slices with their recipes. Those of ``slices: annotated`` are returned unchanged.
        bad_images: errors of volumes that cannot be read are appended to it.
        left_out: images that would show a slice whose lesion no record says are counted in it.
    """
    images: list[Annotated] = []
    for slices in in_one_image(items):
        if slices[0].recipe.image.slices == "annotated":
            images.append(slices[0])
            continue
        try:
            image = _one_image(slices)
        except UmedError as error:
            bad_images.append(error)
            continue
        if _shows_unread(image):
            left_out["shows a slice of its volume that is left out"] += 1
        else:
            images.append(image)
    return images


def _shows_unread(image: Annotated) -> bool:
    shown: set[Optional[int]] = set(image.tiles) if isinstance(image, MontageItem) else {image.slice}
    return None in image.unread or bool(image.unread & shown)


def shown_slices(item: Annotated) -> int | list[int] | None:
    """The ``slice`` argument of `images.load_image`: one index, several for a montage, or None."""
    return list(item.tiles) if isinstance(item, MontageItem) else item.slice


def _one_image(slices: list[Annotated]) -> Annotated:
    options = slices[0].recipe.image
    count = slice_count(slices[0].image, options.slice_axis)
    lesions = [item for item in slices if item.boxes]
    for item in lesions:
        _check_slice(item, count)
    if options.slices == "largest_lesion":
        if lesions:
            return max(lesions, key=_largest_area)
        # Without a lesion, the middle slice shows most of the body.
        named = [item for item in slices if item.slice is not None]
        return named[0] if named else replace(slices[0], slice=count // 2 if count > 1 else None)
    return _montage(slices, lesions, count, options.tiles)


def _check_slice(lesion: Annotated, count: int) -> None:
    """Refuse a lesion on no slice of its volume, or on a slice that nobody knows."""
    if lesion.slice is None and count > 1:
        raise UmedError(
            f"{lesion.where}: {lesion.image} has {count} slices and none is chosen. Choose one: columns.slice"
        )
    if not 0 <= (lesion.slice or 0) < count:
        raise UmedError(
            f"{lesion.where}: slice {lesion.slice} of {lesion.image} does not exist. Allowed: 0 to {count - 1}."
        )


def _montage(slices: list[Annotated], lesions: list[Annotated], count: int, most: int) -> MontageItem:
    """A montage of slices. Only a file of one slice may leave out its number, which is 0."""
    by_size = sorted(lesions, key=_largest_area, reverse=True)
    tiles = montage_slices(count, most, [item.slice or 0 for item in by_size])
    shown = [item for item in slices if item.slice is None or item.slice in tiles]
    boxes = [
        (box, name, tiles.index(item.slice or 0))
        for item in shown
        if item.boxes
        for box, name in zip(item.boxes, item.classes)
    ]
    first = slices[0]
    same = {name: value for name, value in vars(first).items() if name not in ("slice", "boxes", "classes")}
    if first.recipe.image.window == "column":
        same["window"] = _window(shown) or _window(slices)
    return MontageItem(
        **same,
        boxes=[box for box, _, _ in boxes],
        classes=[name for _, name, _ in boxes],
        tiles=tiles,
        tile_of_box=tuple(tile for _, _, tile in boxes),
    )


def _window(slices: list[Annotated]) -> Optional[tuple[float, float]]:
    """The window that annotations state for slices of one montage; None if they state none.

    Raises:
        UmedError: they state several.
    """
    stated = [item for item in slices if item.window is not None]
    for item in stated:
        if item.window != stated[0].window:
            raise UmedError(
                f"{item.where}: window of slice {item.slice} of {item.image} is {item.window}, but {stated[0].window} of slice "
                f"{stated[0].slice} in {stated[0].where}. A montage is shown in one window: give all its rows the same, or "
                "choose image.slices: annotated or largest_lesion"
            )
    return stated[0].window if stated else None


def _largest_area(item: Annotated) -> float:
    return max((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in item.boxes)


def montage_slices(count: int, most: int, wanted: Sequence[int]) -> tuple[int, ...]:
    """Indices of at most ``most`` of ``count`` slices, in order: spread evenly, then moved onto the ``wanted`` slices.

    A montage shows the whole body, so the other slices stay spread. If more slices are wanted than there are tiles, the first
    ones of ``wanted`` are shown.
    """
    tiles = min(most, count)
    even = [int((tile + 0.5) * count / tiles) for tile in range(tiles)]
    kept = list(dict.fromkeys(wanted))[:tiles]
    free = [tile for tile in even if tile not in kept]
    for index in kept:
        if index not in even and free:
            free.remove(min(free, key=lambda tile: abs(tile - index)))
    return tuple(sorted([*kept, *free][:tiles]))
