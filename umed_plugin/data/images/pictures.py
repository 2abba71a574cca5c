"""PNG, JPEG, BMP and TIFF, of 8 and of 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from umed_plugin.data.images.stored import StoredSlice, unreadable

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")


def read_picture(path: Path, offset: float) -> StoredSlice:
    """Read a picture; ``offset`` is subtracted from the values of one with more than 8 bits."""
    from monai.data import PILReader

    def to_rgb(image: Any) -> Any:
        # Palette, alpha and CMYK would come out as indices or wrong channels; LLaVA converts just so.
        return image if image.mode in DEEP_MODES else image.convert("RGB")

    reader = PILReader(converter=to_rgb, reverse_indexing=False)
    with unreadable(path), reader.read(path) as image:
        values, _ = reader.get_data(image)
        deep = image.mode in DEEP_MODES
    return StoredSlice(values.astype(np.float32) - offset) if deep else StoredSlice(values, is_grey_levels=True)


def read_by_llava(path: Path) -> bool:
    """True when LLaVA's own ``Image.open(path).convert("RGB")`` shows this file right: an 8-bit image of a PIL format."""
    from PIL import Image

    if not path.name.lower().endswith(PICTURE_ENDINGS):
        return False
    with unreadable(path), Image.open(path) as image:
        return image.mode not in DEEP_MODES
