"""DICOM files of any size in little memory: large elements stay on the disk, and only the pixels of one frame are read.

A few kilobytes in a zip, or in a deflated file, may hold a gigabyte of pixels or of private elements. pydicom leaves elements of
more than `_DEFERRED` bytes unread. Pixels without compression are then mapped, and of compressed ones one frame is read.
"""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path
from typing import IO, Any

from umed_plugin.data.images.stored import limits
from umed_plugin.errors import UmedError

_DEFERRED = 2**16  # bytes of an element that pydicom reads at once
_UNDEFINED = 0xFFFFFFFF  # length of compressed pixels
_ITEM = b"\xfe\xff\x00\xe0"
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_OFFSETS = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")


def deferral(path: Path) -> dict[str, Any]:
    """The arguments with which pydicom leaves large elements unread; none for a deflated file, which it inflates whole.

    Raises:
        UmedError: a deflated file inflates to more than `limits` allow.
    """
    from pydicom.filereader import _read_file_meta_info, read_preamble
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    with path.open("rb") as file:
        # As pydicom itself finds the deflated part, in files without a preamble too.
        read_preamble(file, force=True)
        meta = _read_file_meta_info(file)
        if getattr(meta, "TransferSyntaxUID", None) != DeflatedExplicitVRLittleEndian:
            return {"defer_size": _DEFERRED}
        _check_deflated(file, path)
    return {}


def _check_deflated(file: IO[bytes], path: Path) -> None:
    """Refuse a deflated file that inflates to more than any image needs, before pydicom inflates it whole."""
    most, inflater, size = limits().inflated, zlib.decompressobj(-zlib.MAX_WBITS), 0
    while (block := inflater.unconsumed_tail or file.read(2**16)) and not inflater.eof:
        size += len(inflater.decompress(block, 2**20))
        if size > most:
            raise UmedError(
                f"{path}: is deflated, and inflates to more than {most} bytes. Store it without compression."
            )


def check_items(path: Path) -> None:
    """Refuse a file with more items in its sequences than `limits` allow: pydicom makes an object of each.

    Raises:
        UmedError: it has more.
    """
    most = limits().items
    if most is None:
        return
    count, end = 0, b""
    with path.open("rb") as file:
        while piece := file.read(2**20):
            count += (end + piece).count(_ITEM)
            end = piece[-len(_ITEM) + 1 :]
            if count > most:
                raise UmedError(
                    f"{path}: has more than {most} items in its sequences. Store its frames in several files."
                )


def map_pixels(header: Any, path: Path) -> None:
    """Let uncompressed pixels that were not read be a view of the file, of which only the used part comes into memory."""
    for name in _PIXELS:
        raw = header.get_item(name, keep_deferred=True) if name in header else None
        if raw is None or not _is_unread(raw) or raw.length == _UNDEFINED:
            continue
        with path.open("rb") as file:
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header[raw.tag] = raw._replace(value=memoryview(whole)[raw.value_tell : raw.value_tell + raw.length])


def drop_pixels(header: Any) -> None:
    """Empty the element of the stored pixels, which have been decoded. Of a deflated file pydicom also keeps all it inflated."""
    for name in _PIXELS:
        if name in header:
            delattr(header, name)  # an assignment alone would read pixels that are still unread
            setattr(header, name, b"")
    header.buffer = None


def one_frame(header: Any, index: int, path: Path) -> tuple[Any, int]:
    """A header with this frame alone, and its index there, if the compressed pixels were not read.

    Raises:
        UmedError: the frame is larger than `limits` allow.
        ValueError: there is no such frame.
    """
    import copy

    from pydicom.encaps import encapsulate, get_frame

    raw = header.get_item("PixelData", keep_deferred=True) if "PixelData" in header else None
    if raw is None or not _is_unread(raw):
        return header, index
    offsets = tuple(header[name].value for name in _OFFSETS if name in header)
    count = int(getattr(header, "NumberOfFrames", None) or 1)
    with path.open("rb") as file:
        file.seek(raw.value_tell)
        source: Any = _Bounded(file, path, limits().bytes)
        frame = get_frame(
            source, index, number_of_frames=count, extended_offsets=offsets if len(offsets) == 2 else None
        )
    alone = copy.copy(header)
    for name in _OFFSETS:
        if name in alone:
            delattr(alone, name)
    alone.NumberOfFrames, alone.PixelData = 1, encapsulate([frame])
    return alone, 0


def _is_unread(element: Any) -> bool:
    return getattr(element, "value_tell", None) is not None and element.value is None and element.length > 0


class _Bounded:
    """A file of which one read gives at most so many bytes."""

    def __init__(self, file: IO[bytes], path: Path, most: int) -> None:
        self._file, self._path, self._most = file, path, most

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._most:
            raise UmedError(f"{self._path}: has a compressed frame of {size} bytes. Allowed: {self._most}.")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
