"""A folder of DICOM files as one volume: its slices in the order in which they lie in the body."""

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
    """Name, size and time of change of a file, or of every file in a folder: what tells that an image is still the same.

    Raises:
        OSError: there is nothing.
    """
    if not os.path.isdir(path):
        status = os.stat(path)
        return [(os.path.basename(path), status.st_size, status.st_mtime_ns)]
    with os.scandir(path) as files:
        states = [(file.name, file.stat()) for file in files if file.is_file()]
    return sorted((name, status.st_size, status.st_mtime_ns) for name, status in states)


def series_files(folder: Path) -> tuple[Path, ...]:
    """The files of a series, ordered along the slices' normal: towards the patient's left, back or head.

    Files that are not DICOM, and DICOM files without an image, are passed over.

    Raises:
        UmedError: the folder holds no images, several series, or a file without a place.
    """
    return _series(folder, tuple(file_states(folder)))[0]


def series_flags(folder: Path) -> frozenset[Optional[str]]:
    """What the files of a series say of text burnt into their pixels (`burned_in_flag`).

    Raises:
        UmedError: as `series_files`.
    """
    return _series(folder, tuple(file_states(folder)))[1]


def burned_in_flag(header: Any) -> Optional[str]:
    """A header's BurnedInAnnotation, ``YES`` or ``NO`` where it keeps to the standard; None where it does not say."""
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
        raise UmedError(f"{folder}: holds no DICOM images. Allowed: the folder of one series, without folders in it.")
    counts = Counter(str(getattr(header, "SeriesInstanceUID", "no UID")) for header in headers.values())
    if len(counts) > 1:
        shown = ", ".join(f"{uid} ({count} images)" for uid, count in counts.most_common(_SHOWN))
        raise UmedError(f"{folder}: holds {len(counts)} series: {shown}. Put each into a folder of its own.")
    places = {path: _place(path, header) for path, header in headers.items()}
    kinds = {kind for kind, _ in places.values()}
    if len(kinds) > 1:
        raise UmedError(
            f"{folder}: some images have an ImagePositionPatient and others have none, so they have no order."
        )
    taken = Counter(place for _, place in places.values())
    twice = [place for place, count in taken.items() if count > 1]
    if twice:
        raise UmedError(
            f"{folder}: {len(twice)} places hold more than one image (the first: {twice[0]:g}). Is this a series over time? "
            "Put each pass into a folder of its own."
        )
    flags = frozenset(burned_in_flag(header) for header in headers.values())
    return tuple(sorted(places, key=lambda path: places[path][1])), flags


def _place(path: Path, header: Any) -> tuple[str, float]:
    """Millimetres along the normal or, where the file does not say, its number in the series."""
    with unreadable(path):
        cosines = getattr(header, "ImageOrientationPatient", None)
        position = getattr(header, "ImagePositionPatient", None)
        if cosines is not None and position is not None and len(cosines) == 6 and len(position) == 3:
            normal = np.cross([float(x) for x in cosines[:3]], [float(x) for x in cosines[3:]])
            # Whichever way rows and columns run, slices count in one direction of the patient.
            normal = normal * np.sign(normal[np.argmax(np.abs(normal))])
            return "position", round(float(np.dot(normal, [float(x) for x in position])), 3)
        number = getattr(header, "InstanceNumber", None)
        if number is None:
            raise UmedError(f"{path}: has neither ImagePositionPatient nor InstanceNumber, so its slice has no place.")
        return "number", float(number)
