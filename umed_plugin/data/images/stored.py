"""What every image reader returns, and the size limit and error handling that they share."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

import numpy as np

from umed_plugin.errors import UmedError

# A header may claim any size. A slice with more pixels than this is refused before memory is allocated for it. 100 million pixels
# are a whole-slide image, which shows nothing when resized to 336 x 336.
MAX_PIXELS = 100_000_000

# Values [height, width] -> 0-1 float of the same shape: the display that the file itself defines.
View = Callable[[np.ndarray], np.ndarray]


def no_view() -> Optional[View]:
    """The view of a file that does not define its display."""
    return None


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
        hounsfield: False if the file says that its values are not in Hounsfield units. Window presets do not apply to it.
    """

    values: np.ndarray
    directions: Optional[tuple[np.ndarray, np.ndarray]] = None
    view: Callable[[], Optional[View]] = no_view
    is_grey_levels: bool = False
    inverted: bool = False
    hounsfield: bool = True


@contextlib.contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Turn whatever the libraries raise for a damaged file into one error that names the file."""
    try:
        yield
    except UmedError:
        raise
    except _reader_errors() as error:
        lines = (str(error).replace(str(path), path.name).strip() or "no reason given").splitlines()
        reason = " ".join(line.strip() for line in lines[:3])
        raise UmedError(
            f"{path}: cannot be read as an image ({type(error).__name__}: {reason}; {os.path.getsize(path)} bytes). "
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


def check_size(path: Path, width: int, height: int, what: str = "") -> None:
    """Refuse a slice whose header claims more pixels than any useful image has.

    Raises:
        UmedError: more than `MAX_PIXELS` pixels, or none.
    """
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise UmedError(
            f"{path}: its header says {width} x {height} pixels{what}. Allowed: 1 to {MAX_PIXELS}. Is the file damaged? "
            "Crop or shrink a whole-slide image first."
        )


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
