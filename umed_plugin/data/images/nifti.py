"""One slice of a NIfTI volume (``.nii``, ``.nii.gz``), with its scaling and its directions.

Only the slice is scaled; volumes keep their stored data type. The first slice of a volume is read alone. At the second one the
whole volume is read and cached, because slices of one volume are usually read one after another. The cache holds one volume of at
most `stored.Limits.cached` bytes.
"""

from __future__ import annotations

import gzip
import logging
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import numpy as np

from umed_plugin.data.images.stored import StoredSlice, check_size, checked_index, limits, unreadable
from umed_plugin.errors import UmedError

# The highest compression ratio of deflate: a gzip file cannot hold more than this many times its size.
_MAX_RATIO = 1032
# What may lie between the header and the values. nibabel reads it whole, and a few compressed kilobytes may claim gigabytes.
_MAX_EXTENSIONS = 2**24


def read_nifti(path: Path, index: Optional[int], axis: int, volume: Optional[int]) -> StoredSlice:
    """Read one slice as it is stored: x along the first remaining array axis, y along the second.

    Args:
        path: the file.
        index: from 0 along ``axis``.
        axis: 0, 1 or 2, of the array as stored.
        volume: from 0, of a 4-D file.

    Raises:
        UmedError: the file is damaged, or holds something that cannot be shown.
    """
    with unreadable(path):
        image = _open(path)
        shape = _spatial_shape(image, path)
        index = checked_index(path, index, shape[axis], "slice")
        volume = checked_index(path, volume, shape[3], "volume", "image.volume")
        height, width = _plane_size(shape, axis)
        check_size(path, width, height, image.get_data_dtype().itemsize)
        plane = _plane(path, image, shape, axis, index, volume)
        affine = np.asarray(image.affine, dtype=float)
    if plane.dtype.fields is not None:
        rgb = np.stack([plane[name].T for name in ("R", "G", "B")], axis=2)
        return StoredSlice(rgb, _directions(affine, axis), is_grey_levels=True, pixel_size=_pixel_size(affine, axis))
    grey = np.ascontiguousarray(plane.T, dtype=np.float32)
    return StoredSlice(grey, _directions(affine, axis), pixel_size=_pixel_size(affine, axis))


def volume_shape(path: Path) -> tuple[int, int, int, int]:
    """Lengths of the three axes as stored, and the number of volumes."""
    with unreadable(path):
        return _spatial_shape(_open(path), path)


def _open(path: Path) -> Any:
    from monai.data import NibabelReader

    _check_extensions(path)
    with _named_in_logs(path):
        return NibabelReader(as_closest_canonical=False, squeeze_non_spatial_dims=False).read(path)


class _PathInMessages(logging.Filter):
    """Puts the path of the file that is read before each message of nibabel, which repairs headers and names no file."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        path = getattr(self.reading, "path", None)
        if path is not None:
            record.msg, record.args = f"{path}: {record.getMessage()}", ()
        return True


_path_in_messages = _PathInMessages()


@contextmanager
def _named_in_logs(path: Path) -> Iterator[None]:
    logging.getLogger("nibabel.global").addFilter(_path_in_messages)  # once: a filter that is there is not added again
    _path_in_messages.reading.path = path
    try:
        yield
    finally:
        _path_in_messages.reading.path = None


def _check_extensions(path: Path) -> None:
    """Check the lengths of the header's extensions before nibabel allocates memory for them."""
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        head = file.read(544)
        if len(head) < 352:
            return  # nibabel says what is wrong with it
        order = "<" if struct.unpack("<i", head[:4])[0] in (348, 540) else ">"
        is_second = struct.unpack(f"{order}i", head[:4])[0] == 540
        offset = (
            struct.unpack(f"{order}q", head[168:176])[0] if is_second else struct.unpack(f"{order}f", head[108:112])[0]
        )
        if not abs(offset) <= _MAX_EXTENSIONS:
            raise ValueError(f"its header says that the values begin at byte {offset:.0f}")
        place = 540 if is_second else 348
        begin = place + 4
        more, place = head[place : place + 1] != b"\0", file.seek(begin)
        while more and len(start := file.read(8)) == 8:
            length = struct.unpack(f"{order}i", start[:4])[0]
            if length < 8 or place + length - begin > _MAX_EXTENSIONS:
                raise ValueError(f"its header has extensions of {place + length - begin} bytes")
            place = file.seek(length - 8, 1)
            # nibabel reads to the end of the file where the offset makes no sense.
            more = place < offset or offset < begin


def _spatial_shape(image: Any, path: Path) -> tuple[int, int, int, int]:
    """x, y, z and the number of volumes, all at least 1; checks that the file is large enough for them."""
    shape = tuple(int(length) for length in image.shape)
    kind = image.get_data_dtype()
    is_rgb = kind.fields is not None and tuple(kind.fields) == ("R", "G", "B")
    odd = [length for length in shape[4:] if length != 1]
    if odd or not shape or min(shape) < 1 or kind.kind == "c" or not (kind.fields is None or is_rgb):
        raise UmedError(
            f"{path}: has an array of shape {shape}, type {kind}. Allowed: volumes of grey values or RGB, 3-D or several in 4-D. "
            "Extract the volume that you need with nibabel."
        )
    x, y, z, volumes = (*shape, 1, 1, 1)[:4]
    claimed = kind.itemsize * x * y * z * volumes
    capacity = path.stat().st_size * (_MAX_RATIO if path.name.lower().endswith(".gz") else 1)
    if claimed > capacity:
        raise ValueError(f"its header says {x} x {y} x {z} x {volumes} values of {kind}, more than the file can hold")
    return x, y, z, volumes


def _plane_size(shape: tuple[int, int, int, int], axis: int) -> tuple[int, int]:
    """Height and width of a slice."""
    width, height = (shape[other] for other in range(3) if other != axis)
    return height, width


class _Cache:
    """The volume that was read last, by name, and its values if it was read twice."""

    last: Optional[tuple[Any, ...]] = None
    name: Optional[tuple[Any, ...]] = None
    values: Optional[np.ndarray] = None


def _plane(path: Path, image: Any, shape: tuple[int, int, int, int], axis: int, index: int, volume: int) -> np.ndarray:
    """One slice, scaled, ``[first axis, second axis]``."""
    selection: list[Any] = [slice(None)] * 3
    selection[axis] = index
    status = path.stat()
    name = (str(path), status.st_size, status.st_mtime_ns, volume)
    if _Cache.name == name and _Cache.values is not None:
        return _scaled(_Cache.values[tuple(selection)], image)
    size = image.get_data_dtype().itemsize * shape[0] * shape[1] * shape[2]
    again, _Cache.last = _Cache.last == name, name
    # Along the first two axes, a slice is spread over the whole file: read the volume at once, or plane by plane.
    if size <= limits().cached and (again or axis != 2):
        _Cache.name = _Cache.values = None  # before the next volume is read, so that only one is in memory
        _Cache.values, _Cache.name = _unscaled(image, shape, (slice(None),) * 3, volume), name
        return _scaled(_Cache.values[tuple(selection)], image)
    if axis == 2:
        return _scaled(_unscaled(image, shape, tuple(selection), volume), image)
    lines = []
    for plane in range(shape[2]):
        values = _unscaled(image, shape, (slice(None), slice(None), plane), volume)
        lines.append(values[index].copy() if axis == 0 else values[:, index].copy())
    return _scaled(np.stack(lines, axis=1), image)


def _unscaled(image: Any, shape: tuple[int, int, int, int], selection: tuple[Any, ...], volume: int) -> np.ndarray:
    """Stored values of a selection of a volume; missing axes of the file count as axes of length 1."""
    from nibabel.arrayproxy import ArrayProxy

    stored = image.dataobj
    plain = ArrayProxy(stored.file_like, (shape, stored.dtype, stored.offset, 1.0, 0.0))
    return np.asarray(plain[(*selection, volume)])


def _scaled(values: np.ndarray, image: Any) -> np.ndarray:
    slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    if values.dtype.fields is not None or (slope == 1 and intercept == 0):
        return values
    scaled = values.astype(np.float64)
    scaled *= slope
    scaled += intercept
    return scaled


def _directions(affine: np.ndarray, axis: int) -> Optional[tuple[np.ndarray, np.ndarray]]:
    """Unit vectors along the two remaining axes; from RAS to LPS, the first two patient axes change sign."""
    vectors = affine[:3, :3] * np.array([[-1.0], [-1.0], [1.0]])
    lengths = np.linalg.norm(vectors, axis=0)
    if not np.isfinite(lengths).all() or not lengths.all():
        return None
    vectors = vectors / lengths
    first, second = (vectors[:, other] for other in range(3) if other != axis)
    return first, second


def _pixel_size(affine: np.ndarray, axis: int) -> Optional[tuple[float, float]]:
    """Width and height in mm of a pixel of a slice: the lengths of the affine's two remaining columns."""
    width, height = (float(np.linalg.norm(affine[:3, other])) for other in range(3) if other != axis)
    return (width, height) if np.isfinite([width, height]).all() and width > 0 and height > 0 else None
