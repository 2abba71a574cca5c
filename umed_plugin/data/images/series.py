"""A folder of DICOM files as one volume, with its slices in anatomical order."""

from __future__ import annotations

import functools
import os
from collections import Counter
from pathlib import Path
from typing import Any, Optional

import numpy as np

from umed_plugin.data.images.dicom import open_header
from umed_plugin.data.images.stored import unreadable
from umed_plugin.errors import UmedError

_SHOWN = 3


def file_states(path: str | Path) -> list[tuple[str, int, int]]:
    """Name, size in bytes and modification time in ns of a file, or of every file in a folder. Changes if the image does.

    Raises:
        OSError: the path does not exist.
    """
    if not os.path.isdir(path):
        status = os.stat(path)
        return [(os.path.basename(path), status.st_size, status.st_mtime_ns)]
    with os.scandir(path) as files:
        states = [(file.name, file.stat()) for file in files if file.is_file()]
    return sorted((name, status.st_size, status.st_mtime_ns) for name, status in states)


def series_files(folder: Path) -> tuple[Path, ...]:
    """The files of a series in the order of their positions along the slice normal: towards the patient's left, back or head.

    Files that are not DICOM, and DICOM files without an image, are ignored.

    Raises:
        UmedError: the folder has no images, several series, or a file without a position.
    """
    return _series(folder, tuple(file_states(folder)))[0]


def series_flags(folder: Path) -> frozenset[Optional[str]]:
    """What the files of a series say about text burnt into their pixels (`burned_in_flag`).

    Raises:
        UmedError: as `series_files`.
    """
    return _series(folder, tuple(file_states(folder)))[1]


def burned_in_flag(header: Any) -> Optional[str]:
    """A header's BurnedInAnnotation, ``YES`` or ``NO`` in files that follow the standard; None if it says nothing."""
    return str(getattr(header, "BurnedInAnnotation", None) or "").strip().upper() or None


@functools.lru_cache(maxsize=64)
def _series(
    folder: Path, states: tuple[tuple[str, int, int], ...]
) -> tuple[tuple[Path, ...], frozenset[Optional[str]]]:
    from pydicom.misc import is_dicom

    headers: dict[Path, Any] = {}
    for name, _, _ in states:
        path = folder / name
        with unreadable(path):
            if is_dicom(path):
                header = open_header(path, pixels=False)
                if getattr(header, "Rows", None):
                    headers[path] = header
    if not headers:
        raise UmedError(f"{folder}: has no DICOM images. Allowed: the folder of one series, without subfolders.")
    counts = Counter(str(getattr(header, "SeriesInstanceUID", "no UID")) for header in headers.values())
    if len(counts) > 1:
        shown = ", ".join(f"{uid} ({count} images)" for uid, count in counts.most_common(_SHOWN))
        raise UmedError(f"{folder}: has {len(counts)} series: {shown}. Put each series into its own folder.")
    positions = {path: _position(path, header) for path, header in headers.items()}
    kinds = {kind for kind, _ in positions.values()}
    if len(kinds) > 1:
        raise UmedError(
            f"{folder}: some images have an ImagePositionPatient and others have none, so they cannot be ordered."
        )
    images_at = Counter(position for _, position in positions.values())
    repeated = [position for position, count in images_at.items() if count > 1]
    if repeated:
        raise UmedError(
            f"{folder}: {len(repeated)} positions have more than one image (the first: {repeated[0]:g}). Is this a series over "
            "time? Put each pass into its own folder."
        )
    flags = frozenset(burned_in_flag(header) for header in headers.values())
    return tuple(sorted(positions, key=lambda path: positions[path][1])), flags


def _position(path: Path, header: Any) -> tuple[str, float]:
    """What the position is, and its value: mm along the slice normal or, if the file has none, the instance number."""
    with unreadable(path):
        cosines = getattr(header, "ImageOrientationPatient", None)
        position = getattr(header, "ImagePositionPatient", None)
        if cosines is not None and position is not None and len(cosines) == 6 and len(position) == 3:
            normal = np.cross([float(x) for x in cosines[:3]], [float(x) for x in cosines[3:]])
            # The normal points in the same direction of the patient, whichever way rows and columns run.
            normal = normal * np.sign(normal[np.argmax(np.abs(normal))])
            return "position", round(float(np.dot(normal, [float(x) for x in position])), 3)
        number = getattr(header, "InstanceNumber", None)
        if number is None:
            raise UmedError(
                f"{path}: has neither ImagePositionPatient nor InstanceNumber, so its slice has no position."
            )
        return "number", float(number)
