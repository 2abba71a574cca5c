"""The images of a check with their boxes, as cards for its page, and where boxes lie and how large they are, as counts.

Boxes are in 0-1 of the square that the model sees (``pad``), which the picture shows.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from umed_plugin.data.annotations import Annotated
from umed_plugin.data.annotations.splits import picked_by_hash
from umed_plugin.data.images.drawing import square_of
from umed_plugin.data.prepared import Prepared
from umed_plugin.grounding.boxes import Box
from umed_plugin.grounding.geometry import ImageGeometry

MOST = 2000  # cards of a page; more images are chosen by a hash of their names, always the same
SIDE, _QUALITY = 320, 75
BINS = 10  # of a histogram, and of each side of the map of centres


class BoxPlaces:
    """How large boxes are, and where their centres lie.

    Attributes:
        sides: [BINS] number of boxes by the square root of their area, in tenths of the square's side.
        centres: [BINS, BINS] number of boxes by the row and column of their centre.
    """

    def __init__(self) -> None:
        self.sides = [0] * BINS
        self.centres = [[0] * BINS for _ in range(BINS)]

    def add(self, box01: Box) -> None:
        """Count one box, in 0-1 of the square."""
        x1, y1, x2, y2 = box01
        side = math.sqrt(max(x2 - x1, 0.0) * max(y2 - y1, 0.0))
        self.sides[_bin(side)] += 1
        self.centres[_bin((y1 + y2) / 2)][_bin((x1 + x2) / 2)] += 1


def _bin(share: float) -> int:
    return min(max(int(share * BINS), 0), BINS - 1)


class CheckedImages:
    """Cards of at most ``most`` images.

    Args:
        items: all images of the check.
        most: number of cards; 0: none are made.
    """

    def __init__(self, items: Sequence[Annotated], most: int) -> None:
        chosen = items if len(items) <= most else picked_by_hash(list(items), most, seed=0)
        self._wanted = {id(item) for item in chosen} if most else set()
        self.cards: list[dict[str, Any]] = []

    def add(self, name: str, prepared: Prepared, findings: Sequence[str]) -> None:
        """Make the card of an image, if it is wanted.

        Args:
            name: as messages call it.
            findings: kinds of the plausibility table that it is among.
        """
        item = prepared.item
        if id(item) not in self._wanted:
            return
        geometry = ImageGeometry(*prepared.size, "pad")
        picture = square_of(Image.fromarray(np.ascontiguousarray(prepared.shown)), geometry, min_side=1, max_side=SIDE)
        self.cards.append(
            {
                "id": name,
                "split": item.split or "(none)",
                "source": item.recipe.name,
                "file": str(item.image),
                "patient": item.patient,
                "modality": item.modality,
                "pixels": list(prepared.size),
                "classes": list(dict.fromkeys(prepared.classes or prepared.labels)),
                "named": list(prepared.classes),
                "boxes": [[round(float(value), 4) for value in box] for box in geometry.to_square(prepared.boxes)],
                "findings": list(findings),
                "picture": _data_url(picture),
                "fault": "",
            }
        )


def _data_url(picture: Image.Image) -> str:
    clean = Image.frombytes(picture.mode, picture.size, picture.tobytes())
    buffer = io.BytesIO()
    clean.save(buffer, format="WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
