"""One frame of a DICOM file, after its modality table or rescale, with its own window and its directions.

MONAI's reader opens the file, and pydicom decodes only the requested frame; `pixel_data` keeps the others on the disk. MONAI's
``get_data`` is not used: it decodes all frames, first converts the header with the pixels to JSON, and knows neither palettes nor
modality tables nor the functional groups in which enhanced multi-frame files keep their rescale, window and orientation.

Palettes go through `pydicom.pixels.apply_color_lut`. What the header says of unit, window and directions is in `frame_header`.

Compressed files need the same packages as in pydicom. RLE, JPEG Baseline and JPEG 2000 work with pydicom and Pillow alone.
Lossless JPEG, JPEG-LS, 12-bit JPEG and HTJ2K need ``pylibjpeg`` or ``gdcm``, which pydicom finds by itself.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import numpy as np

from umed_plugin.data.images.frame_header import FrameHeader, directions, in_its_unit, own_view, padding, pixel_size
from umed_plugin.data.images.pixel_data import check_items, deferral, drop_pixels, map_pixels, one_frame
from umed_plugin.data.images.stored import Remark, StoredSlice, check_size, checked_index, unreadable
from umed_plugin.errors import UmedError

_GREY = ("MONOCHROME1", "MONOCHROME2")
# pydicom converts these to RGB; for YBR_ICT and YBR_RCT, the JPEG 2000 decoder does.
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
# The highest compression ratio of RLE: two bytes of a run encode at most 128.
_MAX_RLE_RATIO = 64


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
        header = FrameHeader(header, index)
        about.update(directions=directions(header), pixel_size=pixel_size(header))
        if photometric not in _GREY:
            return StoredSlice(_eight_bit_rgb(values, header, photometric, path), is_grey_levels=True, **about)
        grey = values.astype(np.float32)
        grey[padding(values, header)] = np.nan
        del values
        return StoredSlice(
            in_its_unit(grey, header, path),
            view=lambda: own_view(header, path),
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
