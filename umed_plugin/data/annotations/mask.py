"""Masks: every connected region (8 neighbours) of a mask image is a lesion, its box the region's extent."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from umed_plugin.data.annotations.base import Annotated, matching_files
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box


class MaskOptions(ReaderOptions):
    """Mask images. ``files`` is a pattern of the images; each connected region of an image's mask is a lesion."""

    yaml_example_ = """
annotations:
  reader: mask
  files: images/*.jpg
  masks: masks/{stem}.png
  only_class: polyp
"""

    masks: str = Field(
        description="Path of an image's mask. ``{stem}`` is the image's name without ending, ``{split}`` the split."
    )
    values: dict[int, str] = Field({}, description="For label masks: grey value and its class.")
    only_class: Optional[str] = Field(
        None, description="For binary masks: the class of every pixel at or above ``threshold``."
    )
    threshold: int = Field(
        128, description="For binary masks: the lowest grey value that counts (JPEG masks hold grey levels)."
    )
    min_area: int = Field(1, description="Regions with fewer pixels are left out as slivers.")

    @model_validator(mode="after")
    def _one_class_source(self) -> MaskOptions:
        if bool(self.values) == (self.only_class is not None):
            raise ValueError("give either values (label masks) or only_class (binary masks)")
        return self


@register_reader("mask", MaskOptions)
def read_mask(options: MaskOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read the mask of every image; an empty mask is a negative."""
    items: list[Annotated] = []
    for split, pattern in options.files.items():
        for image in matching_files(root, pattern, faults):
            mask = root / options.masks.format(stem=image.stem, split=split)
            values = _values(mask, faults)
            if values is not None:
                boxes, classes = _regions(values, options, mask, faults)
                items.append(
                    Annotated(image, boxes, classes, str(mask), (values.shape[1], values.shape[0]), split=split)
                )
    return items


def _values(mask: Path, faults: Faults) -> Optional[np.ndarray]:
    """Grey values ``[height, width]`` of a mask, or None after a fault."""
    if not mask.is_file():
        faults.add(mask, "no such mask (annotations.masks). An image without a lesion needs an empty mask")
        return None
    try:
        with Image.open(mask) as image:
            # The indices of a palette are the labels. Converting its colours would give shades of grey.
            return np.asarray(image if image.mode in ("L", "P", "I", "I;16", "1") else image.convert("L")).astype(int)
    except (OSError, SyntaxError, ValueError) as error:
        faults.add(mask, f"cannot be read as an image: {error}")
        return None


def _regions(values: np.ndarray, options: MaskOptions, mask: Path, faults: Faults) -> tuple[list[Box], list[str]]:
    from scipy.ndimage import find_objects, label

    if options.only_class is not None:
        # A 1-bit mask holds 0 and 1.
        threshold = options.threshold if values.max(initial=0) > 1 else 1
        layers = {options.only_class: values >= threshold}
    else:
        unknown = sorted(set(np.unique(values).tolist()) - {0} - set(options.values))
        if unknown:
            faults.add(mask, f"holds the values {unknown[:10]}. Allowed: 0 (nothing) and {options.values}")
        layers = {name: values == value for value, name in options.values.items()}
    boxes: list[Box] = []
    classes: list[str] = []
    for name, layer in layers.items():
        numbered, _ = label(layer, structure=np.ones((3, 3)))
        for number, extent in enumerate(find_objects(numbered), start=1):
            rows, columns = extent
            if (numbered[extent] == number).sum() >= options.min_area:
                boxes.append((float(columns.start), float(rows.start), float(columns.stop), float(rows.stop)))
                classes.append(name)
    return boxes, classes
