"""One frame of a DICOM file, after its modality table or rescale, with its own window and its directions.

MONAI's reader opens the file, and pydicom decodes only the requested frame; `pixel_data` keeps the others on the disk. MONAI's
``get_data`` is not used: it decodes all frames, first converts the header with the pixels to JSON, and knows neither palettes nor
modality tables nor the functional groups in which enhanced multi-frame files keep their rescale, window and orientation.

Palettes go through `pydicom.pixels.apply_color_lut`. Its three other functions were tried in place of the code below, and gave
other pixels or errors (tests of ``tests/data/test_dicom.py`` unless another file is named):

- ``apply_voi_lut`` computes the index in the entries' type, so an 8-bit table of over 256 entries wraps: ``test_voi_tables``.
- ``apply_modality_lut`` computes the index in the pixels' type, which overflows: ``test_modality_tables_extend_at_both_ends``. It
  also accepts slope 0: ``test_headers_that_make_no_sense_are_named``.
- ``apply_windowing`` returns the range of the stored values, not 0-1. It fails for width 0:
  ``test_dicom_without_window_shows_the_full_range`` in ``test_images.py``.

They also know neither functional groups nor padding as NaN, so they would need a merged header for each frame.

Compressed files need the same packages as in pydicom. RLE, JPEG Baseline and JPEG 2000 work with pydicom and Pillow alone.
Lossless JPEG, JPEG-LS, 12-bit JPEG and HTJ2K need ``pylibjpeg`` or ``gdcm``, which pydicom finds by itself.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import numpy as np

from umed_plugin.data.images.pixel_data import check_items, deferral, drop_pixels, map_pixels, one_frame
from umed_plugin.data.images.stored import Remark, StoredSlice, View, check_size, checked_index, unreadable
from umed_plugin.data.images.windows import LinearView, SigmoidView, TableView, look_up
from umed_plugin.errors import UmedError

_GREY = ("MONOCHROME1", "MONOCHROME2")
# pydicom converts these to RGB; for YBR_ICT and YBR_RCT, the JPEG 2000 decoder does.
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
# The highest compression ratio of RLE: two bytes of a run encode at most 128.
_MAX_RLE_RATIO = 64
_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


def read_dicom(path: Path, frame: Optional[int]) -> StoredSlice:
    """Read one frame as it is stored.

    Args:
        path: the file.
        frame: index from 0; None only for files with one frame.

    Raises:
        UmedError: the file is damaged, cannot be decoded with the installed packages, or holds something that cannot be shown.
    """
    if find_spec("pydicom.pixels") is None:
        raise UmedError(f"{path}: DICOM images need pydicom 3, which needs Python 3.10: pip install 'pydicom>=3'")
    with unreadable(path):
        header = open_header(path)
        photometric = _checked_photometric(header, path)
        frames = frame_count_of(header)
        index = checked_index(path, frame, frames, "frame")
        samples = int(getattr(header, "SamplesPerPixel", None) or 1)
        check_size(
            path,
            int(header.Columns),
            int(header.Rows),
            samples * max(int(getattr(header, "BitsAllocated", None) or 8) // 8, 1),
        )
        values = _decoded(header, index, path)
        drop_pixels(header)
        about: dict[str, Any] = {"remarks": _remarks(header, frames)}
        header = _Frame(header, index)
        about.update(directions=_directions(header), pixel_size=_pixel_size(header))
        if photometric not in _GREY:
            return StoredSlice(_eight_bit_rgb(values, header, photometric, path), is_grey_levels=True, **about)
        grey = values.astype(np.float32)
        grey[_padding(values, header)] = np.nan
        del values
        return StoredSlice(
            _in_its_unit(grey, header, path),
            view=lambda: _own_view(header, path),
            inverted=photometric == "MONOCHROME1",
            hounsfield=str(getattr(header, "Modality", None) or "CT") == "CT",
            **about,
        )


def frame_count(path: Path) -> int:
    """Number of frames of a DICOM file."""
    with unreadable(path):
        return frame_count_of(open_header(path, pixels=False))


def frame_count_of(header: Any) -> int:
    """Number of frames of an opened file."""
    return int(getattr(header, "NumberOfFrames", None) or 1)


def open_header(path: Path, *, pixels: bool = True) -> Any:
    """The file as a pydicom dataset, with or without its pixels.

    Files of old archives, without preamble and file meta information, are read in the encoding that pydicom detects.
    """
    from monai.data import PydicomReader
    from pydicom.misc import is_dicom

    check_items(path)
    # affine_lps_to_ras only affects the affine, which is not used: directions come from the header.
    reader = PydicomReader(swap_ij=False, affine_lps_to_ras=False)
    header = reader.read(path, force=not is_dicom(path), stop_before_pixels=not pixels, **deferral(path))
    map_pixels(header, path)
    if pixels and not any(name in header for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        kind = getattr(header.file_meta, "MediaStorageSOPClassUID", None)
        raise ValueError(f"there are no pixels in it{f', it is a {kind.name}' if kind else ''}")
    if not getattr(header.file_meta, "TransferSyntaxUID", None):
        header.file_meta.TransferSyntaxUID = _transfer_syntax(header)
    return header


def _transfer_syntax(header: Any) -> str:
    """The uncompressed transfer syntax of the header itself, for a file that does not state one."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    is_implicit, is_little = header.original_encoding
    if is_implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian


def _checked_photometric(header: Any, path: Path) -> str:
    photometric = str(getattr(header, "PhotometricInterpretation", "none")).strip()
    allowed = (*_GREY, *_COLOUR, "PALETTE COLOR")
    if photometric not in allowed:
        raise UmedError(
            f"{path}: photometric interpretation is {photometric}. Allowed: {', '.join(allowed)}. "
            "Convert the file, or export it as PNG."
        )
    samples = int(getattr(header, "SamplesPerPixel", None) or 1)
    if samples != (3 if photometric in _COLOUR else 1):
        raise UmedError(f"{path}: {samples} samples per pixel do not fit photometric interpretation {photometric}.")
    return photometric


def _decoded(header: Any, index: int, path: Path) -> np.ndarray:
    """``[rows, columns]`` or RGB ``[rows, columns, 3]`` of one frame, as stored values."""
    from pydicom.pixels import get_decoder, pixel_array
    from pydicom.uid import RLELossless

    decoder = get_decoder(header.file_meta.TransferSyntaxUID)
    if not decoder.is_available:
        raise UmedError(
            f"{path}: compressed as {decoder.UID.name}, for which no decoder is installed. Install one of these "
            f"({'; '.join(decoder.missing_dependencies)}), or convert the file."
        )
    if decoder.UID.is_encapsulated:
        header, index = one_frame(header, index, path)
    if RLELossless == decoder.UID:
        # pydicom would allocate the memory first and fill missing data with zeros.
        claimed = header.Rows * header.Columns * header.SamplesPerPixel * header.BitsAllocated // 8
        if claimed > _MAX_RLE_RATIO * len(header.PixelData):
            raise ValueError(f"its header says {claimed} bytes per frame, more than its pixel data can hold")
    if decoder.UID.is_encapsulated:
        _check_stream(header, index, path)
    elif _unused_low_bits(header) > 0:
        return _left_aligned(header, index)
    return np.asarray(pixel_array(header, index=index))


def _check_stream(header: Any, index: int, path: Path) -> None:
    """Refuse a compressed frame whose own size is another than the header's, and may be any."""
    import io

    from PIL import Image, UnidentifiedImageError
    from pydicom.encaps import get_frame

    frame = get_frame(header.PixelData, index, number_of_frames=frame_count_of(header))
    try:
        with Image.open(io.BytesIO(frame), formats=("JPEG", "JPEG2000")) as image:
            size = image.size
    except (UnidentifiedImageError, SyntaxError, OSError, ValueError):
        return  # another compression; its decoder compares the sizes
    if size != (int(header.Columns), int(header.Rows)):
        raise UmedError(
            f"{path}: its header says {header.Columns} x {header.Rows} pixels, and its compressed pixels {size[0]} x {size[1]}. "
            "Download the file again, or remove it from the annotations."
        )


def _unused_low_bits(header: Any) -> int:
    """Bits below the values of an integer image: 4 in files of old archives with 12 bits whose highest is 15 (PS3.5 8.1.1)."""
    names = ("BitsAllocated", "BitsStored", "HighBit")
    allocated, stored, high = (int(getattr(header, name, None) or 0) for name in names)
    if "PixelData" not in header or allocated not in (8, 16, 32):
        return 0
    return high + 1 - stored if 0 < stored <= high < allocated else 0


def _left_aligned(header: Any, index: int) -> np.ndarray:
    """Values that do not begin at the lowest bit. pydicom would keep the unused bits and cut off the highest ones."""
    import copy

    from pydicom.pixels import pixel_array

    allocated, stored, high = int(header.BitsAllocated), int(header.BitsStored), int(header.HighBit)
    whole = copy.copy(header)
    whole.BitsStored, whole.HighBit = allocated, allocated - 1
    values = np.asarray(pixel_array(whole, index=index))
    low = (1 << (high + 1 - stored)) - 1
    if (values & low).any() and not (values >> stored).any():
        # The header is wrong: the values begin at the lowest bit and leave the highest ones unused.
        return values
    # Shifts of the values' own type: arithmetic for signed ones.
    return (values << (allocated - 1 - high)) >> (allocated - stored)


class _Frame:
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


def _remarks(header: Any, frames: int) -> tuple[Remark, ...]:
    found = []
    if "MOSAIC" in [str(word).upper() for word in getattr(header, "ImageType", None) or []]:
        found.append(Remark("are Siemens mosaics: many slices in one picture, which is shown as a whole"))
    each = getattr(header, "PerFrameFunctionalGroupsSequence", None) or []
    stacks = {
        str(getattr((getattr(group, "FrameContentSequence", None) or [None])[0], "StackID", None)) for group in each
    }
    if frames > 1 and len(stacks) > 1:
        found.append(Remark("are multi-frame files with several stacks. Frames are counted in the order of the file"))
    return tuple(found)


def _eight_bit_rgb(values: np.ndarray, header: Any, photometric: str, path: Path) -> np.ndarray:
    """uint8 ``[rows, columns, 3]``."""
    if photometric == "PALETTE COLOR":
        values = _from_palette(values, header, path)
        maximum = np.iinfo(values.dtype).max
    else:
        maximum = 2 ** int(header.BitsStored) - 1
    if maximum == 255:
        return values.astype(np.uint8, copy=False)
    return np.rint(np.clip(values / maximum, 0, 1) * 255).astype(np.uint8)


def _from_palette(values: np.ndarray, header: Any, path: Path) -> np.ndarray:
    from pydicom.pixels import apply_color_lut

    entries, _, bits = header.RedPaletteColorLookupTableDescriptor
    size = len(getattr(header, "RedPaletteColorLookupTableData", b"")) * 8 // (entries or 2**16)
    if 8 in (bits, size) and not 0 < entries <= 256:
        # pydicom indexes such a table with 8-bit integers, which wrap.
        raise UmedError(f"{path}: a palette of {entries or 2**16} entries of 8 bits. Allowed: 1 to 256, or 16 bits.")
    rgb = np.asarray(apply_color_lut(values, header.whole))[..., :3]
    # 8-bit entries stored in 16 bits fill the lower byte or, multiplied by 257, both bytes.
    return rgb.astype(np.uint8) if bits == 8 and rgb.max() < 256 else rgb


def _padding(values: np.ndarray, header: Any) -> np.ndarray:
    """True where the pixels are padding, not measurements."""
    first = getattr(header, "PixelPaddingValue", None)
    if first is None:
        return np.zeros(values.shape, dtype=bool)
    last = getattr(header, "PixelPaddingRangeLimit", None)
    low, high = sorted((int(first), int(first if last is None else last)))
    padded = (values >= low) & (values <= high)
    # If every pixel were padding, the element must be wrong.
    return padded & ~padded.all()


def _in_its_unit(values: np.ndarray, header: Any, path: Path) -> np.ndarray:
    """Values after the modality table or rescale (DICOM PS3.3 C.11.1); padding stays NaN."""
    part = header.part_with("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept")
    tables = getattr(part, "ModalityLUTSequence", None)
    if tables:
        first, entries, _ = _table(tables[0], header)
        return look_up(values, first, entries)
    slope = _first(getattr(part, "RescaleSlope", None))
    intercept = _first(getattr(part, "RescaleIntercept", None))
    slope, intercept = 1.0 if slope is None else slope, 0.0 if intercept is None else intercept
    if not (np.isfinite(slope) and np.isfinite(intercept) and slope):
        raise UmedError(
            f"{path}: rescale slope is {slope:g} and intercept {intercept:g}. Needed: numbers, slope not 0."
        )
    if slope == 1 and intercept == 0:
        return values
    values *= np.float32(slope)
    values += np.float32(intercept)
    return values


def _own_view(header: Any, path: Path) -> Optional[View]:
    """The first VOI table or, without one, the first window: the default if a file has several. None if it has none."""
    with unreadable(path):
        part = header.part_with("VOILUTSequence", "WindowCenter", "WindowWidth")
        tables = getattr(part, "VOILUTSequence", None)
        if tables:
            return TableView(*_table(tables[0], header))
        centre, width = (_first(getattr(part, name, None)) for name in ("WindowCenter", "WindowWidth"))
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


def _table(item: Any, header: Any) -> tuple[int, np.ndarray, int]:
    """First value, entries as float32, and the largest possible entry of a modality or VOI table."""
    count, first, bits = (int(value) for value in item.LUTDescriptor)
    count = count or 2**16
    if not 1 <= bits <= 16:
        raise ValueError(f"a table of {bits} bits per entry")
    # In implicit VR the first value is read as unsigned, but it has the sign of the pixels.
    if first >= 2**15 and int(getattr(header, "PixelRepresentation", 0)):
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


def _directions(header: Any) -> Optional[tuple[np.ndarray, np.ndarray]]:
    cosines = getattr(header, "ImageOrientationPatient", None)
    if cosines is None or len(cosines) != 6:
        return None
    vectors = np.array([float(value) for value in cosines])
    if not np.isfinite(vectors).all() or not vectors[:3].any() or not vectors[3:].any():
        return None
    return vectors[:3], vectors[3:]


def _pixel_size(header: Any) -> Optional[tuple[float, float]]:
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
