"""What every image reader returns, and the size limit and error handling that they share."""

from __future__ import annotations

import contextlib
import contextvars
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import numpy as np

from umed_plugin.errors import UmedError

# A header may claim any size. A slice with more pixels than this is refused before memory is allocated for it. 100 million pixels
# are a whole-slide image, which shows nothing when resized to 336 x 336.
MAX_PIXELS = 100_000_000
# Values of one slice, and what a compressed header or file may inflate to before a slice is cut out of it.
MAX_BYTES = 2**29
# What a reader may keep of a volume between two of its slices.
MAX_CACHED_BYTES = 2**30
# The sides of one pixel are compared with this tolerance, since scanners round them. Beyond the other limit they are nonsense.
_SQUARE, _MAX_PIXEL_RATIO = 0.01, 100
# CLIPImageProcessor takes an axis of 1 or 3 for the colours, and resizes the shorter side of a strip to 336 pixels.
_LEAST_SIDE, _MAX_STRIP = 4, 200
# Changes whenever a file becomes other pixels than before: caches and built records of another one are not used.
READERS = "readers-3"


@dataclass(frozen=True)
class Limits:
    """What one image may take while it is read.

    Attributes:
        pixels: of one slice or picture.
        bytes: of one slice's values as stored, and of a compressed frame.
        inflated: bytes of a deflated DICOM file, which pydicom inflates whole.
        cached: bytes of a volume that is kept for its next slice.
        file: bytes of a PNG, JPEG, TIFF or other picture file, which Pillow may read whole; None for any number.
        items: in the sequences of a DICOM header, each of which becomes an object; None for any number.
    """

    pixels: int = MAX_PIXELS
    bytes: int = MAX_BYTES
    inflated: int = MAX_BYTES
    cached: int = MAX_CACHED_BYTES
    file: Optional[int] = None
    items: Optional[int] = None


_USUAL = Limits()
_limits: contextvars.ContextVar[Limits] = contextvars.ContextVar("limits", default=_USUAL)


def limits() -> Limits:
    """What images may take here: `Limits` as they are, or those of the innermost `limited`."""
    return _limits.get()


@contextlib.contextmanager
def limited(to: Limits) -> Iterator[None]:
    """Read images under other limits, in this thread."""
    token = _limits.set(to)
    try:
        yield
    finally:
        _limits.reset(token)


# Values [height, width] -> 0-1 float of the same shape: the display that the file itself defines.
View = Callable[[np.ndarray], np.ndarray]


def no_view() -> Optional[View]:
    """The view of a file that does not define its display."""
    return None


class Remark(NamedTuple):
    """What a user should know of a file that is shown all the same.

    Attributes:
        kind: the rest of a sentence that begins with a number of images.
        detail: of this file; for messages that name one example.
    """

    kind: str
    detail: str = ""


@dataclass(frozen=True)
class StoredSlice:
    """A slice as it is stored in the file.

    Attributes:
        values: ``[height, width]`` or, in colour, uint8 ``[height, width, 3]``. Values that are not finite are not measurements
            (NIfTI's NaN, DICOM's padding) and are shown black.
        directions: unit vectors of the slice's x and y in patient coordinates (left, posterior, superior); None if the file does
            not define them.
        view: returns the file's own window or table, or None if it has none. Raises `UmedError` if it is invalid. Called only
            when it is needed.
        is_grey_levels: True for 8-bit values that need no window.
        inverted: True if small values are bright (DICOM's MONOCHROME1).
        pixel_size: width and height of a pixel, in mm or relative; None if the file does not say.
        exif: an EXIF orientation that was not applied, 1 to 8; 1 if there is none.
        remarks: what a user should know of the file.
        hounsfield: False if the file says that its values are not in Hounsfield units. Window presets do not apply to it.
    """

    values: np.ndarray
    directions: Optional[tuple[np.ndarray, np.ndarray]] = None
    view: Callable[[], Optional[View]] = no_view
    is_grey_levels: bool = False
    inverted: bool = False
    hounsfield: bool = True
    pixel_size: Optional[tuple[float, float]] = None
    exif: int = 1
    remarks: tuple[Remark, ...] = ()


@contextlib.contextmanager
def unreadable(path: Path, what: str = "an image") -> Iterator[None]:
    """Turn whatever the libraries raise for a damaged file into one error that names the file, and what it should be."""
    try:
        yield
    except UmedError:
        raise
    except _reader_errors() as error:
        lines = (str(error).replace(str(path), path.name).strip() or "no reason given").splitlines()
        reason = " ".join(line.strip() for line in lines[:3])
        raise UmedError(
            f"{path}: cannot be read as {what} ({type(error).__name__}: {reason}; {os.path.getsize(path)} bytes). "
            "Download the file again, or remove it from the annotations."
        ) from error


def _reader_errors() -> tuple[type[Exception], ...]:
    """Exceptions that PIL, pydicom and nibabel raised for damaged, truncated or unsupported files and fuzzed headers."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from PIL.Image import DecompressionBombError
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return (
        *(OSError, EOFError, SyntaxError, zlib.error, struct.error, ValueError, TypeError, AttributeError, LookupError),
        *(ArithmeticError, RuntimeError, AssertionError, MemoryError),
        *(ImageFileError, HeaderDataError, DecompressionBombError, InvalidDicomError, BytesLengthException),
    )


def check_size(path: Path, width: int, height: int, bytes_per_pixel: int = 1) -> None:
    """Refuse a slice whose header claims more than any useful image has, before its pixels are decoded.

    Raises:
        UmedError: more pixels or bytes than `limits` allow, or no pixels.
    """
    most = limits()
    if width < 1 or height < 1 or width * height > most.pixels:
        raise UmedError(
            f"{path}: its header says {width} x {height} pixels. Allowed: 1 to {most.pixels}. Is the file damaged? "
            "Crop or shrink a whole-slide image first."
        )
    if width * height * bytes_per_pixel > most.bytes:
        raise UmedError(
            f"{path}: its header says {width} x {height} pixels of {bytes_per_pixel} bytes. Allowed: {most.bytes} bytes in all. "
            "Is the file damaged? Store it with fewer bits, or crop it."
        )


def check_file_size(path: Path) -> None:
    """Refuse a picture file that is larger than `limits` allow, before Pillow opens it.

    Raises:
        UmedError: it is.
    """
    most, size = limits().file, path.stat().st_size
    if most is not None and size > most:
        raise UmedError(
            f"{path}: is a picture file of {size / 1e6:.0f} MB. Allowed: {most / 1e6:.0f} MB. Remove what else it holds, or "
            "shrink it."
        )


def check_for_model(path: Path, width: int, height: int) -> None:
    """Refuse a picture that LLaVA's image processor cannot take, or takes for something else.

    Raises:
        UmedError: a side is below 4 pixels, or one side is more than 200 times the other.
    """
    check_size(path, width, height)
    if min(width, height) < _LEAST_SIDE or max(width, height) > _MAX_STRIP * min(width, height):
        raise UmedError(
            f"{path}: has {width} x {height} pixels. Allowed: sides of at least {_LEAST_SIDE}, and one at most {_MAX_STRIP} "
            "times the other; LLaVA's image processor cannot take others. Remove the image from the annotations."
        )


def square_size(
    path: Path, width: int, height: int, pixel_size: Optional[tuple[float, float]]
) -> Optional[tuple[int, int]]:
    """Width and height after resampling to square pixels, the finer spacing in both directions; None if they are square.

    Raises:
        UmedError: the sides of a pixel differ more than any scanner's do, or the result has too many pixels.
    """
    if pixel_size is None:
        return None
    ratio = pixel_size[0] / pixel_size[1]
    if not 1 / _MAX_PIXEL_RATIO <= ratio <= _MAX_PIXEL_RATIO:
        raise UmedError(
            f"{path}: its header says that a pixel is {pixel_size[0]:g} wide and {pixel_size[1]:g} high. Allowed: up to "
            f"{_MAX_PIXEL_RATIO} times. Repair the header, or show the pixels as they are: image.pixels: as_stored"
        )
    if abs(ratio - 1) <= _SQUARE:
        return None
    size = (round(width * ratio), height) if ratio > 1 else (width, round(height / ratio))
    check_size(path, *size)
    return None if size == (width, height) else size


def checked_index(path: Path, index: Optional[int], count: int, what: str, key: str = "columns.slice") -> int:
    """The index of a slice, frame or volume, checked against their number in the file.

    Raises:
        UmedError: no index is given and there are several, or the index does not exist.
    """
    if index is None and count == 1:
        return 0
    if index is None:
        raise UmedError(f"{path}: has {count} {what}s and none is chosen. Choose one: {key}")
    if not 0 <= index < count:
        raise UmedError(f"{path}: {what} {index} does not exist. Allowed: 0 to {count - 1}.")
    return index
