"""What every image reader gives, and the limits and the one error that hold for all of them."""

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

# A header may claim any size. More pixels than this in one slice are refused before memory is asked for them; 100 million are
# a whole-slide image, of which 336 x 336 would show nothing.
MOST_PIXELS = 100_000_000

# Values [height, width] -> 0-1 float of the same shape: how the file itself wants to be shown.
View = Callable[[np.ndarray], np.ndarray]


def no_view() -> Optional[View]:
    """Of a file that does not say how it wants to be shown."""
    return None


@dataclass(frozen=True)
class StoredSlice:
    """A slice as it lies in the file.

    Attributes:
        values: ``[height, width]`` or, in colour, uint8 ``[height, width, 3]``. What is not finite is no measurement (NIfTI's
            NaN, DICOM's padding) and is shown black.
        directions: unit vectors, patient coordinates (left, posterior, superior), along which x and y of the slice grow;
            None where the file does not say.
        view: gives the file's own window or table, or None where it has none; raises `UmedError` where it makes no sense.
            Called only when it is wanted.
        is_grey_levels: 8-bit values that need no window.
        inverted: small values are bright (DICOM's MONOCHROME1).
        hounsfield: False where the file says that its values are no Hounsfield units, so that a preset means nothing.
    """

    values: np.ndarray
    directions: Optional[tuple[np.ndarray, np.ndarray]] = None
    view: Callable[[], Optional[View]] = no_view
    is_grey_levels: bool = False
    inverted: bool = False
    hounsfield: bool = True


@contextlib.contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Turns what the libraries raise on a damaged file into one error that names the file."""
    try:
        yield
    except UmedError:
        raise
    except _reader_errors() as error:
        said = (str(error).replace(str(path), path.name).strip() or "no reason given").splitlines()
        reason = " ".join(line.strip() for line in said[:3])
        raise UmedError(
            f"{path}: cannot be read as an image ({type(error).__name__}: {reason}; {os.path.getsize(path)} bytes). "
            "Fetch the file again or take it out of the annotations."
        ) from error


def _reader_errors() -> tuple[type[Exception], ...]:
    """What PIL, pydicom and nibabel were seen to raise on damaged, cut off or unsupported files and on fuzzed headers."""
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
    """Refuse what a header claims to be larger than any image that is of use here.

    Raises:
        UmedError: more than `MOST_PIXELS`, or no pixels at all.
    """
    if width < 1 or height < 1 or width * height > MOST_PIXELS:
        raise UmedError(
            f"{path}: its header says {width} x {height} pixels{what}. Allowed: 1 to {MOST_PIXELS}. Is the file damaged? A "
            "whole-slide image has to be cut or shrunk first."
        )


def checked_index(path: Path, index: Optional[int], count: int, what: str, key: str = "columns.slice") -> int:
    """The index of a slice, frame or volume, where the file has several of them.

    Raises:
        UmedError: none is given and there are several, or it does not exist.
    """
    if index is None and count == 1:
        return 0
    if index is None:
        raise UmedError(f"{path}: holds {count} {what}s and none is chosen. Say which one: {key}")
    if not 0 <= index < count:
        raise UmedError(f"{path}: {what} {index} does not exist. Allowed: 0 to {count - 1}.")
    return index
