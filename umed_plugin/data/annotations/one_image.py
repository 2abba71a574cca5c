"""Which annotated slices are shown in one image: those of a volume of which the recipe makes one, else each on its own.

Whatever chooses among images takes such slices together. A slice that is left out by itself would still be seen in a montage of
the others, and the record would say that its lesion is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.annotations.finding import real_path
from umed_plugin.data.annotations.phrases import NO_PHRASE
from umed_plugin.data.annotations.splits import picked_by_hash
from umed_plugin.data.recipes.recipe import Recipe
from umed_plugin.faults import Faults


def in_one_image(items: Sequence[Annotated]) -> list[list[Annotated]]:
    """The items that become one image, in the order of the first of each. Their recipes and splits are set."""
    folders: dict[str, str] = {}
    images: dict[tuple[object, ...], list[Annotated]] = {}
    for number, item in enumerate(items):
        key: tuple[object, ...] = (number,)
        if item.recipe.image.slices != "annotated":
            key = (item.recipe.name, real_path(str(item.image), folders), item.phrase, item.split)
        images.setdefault(key, []).append(item)
    return list(images.values())


def is_negative(image: Sequence[Annotated]) -> bool:
    """True if no slice of an image shows a lesion, as far as the annotations say."""
    return all(item.is_negative for item in image)


def picked_images(images: Sequence[list[Annotated]], count: int, seed: int) -> list[Annotated]:
    """The items of at most ``count`` images, chosen by `picked_by_hash`: a volume by its path, whichever slices it names."""
    named: list[Annotated] = []
    slices: dict[int, list[Annotated]] = {}
    for image in images:
        first = image[0]
        named.append(first if first.recipe.image.slices == "annotated" else replace(first, slice=None))
        slices[id(named[-1])] = image
    return [item for first in picked_by_hash(named, count, seed) for item in slices[id(first)]]


def note_unread(items: Sequence[Annotated], annotated: Sequence[Annotated], recipe: Recipe) -> None:
    """Set ``unread`` of every item of a volume: its slices that show what no record says.

    Args:
        items: those of ``annotated`` that are used, and others.
        annotated: all that the annotations hold.
    """
    if recipe.image.slices == "annotated":
        return
    folders: dict[str, str] = {}
    used = {id(item) for item in items}
    unread: dict[str, set[int | None]] = {}
    for item in annotated:
        shows = item.classes or item.dropped_boxes or item.left_out not in ("", NO_PHRASE)
        if id(item) not in used and shows:
            unread.setdefault(real_path(str(item.image), folders), set()).add(item.slice)
    for item in items if unread else []:
        item.unread = frozenset(unread.get(real_path(str(item.image), folders), ()))


def tell_divided_volumes(items: Sequence[Annotated], recipe: Recipe, faults: Faults) -> None:
    """Add a fault for volumes with slices in several splits of which a montage is made: it would show slices of the others."""
    if recipe.image.slices != "montage":
        return
    folders: dict[str, str] = {}
    first: dict[str, Annotated] = {}
    divided: dict[str, Annotated] = {}
    for item in items:
        place = real_path(str(item.image), folders)
        if first.setdefault(place, item).split != item.split:
            divided.setdefault(place, item)
    if divided:
        place, other = next(iter(divided.items()))
        faults.add(
            other.where,
            f"puts a slice of {other.image.name} in {other.split or '(none)'}, and {first[place].where} puts one in "
            f"{first[place].split or '(none)'}, like {len(divided)} volumes in all. image.slices is 'montage', which shows all "
            "slices of a volume: they must be in one split",
        )
