"""What a DICOM header says of one frame: its elements, unit, padding, window, directions and pixel size.

Enhanced multi-frame files keep these in functional groups, other files in the header itself.

Three functions of `pydicom.pixels` were tried in place of the code below, and gave other pixels or errors (tests of
``tests/data/test_dicom.py`` unless another file is named):

- ``apply_voi_lut`` computes the index in the entries' type, so an 8-bit table of over 256 entries wraps: ``test_voi_tables``.
- ``apply_modality_lut`` computes the index in the pixels' type, which overflows: ``test_modality_tables_extend_at_both_ends``. It
  also accepts slope 0: ``test_headers_that_make_no_sense_are_named``.
- ``apply_windowing`` returns the range of the stored values, not 0-1. It fails for width 0:
  ``test_dicom_without_window_shows_the_full_range`` in ``test_images.py``.

They also know neither functional groups nor padding as NaN, so they would need a merged header for each frame.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import numpy as np

from umed_plugin.data.images.stored import View, unreadable
from umed_plugin.data.images.windows import LinearView, SigmoidView, TableView, look_up
from umed_plugin.errors import UmedError

_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


class FrameHeader:
    """A header for one frame: the elements of the frame's functional groups first, then the file's own.

    Enhanced files keep rescale, window, orientation and spacing in groups. The same element beside them does not belong there.
    """

    def __init__(self, header: Any, index: int) -> None:
        each = getattr(header, "PerFrameFunctionalGroupsSequence", None) or []
        shared = getattr(header, "SharedFunctionalGroupsSequence", None) or []
        groups = [*each[index : index + 1], *shared[:1]]
        self._parts = [*(item for group in groups for item in _macros(group)), header]

    def __getattr__(self, name: str) -> Any:
        for part in self._parts:
            value = getattr(part, name, None)
            if value is not None:
                return value
        raise AttributeError(name)

    @property
    def whole(self) -> Any:
        """The file's own header."""
        return self._parts[-1]

    def part_with(self, *names: str) -> Any:
        """The first part with one of these elements, so that one macro's elements are not mixed with another's."""
        found = (part for part in self._parts if any(getattr(part, name, None) not in (None, "") for name in names))
        return next(found, self.whole)


_MACROS = (
    "PixelValueTransformationSequence",
    "FrameVOILUTSequence",
    "PlaneOrientationSequence",
    "PlanePositionSequence",
    "PixelMeasuresSequence",
)


def _macros(group: Any) -> list[Any]:
    """The items of the macros that define the display and the position of a frame."""
    return [item for name in _MACROS for item in (getattr(group, name, None) or [])[:1]]


def padding(values: np.ndarray, header: FrameHeader) -> np.ndarray:
    """True where the pixels ``[rows, columns]`` are padding, not measurements (PixelPaddingValue, PixelPaddingRangeLimit)."""
    first = getattr(header, "PixelPaddingValue", None)
    if first is None:
        return np.zeros(values.shape, dtype=bool)
    last = getattr(header, "PixelPaddingRangeLimit", None)
    low, high = sorted((int(first), int(first if last is None else last)))
    padded = (values >= low) & (values <= high)
    # If every pixel were padding, the element must be wrong.
    return padded & ~padded.all()


def in_its_unit(values: np.ndarray, header: FrameHeader, path: Path) -> np.ndarray:
    """Float32 values after the modality table or rescale (DICOM PS3.3 C.11.1), changed in place; padding stays NaN.

    Raises:
        UmedError: slope or intercept is not a number, or the slope is 0.
    """
    part = header.part_with("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept")
    tables = getattr(part, "ModalityLUTSequence", None)
    if tables:
        first, entries, _ = _table(tables[0], header, is_signed=_has_signed_pixels(header))
        return look_up(values, first, entries)
    slope, intercept = _rescale(part)
    if not (np.isfinite(slope) and np.isfinite(intercept) and slope):
        raise UmedError(
            f"{path}: rescale slope is {slope:g} and intercept {intercept:g}. Needed: numbers, slope not 0."
        )
    if slope == 1 and intercept == 0:
        return values
    values *= np.float32(slope)
    values += np.float32(intercept)
    return values


def _rescale(part: Any) -> tuple[float, float]:
    """Slope and intercept; 1 and 0 where the header states none."""
    slope, intercept = (_first(getattr(part, name, None)) for name in ("RescaleSlope", "RescaleIntercept"))
    return 1.0 if slope is None else slope, 0.0 if intercept is None else intercept


def _has_signed_pixels(header: Any) -> bool:
    return bool(int(getattr(header, "PixelRepresentation", 0)))


def _may_be_negative(header: FrameHeader) -> bool:
    """Whether values in their unit, on which a VOI table works (PS3.3 C.11.2.1.1), can be below 0."""
    part = header.part_with("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept")
    rescaled = not getattr(part, "ModalityLUTSequence", None) and min(_rescale(part)) < 0
    return rescaled or _has_signed_pixels(header)


def own_view(header: FrameHeader, path: Path) -> Optional[View]:
    """The first VOI table or, without one, the first window: the default if a file has several. None if it has none."""
    with unreadable(path):
        part = header.part_with("VOILUTSequence", "WindowCenter", "WindowWidth")
        tables = getattr(part, "VOILUTSequence", None)
        if tables:
            return TableView(*_table(tables[0], header, is_signed=_may_be_negative(header)))
        centre, width = (_first(getattr(part, name, None)) for name in ("WindowCenter", "WindowWidth"))
        if not np.isfinite([centre or 0, width or 0]).all():
            raise UmedError(
                f"{path}: its window has centre {centre:g} and width {width:g}; needed: numbers. Choose another: image.window"
            )
        if centre is not None and width is not None and width > 0:
            return _window(centre, width, str(getattr(part, "VOILUTFunction", None) or "LINEAR"), path)
        # Floating-point pixels have no BitsStored (PS3.3 C.7.6.24).
        if "PixelData" in header.whole and int(header.BitsStored) == 8 and not hasattr(header, "ModalityLUTSequence"):
            return _identity(header)
        return None


def _window(centre: float, width: float, function: str, path: Path) -> View:
    """DICOM PS3.3 C.11.2.1.2.1 (LINEAR: pixels are integers, and the width counts both ends) and C.11.2.1.3."""
    function = function.strip().upper()
    if function not in _FUNCTIONS:
        raise UmedError(
            f"{path}: VOI LUT function is {function!r}. Allowed: {', '.join(_FUNCTIONS)}. "
            "Or choose a window in the recipe: image.window"
        )
    if function == "SIGMOID":
        return SigmoidView(centre, width)
    if function == "LINEAR_EXACT":
        return LinearView(centre - width / 2, centre + width / 2)
    half = max(width - 1, 0) / 2
    return LinearView(centre - 0.5 - half, centre - 0.5 + half)


def _identity(header: Any) -> Optional[View]:
    """8-bit values without a window are grey levels, unless a rescale changed them."""
    rescaled = _first(getattr(header, "RescaleSlope", None)) not in (None, 1.0)
    shifted = _first(getattr(header, "RescaleIntercept", None)) not in (None, 0.0)
    if rescaled or shifted or int(header.PixelRepresentation):
        return None
    return LinearView(0, 255)


def _table(item: Any, header: Any, is_signed: bool) -> tuple[int, np.ndarray, int]:
    """First value, entries as float32, and the largest possible entry of a modality or VOI table.

    Args:
        is_signed: the values that are looked up may be negative, and so may the first one of the table.
    """
    count, first, bits = (int(value) for value in item.LUTDescriptor)
    count = count or 2**16
    if not 1 <= bits <= 16:
        raise ValueError(f"a table of {bits} bits per entry")
    # In implicit VR the first value is read as unsigned.
    if first >= 2**15 and is_signed:
        first -= 2**16
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if header.original_encoding[1] else ">"
        entries = (
            np.frombuffer(data[: 2 * count], dtype=f"{order}u2")
            if len(data) >= 2 * count
            else np.frombuffer(data, "u1")
        )
    else:
        entries = np.atleast_1d(np.asarray(data))
    if len(entries) < count:
        raise ValueError(f"a table of {count} entries with data for {len(entries)}")
    return first, entries[:count].astype(np.float32), 2**bits - 1


def directions(header: FrameHeader) -> Optional[tuple[np.ndarray, np.ndarray]]:
    """Direction cosines along a row and down a column in the patient (x to the left, y to the back, z to the head), if stated."""
    cosines = getattr(header, "ImageOrientationPatient", None)
    if cosines is None or len(cosines) != 6:
        return None
    vectors = np.array([float(value) for value in cosines])
    if not np.isfinite(vectors).all() or not vectors[:3].any() or not vectors[3:].any():
        return None
    return vectors[:3], vectors[3:]


def pixel_size(header: FrameHeader) -> Optional[tuple[float, float]]:
    """Width and height of a pixel: its spacing in mm or, without one, the ratio of its sides. DICOM states rows first."""
    names = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
    for name in names:
        value = getattr(header, name, None)
        if value is not None and not isinstance(value, str) and len(value) == 2:
            height, width = (float(each) for each in value)
            if np.isfinite([width, height]).all() and width > 0 and height > 0:
                return width, height
    return None


def _first(value: Any) -> Optional[float]:
    """The first number of a DICOM element that may be missing, empty, one number or several."""
    if value is None or value == "":
        return None
    values = list(value) if hasattr(value, "__iter__") and not isinstance(value, str) else [value]
    return float(values[0]) if values else None
