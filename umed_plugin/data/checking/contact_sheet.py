"""Contact sheets: some images of every source and class with their boxes, to see at a glance whether boxes are on lesions.

Beside each image is a close-up of its smallest box: a kidney stone is 11 pixels wide. Outlines are drawn around the boxes, so
that the lesions stay visible.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from umed_plugin.data.annotations import Annotated
from umed_plugin.data.annotations.splits import picked_by_hash
from umed_plugin.data.prepared import Prepared
from umed_plugin.grounding.boxes import Box

_SIDE, _CAPTION, _GAP, _COLUMNS = 200, 30, 6, 3
_PER_SOURCE = 24
_CLOSER = 3.0  # width of the close-up, in multiples of the box's longer side
_COLOURS = ((0, 230, 0), (255, 170, 0), (70, 160, 255), (255, 90, 200), (250, 240, 60), (0, 230, 230))


class ContactSheets:
    """Selects from every source images of all classes and some without a lesion, always the same ones."""

    def __init__(self, items: Sequence[Annotated]) -> None:
        self._wanted: set[int] = set()
        self._tiles: dict[str, list[Image.Image]] = {}
        for source in {item.recipe.name for item in items}:
            self._wanted |= {id(item) for item in chosen_items([item for item in items if item.recipe.name == source])}

    def add(self, prepared: Prepared) -> None:
        """Draw an image if it is selected."""
        if id(prepared.item) in self._wanted:
            self._tiles.setdefault(prepared.item.recipe.name, []).append(_tile(prepared))

    def save(self, folder: Path) -> dict[str, Path]:
        """Write one PNG per source into the folder, and return source -> file."""
        written: dict[str, Path] = {}
        for source, tiles in sorted(self._tiles.items()):
            width, height = tiles[0].size
            rows = -(-len(tiles) // _COLUMNS)
            sheet = Image.new("RGB", (_COLUMNS * (width + _GAP), rows * (height + _GAP)), "white")
            for index, tile in enumerate(tiles):
                row, column = divmod(index, _COLUMNS)
                sheet.paste(tile, (column * (width + _GAP), row * (height + _GAP)))
            written[source] = folder / f"sheet_{source}.png"
            sheet.save(written[source])
        return written


def chosen_items(items: Sequence[Annotated], count: int = _PER_SOURCE) -> list[Annotated]:
    """About ``count`` images: the same number of every class and of negatives, as far as they exist, always the same ones."""
    groups: dict[str, list[Annotated]] = {}
    for item in items:
        for name in set(item.classes) or {""}:
            groups.setdefault(name, []).append(item)
    each = max(count // max(len(groups), 1), 1)
    return [item for _, group in sorted(groups.items()) for item in picked_by_hash(group, each, seed=0)]


def _tile(prepared: Prepared) -> Image.Image:
    """The image, a close-up of its smallest box, and a caption below."""
    tile = Image.new("RGB", (2 * _SIDE + _GAP, _SIDE + _CAPTION), (32, 32, 32))
    height, width = prepared.shown.shape[:2]
    longer = max(width, height)
    tile.paste(
        _cut(prepared, ((width - longer) / 2, (height - longer) / 2, (width + longer) / 2, (height + longer) / 2))
    )
    if prepared.boxes:
        x1, y1, x2, y2 = min(prepared.boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        half = min(max(x2 - x1, y2 - y1, 8.0) * _CLOSER, longer) / 2
        # Centre the close-up on the box, but keep it inside the image.
        x = min(max((x1 + x2) / 2, half), max(width - half, half))
        y = min(max((y1 + y2) / 2, half), max(height - half, half))
        tile.paste(_cut(prepared, (x - half, y - half, x + half, y + half)), (_SIDE + _GAP, 0))
    draw = ImageDraw.Draw(tile)
    item = prepared.item
    names = list(dict.fromkeys(prepared.classes or prepared.labels))
    for index, name in enumerate(names):
        shown = f"{name} (no box)" if prepared.labels else name
        draw.text((4 + index * 2 * _SIDE // len(names), _SIDE + 2), shown, fill=colour_of(name, item.recipe.names))
    if not names:
        draw.text((4, _SIDE + 2), "no lesion", fill="white")
    draw.text((4, _SIDE + 15), f"{item.split}  {item.image.parent.name}/{item.image.name}"[-64:], fill=(190, 190, 190))
    return tile


def _cut(prepared: Prepared, part: Box) -> Image.Image:
    """A square part of the image as ``[_SIDE, _SIDE]`` with outlines around the boxes; it may reach beyond the image.

    Args:
        part: xyxy in pixels of the image.
    """
    # In whole pixels, so that PIL fills what lies outside the image with black.
    x1, y1, x2, y2 = (round(value) for value in part)
    picture = Image.fromarray(np.ascontiguousarray(prepared.shown))
    cut = picture.crop((x1, y1, x2, y2)).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(cut)
    for box, name in zip(prepared.boxes, prepared.classes):
        left, right = ((x - x1) * _SIDE / (x2 - x1) for x in (box[0], box[2]))
        top, bottom = ((y - y1) * _SIDE / (y2 - y1) for y in (box[1], box[3]))
        draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=colour_of(name, prepared.item.recipe.names))
    return cut


def colour_of(name: str, names: Iterable[str]) -> tuple[int, int, int]:
    """The colour of a class: the same in all pictures of a source, whose class names are given."""
    return _COLOURS[list(names).index(name) % len(_COLOURS)]
