"""A stored slice, a montage of slices or several images side by side -> 8-bit RGB as the model sees it, and how it was turned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from umed_plugin.data.images.by_format import read_stored
from umed_plugin.data.images.stored import Remark, check_size, square_size
from umed_plugin.data.images.windows import Window, to_grey_levels
from umed_plugin.errors import UmedError, UsageError, unknown_name
from umed_plugin.grounding.geometry import Montage, Orientation


@dataclass(frozen=True)
class ShownImage:
    """An image as the model sees it, and what is known of its file.

    Attributes:
        pixels: uint8 RGB ``[height, width, 3]``.
        orientation: how it was turned from the stored slice; for a montage, how each tile was.
        exif: an EXIF orientation that was not applied, 1 to 8; 1 if there is none.
        is_grey_levels: True for 8-bit values, to which no window applies.
        remarks: what a user should know of the file.
    """

    pixels: np.ndarray
    orientation: Orientation
    exif: int = 1
    is_grey_levels: bool = False
    remarks: tuple[Remark, ...] = ()


def load_image(
    path: Union[str, Path],
    *,
    window: Window = "file",
    offset: float = 0.0,
    orientation: str = "canonical",
    slice: Union[int, Sequence[int], None] = None,
    slice_axis: int = 2,
    volume: Optional[int] = None,
    pixels: str = "square",
    beside: Sequence[Union[str, Path]] = (),
) -> tuple[np.ndarray, Orientation]:
    """Read an image, a slice of a volume or series, or a montage of slices, as the model sees it.

    Args:
        path: an image file, or the folder of one DICOM series.
        window: ``file`` (the file's own window), ``full`` (minimum to maximum), a preset such as ``lung``, ``(low, high)``, or a
            `WindowRange`. Three of these give the red, green and blue channel. See `image_options.ImageOptions`.
        offset: subtracted from the values of PNG and TIFF files of more than 8 bits.
        orientation: ``canonical`` (as a radiologist sees it) or ``as_stored``.
        slice: index from 0: along ``slice_axis`` of a NIfTI volume, of a frame of a multi-frame DICOM file, of a page of a TIFF,
            or in a series, counted from the patient's right, front or feet. A sequence of indices gives a montage
            (`geometry.Montage`).
        slice_axis: 0, 1 or 2, of the NIfTI array as stored.
        volume: index from 0 of a volume in a 4-D NIfTI file.
        pixels: ``square``: DICOM and NIfTI slices whose pixels are not square are resampled. ``as_stored``: they are not.
        beside: further images that are shown to the right of it, all of the height of the lowest one.

    Returns:
        uint8 RGB ``[height, width, 3]``, and how it was turned from the stored slice (for a montage: how each tile was; with
        ``beside``: not at all, and of the size of the whole).

    Raises:
        UmedError: the file is missing, unreadable, or holds something that cannot be shown.
        UsageError: the window does not exist.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from PIL import Image
        >>> file = Path(tempfile.mkdtemp()) / "slice.png"
        >>> Image.fromarray(np.array([[0, 100, 200]], dtype=np.uint16)).save(file)
        >>> pixels, orientation = load_image(file, window=(0, 100))
        >>> pixels.shape, pixels[0, :, 0].tolist()
        ((1, 3, 3), [0, 255, 255])
        >>> orientation.size
        (3, 1)
    """
    shown = show_image(
        path,
        window=window,
        offset=offset,
        orientation=orientation,
        slice=slice,
        slice_axis=slice_axis,
        volume=volume,
        pixels=pixels,
        beside=beside,
    )
    return shown.pixels, shown.orientation


def show_image(
    path: Union[str, Path],
    *,
    slice: Union[int, Sequence[int], None] = None,
    volume: Optional[int] = None,
    beside: Sequence[Union[str, Path]] = (),
    **options: Any,
) -> ShownImage:
    """Read an image as `load_image` does, with its arguments, and return what is known of its file too.

    Raises:
        UmedError: as `load_image`.
    """
    path = Path(path)
    if beside:
        parts = [show_image(path, slice=slice, volume=volume, **options)]
        return _side_by_side(path, parts + [show_image(other, **options) for other in beside])
    if slice is not None and not isinstance(slice, int):
        return _montage(path, [show_image(path, slice=index, volume=volume, **options) for index in slice])
    return _show_one(path, slice, volume, **options)


def _show_one(
    path: Path,
    slice: Optional[int],
    volume: Optional[int],
    *,
    window: Window = "file",
    offset: float = 0.0,
    orientation: str = "canonical",
    slice_axis: int = 2,
    pixels: str = "square",
) -> ShownImage:
    for name, value, allowed in (
        ("orientation", orientation, ("canonical", "as_stored")),
        ("pixels", pixels, ("square", "as_stored")),
    ):
        if value not in allowed:
            raise UsageError(unknown_name(name, value, allowed))
    stored = read_stored(path, offset=offset, slice=slice, slice_axis=slice_axis, volume=volume)
    height, width = stored.values.shape[:2]
    square = square_size(path, width, height, stored.pixel_size) if pixels == "square" else None
    turned = Orientation(width, height, square_size=square)
    if orientation == "canonical" and stored.directions is not None:
        turned = canonical_orientation(width, height, *stored.directions)
        turned = replace(turned, square_size=square[::-1] if square and turned.transpose else square)
    grey = turned.apply_array(to_grey_levels(stored, window, path))
    rgb = grey if grey.ndim == 3 else np.repeat(grey[:, :, None], 3, axis=2)
    return ShownImage(
        np.ascontiguousarray(rgb, dtype=np.uint8), turned, stored.exif, stored.is_grey_levels, stored.remarks
    )


def _montage(path: Path, parts: list[ShownImage]) -> ShownImage:
    """The slices side by side, and the orientation that they share."""
    kinds = {part.orientation for part in parts}
    if len(kinds) != 1:
        shapes = sorted({f"{kind.size[0]}x{kind.size[1]}" for kind in kinds})
        raise UmedError(
            f"{path}: slices of {', '.join(shapes) or 'no'} pixels cannot be one montage: all must have the same size and be "
            "turned in the same way."
        )
    plan = Montage(*parts[0].orientation.size, len(parts))
    check_size(path, *plan.size)
    whole = np.zeros((plan.size[1], plan.size[0], 3), np.uint8)
    for tile, part in enumerate(parts):
        x, y = plan.corner(tile)
        whole[y : y + plan.height, x : x + plan.width] = part.pixels
    remarks = tuple(dict.fromkeys(remark for part in parts for remark in part.remarks))
    return replace(parts[0], pixels=whole, remarks=remarks)


def _side_by_side(path: Path, parts: list[ShownImage]) -> ShownImage:
    """Images next to each other, left to right, scaled to the height of the lowest one."""
    from PIL import Image

    height = min(part.pixels.shape[0] for part in parts)
    scaled = []
    for part in parts:
        rows, columns = part.pixels.shape[:2]
        picture = Image.fromarray(part.pixels)
        same = (max(1, round(columns * height / rows)), height)
        scaled.append(part.pixels if rows == height else np.asarray(picture.resize(same, Image.Resampling.BICUBIC)))
    width = sum(picture.shape[1] for picture in scaled)
    check_size(path, width, height)
    remarks = tuple(dict.fromkeys(remark for part in parts for remark in part.remarks))
    whole = np.ascontiguousarray(np.concatenate(scaled, axis=1))
    grey = all(part.is_grey_levels for part in parts)
    return ShownImage(whole, Orientation(width, height), is_grey_levels=grey, remarks=remarks)


def canonical_orientation(width: int, height: int, along_x: np.ndarray, along_y: np.ndarray) -> Orientation:
    """The orientation in which a radiologist sees a slice.

    Axial: the patient's left is on the right, the back is down. Coronal: left on the right, feet down. Sagittal: back on the
    right, feet down. Oblique slices are treated as the nearest of these.

    Args:
        width, height: of the stored slice, in pixels.
        along_x, along_y: directions of stored x and y in patient coordinates (left, posterior, superior).
    """
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    x_axis, y_axis = max(pairs, key=lambda pair: abs(along_x[pair[0]]) + abs(along_y[pair[1]]))
    # The first of the plane's two patient axes, in the order left, posterior, superior, must point to the right.
    transpose = x_axis > y_axis
    x_sign, y_sign = along_x[x_axis], along_y[y_axis]
    right, down = (y_sign, x_sign) if transpose else (x_sign, y_sign)
    down_axis = max(x_axis, y_axis)
    return Orientation(width, height, transpose, bool(right < 0), bool(down > 0 if down_axis == 2 else down < 0))
