"""The only code that reads pixels: PNG, JPEG, 16-bit PNG, DICOM and NIfTI slices -> 8-bit RGB as the model sees it.

MONAI's readers open the files. The reader objects are used directly, because ``LoadImage(reader=...)`` silently falls back to
other readers, and because the defaults of PILReader and PydicomReader swap rows and columns. All arrays here are
``[row, column]``. Whatever turns an image for display also returns an `Orientation`, which turns its boxes.

8-bit images keep their grey values, as in LLaVA. All others go through a window, after the DICOM modality table or rescale, the
NIfTI scaling, or the recipe's offset. `dicom`, `nifti` and `raster` read files, `windows` computes grey levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from umed_plugin.data.images.dicom import frame_count, open_header, read_dicom
from umed_plugin.data.images.nifti import read_nifti, volume_shape
from umed_plugin.data.images.raster import DEEP_MODES, RASTER_ENDINGS, read_by_llava, read_raster
from umed_plugin.data.images.series import burned_in_flag, file_states, series_files, series_flags
from umed_plugin.data.images.stored import StoredSlice, checked_index
from umed_plugin.data.images.windows import Window, to_grey_levels
from umed_plugin.errors import UmedError
from umed_plugin.grounding.geometry import Montage, Orientation

__all__ = [
    "StoredSlice",
    "Window",
    "burned_in_annotation",
    "canonical_orientation",
    "file_states",
    "load_image",
    "open_image",
    "read_by_llava",
    "read_stored",
    "slice_count",
]

NIFTI_ENDINGS = (".nii", ".nii.gz")
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")


def load_image(
    path: Union[str, Path],
    *,
    window: Window = "file",
    offset: float = 0.0,
    orientation: str = "canonical",
    slice: Union[int, Sequence[int], None] = None,
    slice_axis: int = 2,
    volume: Optional[int] = None,
) -> tuple[np.ndarray, Orientation]:
    """Read an image, a slice of a volume or series, or a montage of slices, as the model sees it.

    Args:
        path: an image file, or the folder of one DICOM series.
        window: ``file`` (the file's own window), ``full`` (minimum to maximum), a preset such as ``lung``, ``(low, high)``, or a
            `WindowRange`. Three of these give the red, green and blue channel. See `recipe.ImageOptions`.
        offset: subtracted from the values of PNG and TIFF files of more than 8 bits.
        orientation: ``canonical`` (as a radiologist sees it) or ``as_stored``.
        slice: index from 0: along ``slice_axis`` of a NIfTI volume, of a frame of a multi-frame DICOM file, or in a series,
            counted from the patient's right, front or feet. A sequence of indices gives a montage (`geometry.Montage`).
        slice_axis: 0, 1 or 2, of the NIfTI array as stored.
        volume: index from 0 of a volume in a 4-D NIfTI file.

    Returns:
        uint8 RGB ``[height, width, 3]``, and how it was turned from the stored slice (for a montage: how each tile was).

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
    path = Path(path)
    if slice is not None and not isinstance(slice, int):
        options: dict[str, Any] = {"window": window, "offset": offset, "orientation": orientation}
        options.update(slice_axis=slice_axis, volume=volume)
        return _montage(path, [load_image(path, slice=index, **options) for index in slice])
    stored = read_stored(path, offset=offset, slice=slice, slice_axis=slice_axis, volume=volume)
    height, width = stored.values.shape[:2]
    turned = Orientation(width, height)
    if orientation == "canonical" and stored.directions is not None:
        turned = canonical_orientation(width, height, *stored.directions)
    grey = turned.apply_array(to_grey_levels(stored, window, path))
    rgb = grey if grey.ndim == 3 else np.repeat(grey[:, :, None], 3, axis=2)
    return np.ascontiguousarray(rgb, dtype=np.uint8), turned


def _montage(path: Path, parts: list[tuple[np.ndarray, Orientation]]) -> tuple[np.ndarray, Orientation]:
    """The slices side by side, and the orientation that they share."""
    kinds = {(image.shape, turned) for image, turned in parts}
    if len(kinds) != 1:
        shapes = sorted({f"{shape[1]}x{shape[0]}" for shape, _ in kinds})
        raise UmedError(
            f"{path}: slices of {', '.join(shapes) or 'no'} pixels cannot be one montage: all must have the same size and be "
            "turned in the same way."
        )
    ((shape, turned),) = kinds
    plan = Montage(shape[1], shape[0], len(parts))
    whole = np.zeros((plan.size[1], plan.size[0], 3), np.uint8)
    for tile, (image, _) in enumerate(parts):
        x, y = plan.corner(tile)
        whole[y : y + plan.height, x : x + plan.width] = image
    return whole, turned


def slice_count(path: Path, slice_axis: int = 2) -> int:
    """Number of slices of a NIfTI volume or a series, number of frames of a DICOM file, 1 for other images.

    Raises:
        UmedError: the file cannot be read.
    """
    if path.is_dir():
        return len(series_files(path))
    if path.name.lower().endswith(NIFTI_ENDINGS):
        return volume_shape(path)[slice_axis]
    if path.name.lower().endswith(DICOM_ENDINGS) or _has_dicom_magic(path):
        return frame_count(path)
    return 1


def open_image(path: Union[str, Path], reading: Optional[dict[str, Any]] = None) -> Any:
    """A PIL image in RGB: 8-bit images exactly as LLaVA opens them, all others by `load_image`.

    Args:
        path: an image file, or the folder of a DICOM series.
        reading: arguments of `load_image`, as in records that name a DICOM or NIfTI file.
    """
    from PIL import Image

    path = Path(path)
    if not reading and path.name.lower().endswith(RASTER_ENDINGS):
        image = Image.open(path)
        if image.mode not in DEEP_MODES:
            return image.convert("RGB")
    return Image.fromarray(load_image(path, **(reading or {}))[0])


def read_stored(
    path: Path,
    *,
    offset: float = 0.0,
    slice: Optional[int] = None,
    slice_axis: int = 2,
    volume: Optional[int] = None,
) -> StoredSlice:
    """Read one slice as it is stored in the file. The arguments are those of `load_image`."""
    if path.is_dir():
        files = series_files(path)
        return read_dicom(files[checked_index(path, slice, len(files), "slice")], None)
    if not path.is_file():
        raise UmedError(f"{path}: no such image file")
    name = path.name.lower()
    if name.endswith(NIFTI_ENDINGS):
        return read_nifti(path, slice, slice_axis, volume)
    if name.endswith(DICOM_ENDINGS) or _has_dicom_magic(path):
        return read_dicom(path, slice)
    if name.endswith(RASTER_ENDINGS):
        return read_raster(path, offset)
    endings = ", ".join(RASTER_ENDINGS + DICOM_ENDINGS + NIFTI_ENDINGS)
    raise UmedError(f"{path}: has neither a known file extension nor a DICOM header. Allowed: {endings}")


def burned_in_annotation(path: Path) -> Optional[str]:
    """What a DICOM header says about text in the pixels: ``YES`` or ``NO``; None if it says nothing, and for other files.

    A series has text if one of its files says so, and no text only if all of its files say so.
    """
    if path.is_dir():
        flags = series_flags(path)
        if "YES" in flags:
            return "YES"
        return "NO" if flags == {"NO"} else None
    if not path.name.lower().endswith(DICOM_ENDINGS) and not _has_dicom_magic(path):
        return None
    return burned_in_flag(open_header(path, pixels=False))


def _has_dicom_magic(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


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
