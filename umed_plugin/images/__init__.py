"""The one place that reads pixels: PNG, JPEG, 16-bit PNG, DICOM and NIfTI slices -> 8-bit RGB as the model sees it.

Files are opened by MONAI's readers. The reader objects are used directly: ``LoadImage(reader=...)`` falls back to other
readers without a word, and PILReader's and PydicomReader's defaults swap rows and columns. Everything in here is
``[row, column]``, and what is turned for display returns an `Orientation`, through which boxes move along.

Grey values: 8-bit images are shown as they are, like LLaVA does. All others go through a window, after the DICOM modality table
or rescale, the NIfTI scaling or the recipe's offset. `dicom`, `nifti` and `pictures` read; `windows` shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Union

import numpy as np

from umed_plugin.errors import UmedError
from umed_plugin.geometry import Orientation
from umed_plugin.images.dicom import read_dicom
from umed_plugin.images.nifti import read_nifti
from umed_plugin.images.pictures import PICTURE_ENDINGS, read_by_llava, read_picture
from umed_plugin.images.stored import StoredSlice
from umed_plugin.images.windows import Window, to_grey_levels

__all__ = ["StoredSlice", "Window", "canonical_orientation", "load_image", "read_by_llava", "read_stored"]

NIFTI_ENDINGS = (".nii", ".nii.gz")
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")


def load_image(
    path: Union[str, Path],
    *,
    window: Window = "file",
    offset: float = 0.0,
    orientation: str = "canonical",
    slice: Optional[int] = None,
    slice_axis: int = 2,
    volume: Optional[int] = None,
) -> tuple[np.ndarray, Orientation]:
    """Read one image, or one slice of a volume, as the model sees it.

    Args:
        window: ``file``, ``full``, a preset, ``(low, high)`` or a `WindowRange`, or three of these for red, green and blue;
            see `recipe.ImageOptions`.
        offset: subtracted from the values of 16-bit images that PIL reads.
        orientation: ``canonical`` or ``as_stored``.
        slice: index from 0 along ``slice_axis`` of a NIfTI volume, or of a frame of a multi-frame DICOM.
        volume: index from 0 of a volume in a 4-D NIfTI file.

    Returns:
        uint8 RGB ``[height, width, 3]``, and how it was turned from the stored slice.

    Raises:
        UmedError: the file is missing, unreadable, or holds what cannot be shown.
    """
    path = Path(path)
    stored = read_stored(path, offset=offset, slice=slice, slice_axis=slice_axis, volume=volume)
    height, width = stored.values.shape[:2]
    turned = Orientation(width, height)
    if orientation == "canonical" and stored.directions is not None:
        turned = canonical_orientation(width, height, *stored.directions)
    grey = turned.apply_array(to_grey_levels(stored, window, path))
    rgb = grey if grey.ndim == 3 else np.repeat(grey[:, :, None], 3, axis=2)
    return np.ascontiguousarray(rgb, dtype=np.uint8), turned


def read_stored(
    path: Path,
    *,
    offset: float = 0.0,
    slice: Optional[int] = None,
    slice_axis: int = 2,
    volume: Optional[int] = None,
) -> StoredSlice:
    """Read one slice as it lies in the file; arguments as in `load_image`."""
    if not path.is_file():
        raise UmedError(f"{path}: no such image file")
    name = path.name.lower()
    if name.endswith(NIFTI_ENDINGS):
        return read_nifti(path, slice, slice_axis, volume)
    if name.endswith(DICOM_ENDINGS) or _has_dicom_magic(path):
        return read_dicom(path, slice)
    if name.endswith(PICTURE_ENDINGS):
        return read_picture(path, offset)
    endings = ", ".join(PICTURE_ENDINGS + DICOM_ENDINGS + NIFTI_ENDINGS)
    raise UmedError(f"{path}: no known image ending and no DICOM header. Allowed: {endings}")


def _has_dicom_magic(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def canonical_orientation(width: int, height: int, along_x: np.ndarray, along_y: np.ndarray) -> Orientation:
    """The turn that shows a slice as a radiologist sees it.

    Axial: patient's left on the right, back down. Coronal: left on the right, feet down. Sagittal: back on the right, feet
    down. Oblique slices go to the nearest of these.

    Args:
        along_x, along_y: directions in patient coordinates (left, posterior, superior) in which stored x and y grow.
    """
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    x_axis, y_axis = max(pairs, key=lambda pair: abs(along_x[pair[0]]) + abs(along_y[pair[1]]))
    # Of the plane's two patient axes the one that comes first (left, posterior, superior) runs to the right.
    transpose = x_axis > y_axis
    x_sign, y_sign = along_x[x_axis], along_y[y_axis]
    right, down = (y_sign, x_sign) if transpose else (x_sign, y_sign)
    down_axis = max(x_axis, y_axis)
    return Orientation(width, height, transpose, bool(right < 0), bool(down > 0 if down_axis == 2 else down < 0))
