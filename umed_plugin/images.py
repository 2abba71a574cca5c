"""The one place that reads pixels: PNG, JPEG, 16-bit PNG, DICOM and NIfTI slices -> 8-bit RGB as the model sees it.

Pixels come through MONAI's readers. The reader objects are used directly: ``LoadImage(reader=...)`` falls back to other
readers without a word, and PILReader's and PydicomReader's defaults swap rows and columns. Everything in here is
``[row, column]``, and what is turned for display returns an `Orientation`, through which boxes move along.

Grey values: 8-bit images are shown as they are, like LLaVA does. All others go through a window, after the DICOM rescale
slope and intercept, the NIfTI scaling or the recipe's offset. DICOM's SIGMOID windows are treated as linear ones.
"""

from __future__ import annotations

import contextlib
import functools
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from umed_plugin.errors import UmedError, UsageError, unknown_name
from umed_plugin.geometry import Orientation
from umed_plugin.recipe_options import WINDOW_PRESETS, WindowRange

Window = Union[str, WindowRange, tuple[float, float]]

_PIL_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_NIFTI_ENDINGS = (".nii", ".nii.gz")
_DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_PHOTOMETRIC = ("MONOCHROME1", "MONOCHROME2", "RGB")


@dataclass(frozen=True)
class StoredSlice:
    """A slice as it lies in the file.

    Attributes:
        values: ``[height, width]`` or, in colour, ``[height, width, 3]``.
        directions: unit vectors, patient coordinates (left, posterior, superior), along which x and y of the slice grow;
            None where the file does not say.
        window: lowest and highest value to show, as the file says; None where it does not.
        is_grey_levels: 8-bit values that need no window.
        inverted: small values are bright (DICOM's MONOCHROME1).
    """

    values: np.ndarray
    directions: Optional[tuple[np.ndarray, np.ndarray]] = None
    window: Optional[tuple[float, float]] = None
    is_grey_levels: bool = False
    inverted: bool = False


def load_image(
    path: Union[str, Path],
    *,
    window: Window = "file",
    offset: float = 0.0,
    orientation: str = "canonical",
    slice: Optional[int] = None,
    slice_axis: int = 2,
) -> tuple[np.ndarray, Orientation]:
    """Read one image, or one slice of a volume, as the model sees it.

    Args:
        window: ``file``, ``full``, a preset, ``(low, high)`` or a `WindowRange`; see `recipe.ImageOptions`.
        offset: subtracted from the values of 16-bit images that PIL reads.
        orientation: ``canonical`` or ``as_stored``.
        slice: index from 0 along ``slice_axis`` of a NIfTI volume, or of a frame of a multi-frame DICOM.

    Returns:
        uint8 RGB ``[height, width, 3]``, and how it was turned from the stored slice.

    Raises:
        UmedError: the file is missing, unreadable, or holds what cannot be shown.
    """
    path = Path(path)
    stored = read_stored(path, offset=offset, slice=slice, slice_axis=slice_axis)
    height, width = stored.values.shape[:2]
    turned = Orientation(width, height)
    if orientation == "canonical" and stored.directions is not None:
        turned = canonical_orientation(width, height, *stored.directions)
    grey = stored.values if stored.is_grey_levels else _windowed(stored, window, path)
    if stored.inverted:
        grey = 255 - grey
    grey = turned.apply_array(grey)
    rgb = grey if grey.ndim == 3 else np.repeat(grey[:, :, None], 3, axis=2)
    return np.ascontiguousarray(rgb, dtype=np.uint8), turned


def read_stored(path: Path, *, offset: float = 0.0, slice: Optional[int] = None, slice_axis: int = 2) -> StoredSlice:
    """Read one slice as it lies in the file; arguments as in `load_image`."""
    if not path.is_file():
        raise UmedError(f"{path}: no such image file")
    name = path.name.lower()
    if name.endswith(_NIFTI_ENDINGS):
        return _read_nifti(path, slice, slice_axis)
    if name.endswith(_DICOM_ENDINGS) or _has_dicom_magic(path):
        return _read_dicom(path, slice)
    if name.endswith(_PIL_ENDINGS):
        return _read_pil(path, offset)
    endings = ", ".join(_PIL_ENDINGS + _DICOM_ENDINGS + _NIFTI_ENDINGS)
    raise UmedError(f"{path}: no known image ending and no DICOM header. Allowed: {endings}")


def read_by_llava(path: Path) -> bool:
    """True when LLaVA's own ``Image.open(path).convert("RGB")`` shows this file right: an 8-bit image of a PIL format."""
    from PIL import Image

    if not path.name.lower().endswith(_PIL_ENDINGS):
        return False
    with _unreadable(path), Image.open(path) as image:
        return image.mode not in _DEEP_MODES


@contextlib.contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    """Turns what the libraries raise on a damaged file into one error that names the file."""
    try:
        yield
    except UmedError:
        raise
    except _reader_errors() as error:
        said = (str(error).replace(str(path), path.name).strip() or "no reason given").splitlines()[0]
        raise UmedError(
            f"{path}: cannot be read as an image ({type(error).__name__}: {said}; {os.path.getsize(path)} bytes). "
            "Fetch the file again or take it out of the annotations."
        ) from error


def _reader_errors() -> tuple[type[Exception], ...]:
    """What PIL, pydicom and nibabel were seen to raise on damaged, cut off or unsupported files."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from PIL.Image import DecompressionBombError
    from pydicom.errors import InvalidDicomError

    return (
        *(OSError, EOFError, SyntaxError, zlib.error, ValueError, AttributeError, KeyError, RuntimeError),
        *(ImageFileError, HeaderDataError, DecompressionBombError, InvalidDicomError),
    )


def _read_pil(path: Path, offset: float) -> StoredSlice:
    from monai.data import PILReader

    def to_rgb(image: Any) -> Any:
        # Palette, alpha and CMYK would come out as indices or wrong channels; LLaVA converts just so.
        return image if image.mode in _DEEP_MODES else image.convert("RGB")

    reader = PILReader(converter=to_rgb, reverse_indexing=False)
    with _unreadable(path), reader.read(path) as image:
        values, _ = reader.get_data(image)
        deep = image.mode in _DEEP_MODES
    return StoredSlice(values.astype(np.float32) - offset) if deep else StoredSlice(values, is_grey_levels=True)


def _read_dicom(path: Path, frame: Optional[int]) -> StoredSlice:
    from monai.data import PydicomReader

    # affine_lps_to_ras only concerns the affine, which is not used: directions are read off the header below.
    reader = PydicomReader(swap_ij=False, affine_lps_to_ras=False)
    with _unreadable(path):
        header = reader.read(path)
        photometric = str(getattr(header, "PhotometricInterpretation", "none"))
        if photometric not in _PHOTOMETRIC:
            raise UmedError(
                f"{path}: photometric interpretation is {photometric}. Allowed: {', '.join(_PHOTOMETRIC)}. "
                "Convert the file, or export it as PNG."
            )
        values, _ = reader.get_data(header)
        values = np.asarray(values)
        colour = int(getattr(header, "SamplesPerPixel", 1)) == 3
        frames = int(getattr(header, "NumberOfFrames", None) or 1)
        directions = _dicom_directions(header)
        window = _dicom_window(header)
    if frames > 1:
        values = values[_checked_index(path, frame, frames, "frame")]
    if colour and values.dtype != np.uint8:
        raise UmedError(f"{path}: colour with {values.dtype} values. Allowed: 8 bits per channel.")
    return StoredSlice(
        values if colour else values.astype(np.float32), directions, window, colour, photometric == "MONOCHROME1"
    )


def _dicom_directions(header: Any) -> Optional[tuple[np.ndarray, np.ndarray]]:
    cosines = getattr(header, "ImageOrientationPatient", None)
    if cosines is None or len(cosines) != 6:
        return None
    vectors = np.array([float(value) for value in cosines])
    return vectors[:3], vectors[3:]


def _dicom_window(header: Any) -> Optional[tuple[float, float]]:
    # A file may offer several windows; the first one is the default view.
    centre, width = (_first(getattr(header, name, None)) for name in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None or width <= 0:
        return None
    return centre - width / 2, centre + width / 2


def _first(value: Any) -> Optional[float]:
    """The number in a DICOM element that may be missing, empty, one number or several."""
    values = [] if value is None else list(value) if hasattr(value, "__iter__") else [value]
    return float(values[0]) if values else None


def _read_nifti(path: Path, index: Optional[int], axis: int) -> StoredSlice:
    values, affine = _nifti_volume(str(path), path.stat().st_mtime_ns)
    volume = values[..., 0] if values.ndim == 4 and values.shape[3] == 1 else values
    if volume.ndim == 2:
        volume = volume[:, :, None]
    if volume.ndim != 3 or volume.dtype.fields:
        raise UmedError(
            f"{path}: holds an array of shape {values.shape}, type {values.dtype}. Allowed: one grey volume, "
            "3-D. Take one volume out (nibabel.four_to_three)."
        )
    plane = np.take(volume, _checked_index(path, index, volume.shape[axis], "slice"), axis=axis)
    # Stored x is the first remaining array axis, y the second; RAS to LPS turns the first two patient axes round.
    vectors = affine[:3, :3] * np.array([[-1.0], [-1.0], [1.0]])
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=0), 1e-12)
    first, second = (vectors[:, other] for other in range(3) if other != axis)
    return StoredSlice(np.asarray(plane, dtype=np.float32).T, (first, second))


@functools.lru_cache(maxsize=1)  # slices of one volume come one after the other
def _nifti_volume(path: str, modified: int) -> tuple[np.ndarray, np.ndarray]:
    from monai.data import NibabelReader

    reader = NibabelReader(as_closest_canonical=False, squeeze_non_spatial_dims=False)
    with _unreadable(Path(path)):
        values, header = reader.get_data(reader.read(path))
        return np.asarray(values), np.asarray(header["affine"], dtype=float)


def _has_dicom_magic(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _checked_index(path: Path, index: Optional[int], count: int, what: str) -> int:
    if index is None and count == 1:
        return 0
    if index is None:
        raise UmedError(
            f"{path}: holds {count} {what}s and none is chosen. Name the column that says it: columns.slice"
        )
    if not 0 <= index < count:
        raise UmedError(f"{path}: {what} {index} does not exist. Allowed: 0 to {count - 1}.")
    return index


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


def _windowed(stored: StoredSlice, window: Window, path: Path) -> np.ndarray:
    """Values -> uint8 grey levels; what is below the window is black, above it white."""
    finite = np.isfinite(stored.values)
    if not finite.any():
        raise UmedError(f"{path}: holds no finite value")
    low, high = (
        window_range(window)
        or (stored.window if window == "file" else None)
        or (float(stored.values[finite].min()), float(stored.values[finite].max()))
    )
    values = np.where(finite, stored.values, low)
    span = high - low if high > low else 1.0
    return np.rint(np.clip((values - low) / span, 0, 1) * 255).astype(np.uint8)


def window_range(window: Window) -> Optional[tuple[float, float]]:
    """``(low, high)`` of a preset or a range; None for ``file`` and ``full``, which depend on the image."""
    if isinstance(window, str) and window in ("file", "full"):
        return None
    if isinstance(window, str):
        if window not in WINDOW_PRESETS:
            raise UsageError(unknown_name("window", window, ["file", "full", *WINDOW_PRESETS]))
        centre, width = WINDOW_PRESETS[window]
        return centre - width / 2, centre + width / 2
    if isinstance(window, WindowRange):
        if window.low is not None and window.high is not None:
            return window.low, window.high
        if window.centre is not None and window.width is not None:
            return window.centre - window.width / 2, window.centre + window.width / 2
        raise ValueError(f"not a window: {window}")
    return float(window[0]), float(window[1])
