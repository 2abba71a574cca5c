"""The contact sheet of pseudo-boxes: each image with its box, and beside it the anomaly map with the same box. Look at it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import numpy as np
from PIL import Image, ImageDraw

from umed_plugin import files
from umed_plugin.data.annotations.splits import picked_by_hash
from umed_plugin.grounding.boxes import Box

if TYPE_CHECKING:
    from umed_plugin.data.prepared import Prepared
    from umed_plugin.pseudo_boxes.synthesis import Picture

_SIDE, _CAPTION, _GAP, _COLUMNS = 200, 30, 6, 3
_PER_MAP = 24
_BOX = (0, 230, 0)


class Sheet:
    """Draws some images of each map, always the same ones.

    Args:
        path: of the PNG.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tiles: list[Image.Image] = []

    def chosen(self, images: Sequence[Prepared]) -> set[int]:
        """``id`` of the images to draw."""
        wanted = {id(item) for item in picked_by_hash([image.item for image in images], _PER_MAP, seed=0)}
        return {id(image) for image in images if id(image.item) in wanted}

    def add(self, image: Prepared, picture: Picture, anomalies: np.ndarray, box: Optional[Box], score: float) -> None:
        """Draw an image.

        Args:
            anomalies: its map, ``[S, S]`` in 0-1; red is 1.
            box: in 0-1 of the square; None: it gets none.
            score: peak of the map, 0-1.
        """
        tile = Image.new("RGB", (2 * _SIDE + _GAP, _SIDE + _CAPTION), (32, 32, 32))
        shown = np.uint8(picture.pixels * 255)
        heat = np.stack([anomalies, np.zeros_like(anomalies), 1 - anomalies], axis=-1)
        blended = np.uint8(picture.pixels.mean(-1, keepdims=True) * 110 + heat * 145)
        for place, pixels in ((0, shown), (_SIDE + _GAP, blended)):
            part = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
            if box is not None:
                x1, y1, x2, y2 = (value * _SIDE for value in box)
                ImageDraw.Draw(part).rectangle((x1 - 1, y1 - 1, x2, y2), outline=_BOX)
            tile.paste(part, (place, 0))
        draw, item = ImageDraw.Draw(tile), image.item
        label = (image.labels or image.classes)[0]
        text = f"{label}  score {score:.3f}" + ("" if box is not None else "  no box: below least_score")
        draw.text((4, _SIDE + 2), text, fill=_BOX if box is not None else (255, 170, 0))
        draw.text(
            (4, _SIDE + 15), f"{item.split}  {item.image.parent.name}/{item.image.name}"[-64:], fill=(190, 190, 190)
        )
        self._tiles.append(tile)

    def save(self) -> None:
        """Write the PNG, whole or not at all."""
        if not self._tiles:
            return
        width, height = self._tiles[0].size
        rows = -(-len(self._tiles) // _COLUMNS)
        sheet = Image.new("RGB", (_COLUMNS * (width + _GAP), rows * (height + _GAP)), "white")
        for index, tile in enumerate(self._tiles):
            row, column = divmod(index, _COLUMNS)
            sheet.paste(tile, (column * (width + _GAP), row * (height + _GAP)))
        with files.replacing(self.path, durable=False) as partial:
            sheet.save(partial, format="PNG")
