"""Studies as the model sees them: a small picture of the square, and boxes in 0-1 of it, both by
`umed_plugin.grounding.geometry`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin.data.images import open_image
from umed_plugin.data.images.drawing import square_of
from umed_plugin.errors import UmedError
from umed_plugin.grounding.boxes import Box, is_degenerate
from umed_plugin.grounding.geometry import ImageGeometry

SIDE = 384  # pixels of a picture at most: 500 studies make a page of a few megabytes, which opens at once
QUALITY = 80


@dataclass(frozen=True)
class SeenImage:
    """One image as the model sees it.

    Attributes:
        square: the picture, RGB, at most as wide as asked; smaller images keep their size.
        geometry: of the file; boxes go through it.
    """

    square: Any
    geometry: ImageGeometry

    def boxes01(self, boxes_px: Sequence[Sequence[float]]) -> list[Box]:
        """Boxes in pixels of the file -> 0-1 of the square; boxes that lie wholly outside it are left out."""
        return [box for box in self.geometry.to_square(boxes_px) if not is_degenerate(box)]


def see(image: str, mode: str, reading: Mapping[str, Any] | None, run_folder: Path, side: int = SIDE) -> SeenImage:
    """Open an image as training and evaluation do.

    Args:
        image: path of the file; if it no longer exists, the same file below ``run_folder``.
        mode: ``pad`` or ``square``.
        reading: arguments of `umed_plugin.data.images.load_image` for DICOM and NIfTI files.
        side: of the square at most, in pixels.

    Raises:
        UmedError: the file is missing or cannot be read.
    """
    path = _existing(Path(image), run_folder)
    if not path.exists():
        raise UmedError(f"{path}: no such image file.")
    try:
        opened = open_image(path, dict(reading) if reading else None)
    except (OSError, SyntaxError, TypeError, ValueError) as error:  # TypeError: a key of ``reading`` that is unknown
        raise UmedError(f"{path}: cannot be read as an image ({error}).") from error
    geometry = ImageGeometry(opened.width, opened.height, mode)
    return SeenImage(square_of(opened, geometry, min_side=1, max_side=side), geometry)


def as_augmented(seen: SeenImage, augmented: Mapping[str, Any]) -> SeenImage:
    """The image as ``--umed_augment`` moved it; its grey levels stay.

    Args:
        augmented: what the candidate log has of the movement.
    """
    import numpy as np
    from PIL import Image

    from umed_plugin.data.augmentation.pixels import moved_picture
    from umed_plugin.grounding.square_move import move_of

    pixels = moved_picture(np.asarray(seen.square), move_of(dict(augmented)))
    return SeenImage(Image.fromarray(pixels), seen.geometry)


def _existing(path: Path, run_folder: Path) -> Path:
    """The path, or the one below a run's folder with the same ending: runs are moved and copied."""
    if path.exists():
        return path
    ends = [run_folder.joinpath(*path.parts[start:]) for start in range(1, len(path.parts))]
    return next((end for end in ends if end.exists()), path)


def as_data_url(square: Any) -> str:
    """The picture as WebP in a ``data:`` URL, with pixels and no metadata."""
    from PIL import Image

    clean = Image.frombytes(square.mode, square.size, square.tobytes())
    buffer = io.BytesIO()
    clean.save(buffer, format="WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
