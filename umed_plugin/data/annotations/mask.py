"""Masks: every connected region (8 neighbours) of a mask image is a lesion, its box the region's extent."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Optional

import numpy as np
from pydantic import Field, field_validator, model_validator

from umed_plugin.data.annotations.base import Annotated, drop_box
from umed_plugin.data.annotations.effects import Applied
from umed_plugin.data.annotations.finding import did_you_mean_file, matches, matching_files
from umed_plugin.data.endings import NIFTI_ENDINGS
from umed_plugin.data.images.raster import DEEP_MODES, load_pixels, opened_raster
from umed_plugin.data.recipes.options import checked_template
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.errors import UmedError
from umed_plugin.faults import Faults

# A number that is set off. In "1.png" and "10.png" it is the name itself.
_NUMBERED = re.compile(r"(.+?)(?:[ _-]\d+|[ _-]?\(\d+\))(\.\w+)")
_MOST_WHOLE = 2.0**53  # floats above it are no labels
# Black of a mask that was saved as JPEG, in grey levels.
_JPEG_NOISE = 32


class MaskOptions(ReaderOptions):
    """Mask images. ``files`` is a pattern of the images; each connected region of an image's mask is a lesion."""

    from_masks_ = True
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
    threshold: float = Field(
        128,
        allow_inf_nan=False,
        description="For binary masks: the lowest grey value that counts (JPEG masks hold grey levels). For masks of floats in "
        "0-1: a fraction, such as 0.5.",
    )
    min_area: int = Field(
        1,
        description="Regions with fewer pixels are left out as slivers, and with them an image that has no other region.",
    )

    @field_validator("masks")
    @classmethod
    def _known_places(cls, value: str) -> str:
        return checked_template(value, ("stem", "split"))

    @model_validator(mode="after")
    def _one_class_source(self) -> MaskOptions:
        if bool(self.values) == (self.only_class is not None):
            raise ValueError("give either values (label masks) or only_class (binary masks)")
        return self


@register_reader("mask", MaskOptions)
def read_mask(options: MaskOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read the mask of every image; an empty mask is a negative."""
    items: list[Annotated] = []
    whole: list[Path] = []
    owners: dict[Path, Path] = {}
    applied = Applied({"annotations.values": [str(value) for value in options.values]})
    for split, pattern in options.files.items():
        for image in matching_files(root, pattern, faults):
            mask = root / options.masks.format(stem=image.stem, split=split)
            if owners.setdefault(mask, image) != image:
                faults.add(mask, f"is the mask of {owners[mask]} and of {image}, and nothing says which it is about")
                continue
            values = _values(mask, root, faults)
            if values is None or not _is_readable(values, options, mask, faults):
                continue
            for value in np.unique(values).tolist() if options.values else []:
                applied.meet("annotations.values", str(value))
            item = Annotated(image, [], [], str(mask), (values.shape[1], values.shape[0]), split=split)
            _add_regions(item, values, options, mask, faults)
            items.append(item)
            whole += [mask] if _covers_most(item, values) else []
    applied.tell(faults)
    if whole:
        faults.remark(
            root / options.masks,
            f"in {len(whole)} of {len(items)} masks the lesion is the border of the picture and most of it. Are they inverted? "
            f"The first: {whole[0].name}",
        )
    if options.values and "threshold" in options.model_fields_set:
        faults.no_effect("annotations.threshold", "has no effect together with annotations.values")
    _tell_unused_masks(options, root, set(owners), faults)
    _tell_further_masks(owners, faults)
    return items


def _covers_most(item: Annotated, values: np.ndarray) -> bool:
    """Whether a lesion reaches all four sides and most pixels are painted, as where the background is white."""
    height, width = values.shape
    return (0.0, 0.0, float(width), float(height)) in item.boxes and 2 * np.count_nonzero(values) > values.size


def _tell_unused_masks(options: MaskOptions, root: Path, used: set[Path], faults: Faults) -> None:
    """Masks that belong to no image: their lesions are not read."""
    written = options.masks.replace("{split}", "*").replace("{stem}", "*")
    if used and "{stem}" in options.masks:
        unused = [path for path in matches(root, written) if path not in used]
        if unused:
            faults.left_out["masks", "no image of annotations.files has this name"] += len(unused)
            faults.remark(root / written, f"{len(unused)} masks belong to no image. The first: {unused[0].name}")


def _tell_further_masks(owners: dict[Path, Path], faults: Faults) -> None:
    """Masks with a number behind the name of one that is read, such as ``a_mask_1.png``: further lesions of that image."""
    images = set(owners.values())
    further = []
    for folder in sorted({mask.parent for mask in owners if mask.parent.is_dir()}):
        for name in sorted(os.listdir(folder)):
            found = _NUMBERED.fullmatch(name)
            one = folder / name
            if found and folder / f"{found[1]}{found[2]}" in owners and one not in owners and one not in images:
                further.append(one)
    if further:
        faults.left_out["masks", "a further one of its image, with a number behind the name"] += len(further)
        faults.remark(
            further[0],
            f"{len(further)} masks have a number behind the name of one that is read, and are not read: their lesions are "
            "unmarked. Join the masks of an image into one",
        )


def _values(mask: Path, root: Path, faults: Faults) -> Optional[np.ndarray]:
    """Grey values ``[height, width]`` of a mask, whole numbers unless the file holds others; None after a fault."""
    if not mask.is_file():
        faults.add(
            mask,
            f"no such mask (annotations.masks).{did_you_mean_file(mask, root)} An image without a lesion needs an empty mask",
        )
        return None
    if mask.name.lower().endswith(NIFTI_ENDINGS):
        faults.add(
            mask, "is a NIfTI file; the reader mask takes pictures. nifti_labels reads label volumes of NIfTI images"
        )
        return None
    try:
        with opened_raster(mask) as image:
            pages = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
            if pages > 1:
                faults.add(
                    mask, f"has {pages} pages, and a mask is one picture. Write each page into a file of its own"
                )
                return None
            load_pixels(image, mask)
            if image.mode in ("LA", "RGBA", "PA"):
                return _of_transparent(image, mask, faults)
            # The indices of a palette are the labels. Converting its colours would give shades of grey.
            values = np.asarray(image if image.mode in (*DEEP_MODES, "L", "P", "1") else image.convert("L"))
            return values.astype(int) if values.dtype.kind != "f" or _whole(values).all() else values
    except UmedError as error:
        faults.messages.append(str(error))
        return None


def _whole(values: np.ndarray) -> np.ndarray:
    """Which floats are whole numbers; NaN and infinity are none."""
    return (values == np.round(values)) & (np.abs(values) < _MOST_WHOLE)


def _is_readable(values: np.ndarray, options: MaskOptions, mask: Path, faults: Faults) -> bool:
    """False after a fault: values that neither a class nor the threshold can be told by."""
    highest = values.max(initial=0)
    is_fraction = 0 < options.threshold < 1 and options.only_class is not None
    if values.dtype.kind == "f":
        if is_fraction and values.min(initial=0) >= 0 and highest <= 1:
            return True
        held = ", ".join(f"{value:g}" for value in np.unique(values[~_whole(values)])[:3].tolist())
        faults.add(
            mask,
            f"holds values that are not whole: {held}. Save whole numbers; for fractions of 0-1 give only_class, and a "
            "threshold that is a fraction, such as 0.5",
        )
        return False
    if is_fraction and highest > 1:
        faults.add(
            mask, f"holds whole values up to {highest}, and annotations.threshold {options.threshold:g} is a fraction"
        )
        return False
    is_asked_for = "threshold" in options.model_fields_set and options.threshold <= highest
    if 0 < highest <= _JPEG_NOISE and _is_lossy(mask) and not is_asked_for:
        faults.add(
            mask,
            f"holds only 0-{highest}, and JPEG leaves as much of black. Save the masks as PNG, with 0 where nothing is",
        )
        return False
    return True


def _is_lossy(mask: Path) -> bool:
    return mask.suffix.lower() in (".jpg", ".jpeg")


def _of_transparent(image: Any, mask: Path, faults: Faults) -> Optional[np.ndarray]:
    """Grey values of a mask with an alpha channel; a fault if the shape is in that channel alone."""
    values = np.asarray(image.convert("LA"))
    grey, alpha = values[:, :, 0].astype(int), values[:, :, 1]
    if grey.min() == grey.max() and alpha.min() != alpha.max():
        faults.add(
            mask, "has the same colour everywhere, and its shape in the alpha channel. Save it as black and white"
        )
        return None
    return grey * (alpha > 0)


def _add_regions(item: Annotated, values: np.ndarray, options: MaskOptions, mask: Path, faults: Faults) -> None:
    from scipy.ndimage import find_objects, label

    if options.only_class is not None:
        # A 1-bit mask holds 0 and 1.
        threshold = options.threshold if values.dtype.kind == "f" or values.max(initial=0) > 1 else 1
        layers = [(options.only_class, values >= threshold)]
        _check_threshold(item, values, threshold, options, mask, faults)
    else:
        unknown = sorted(set(np.unique(values).tolist()) - {0} - set(options.values))
        if unknown:
            faults.add(mask, f"holds the values {unknown[:10]}. Allowed: 0 (nothing) and {options.values}")
        # By value, so that lesions of one class that touch stay apart.
        layers = [(name, values == value) for value, name in options.values.items()]
    for name, layer in layers:
        numbered, _ = label(layer, structure=np.ones((3, 3)))
        for number, extent in enumerate(find_objects(numbered), start=1):
            rows, columns = extent
            if (numbered[extent] == number).sum() < options.min_area:
                drop_box(item, f"regions below annotations.min_area {options.min_area}", faults)
                continue
            item.boxes.append((float(columns.start), float(rows.start), float(columns.stop), float(rows.stop)))
            item.classes.append(name)


def _check_threshold(
    item: Annotated, values: np.ndarray, threshold: float, options: MaskOptions, mask: Path, faults: Faults
) -> None:
    """A fault if something is painted that the threshold does not see: the image would become a negative, or lose a lesion.

    A region counts if all of it is below the threshold, and above what JPEG compression leaves of black. Of fractions, which are
    hardly ever exactly 0, such regions are left out and counted.
    """
    from scipy.ndimage import find_objects, label

    painted = values > (_JPEG_NOISE if _is_lossy(mask) else 0)
    if not painted.any() or not (values[painted] < threshold).any():
        return
    numbered, _ = label(painted, structure=np.ones((3, 3)))
    unseen = [
        extent
        for number, extent in enumerate(find_objects(numbered), start=1)
        if not (values[extent][numbered[extent] == number] >= threshold).any()
        and (numbered[extent] == number).sum() >= options.min_area
    ]
    if values.dtype.kind == "f":
        for _ in unseen:
            drop_box(item, f"regions below annotations.threshold {threshold:g}", faults)
    elif unseen:
        held = sorted(set(np.unique(values[painted]).tolist()))
        faults.add(
            mask,
            f"has {len(unseen)} painted regions below annotations.threshold {threshold:g}; it holds the values "
            f"{', '.join(map(str, held[:10]))}{' ...' if len(held) > 10 else ''}. If every value above 0 is a lesion: "
            "threshold: 1. If values tell classes or lesions apart: annotations.values",
        )
