"""PNG, JPEG, BMP and TIFF files, of 8 bits and of more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from umed_plugin.data.images.stored import StoredSlice, unreadable

RASTER_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")


def read_raster(path: Path, offset: float) -> StoredSlice:
    """Read an image; ``offset`` is subtracted from the values of one with more than 8 bits."""
    from monai.data import PILReader

    def to_rgb(image: Any) -> Any:
        # Palette, alpha and CMYK images would become indices or wrong channels. LLaVA converts in the same way.
        return image if image.mode in DEEP_MODES else image.convert("RGB")

    reader = PILReader(converter=to_rgb, reverse_indexing=False)
    with unreadable(path), reader.read(path) as image:
        values, _ = reader.get_data(image)
        deep = image.mode in DEEP_MODES
    return StoredSlice(values.astype(np.float32) - offset) if deep else StoredSlice(values, is_grey_levels=True)


def read_by_llava(path: Path) -> bool:
    """True if LLaVA's own ``Image.open(path).convert("RGB")`` reads this file correctly: an 8-bit image in a PIL format."""
    from PIL import Image

    if not path.name.lower().endswith(RASTER_ENDINGS):
        return False
    with unreadable(path), Image.open(path) as image:
        return image.mode not in DEEP_MODES
