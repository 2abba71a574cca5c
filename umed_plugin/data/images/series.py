"""A folder of DICOM files as one stack of slices, in anatomical order.

A wrong member shifts the number of every slice after it, and with it every box. So all files must have one series UID,
orientation, size and spacing. What is certainly no slice (a scout, a dose report, a screenshot, a second copy) is left out and
said. A file that may be a damaged slice, two images at one position, or two stacks in one folder are refused.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from umed_plugin.data.images.dicom import frame_count_of
from umed_plugin.data.images.series_folder import check_sub_folders, file_states, image_headers
from umed_plugin.data.images.stored import Remark, unreadable
from umed_plugin.errors import UmedError

_SHOWN = 3
_NO_SLICE_TYPES = ("LOCALIZER", "SCREEN SAVE", "SCREENSAVE", "SCOUT")
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# Components of unit vectors, mm of a position, and the share by which distances between slices may differ.
_SAME_DIRECTION, _SAME_SPACING, _SAME_POSITION, _SAME_DISTANCE = 5e-3, 1e-2, 1e-2, 0.1


@dataclass(frozen=True)
class Stack:
    """The slices of a folder.

    Attributes:
        files: towards the patient's left, back or head.
        flags: what they say about text burnt into their pixels (`burned_in_flag`).
        remarks: what was left out, and whether slices may be missing.
    """

    files: tuple[Path, ...]
    flags: frozenset[Optional[str]]
    remarks: tuple[Remark, ...]


def series_files(folder: Path) -> tuple[Path, ...]:
    """The files of a series in the order of their positions along the slice normal: towards the patient's left, back or head.

    Raises:
        UmedError: the folder is not one stack of slices (`series_stack`).
    """
    return series_stack(folder).files


def series_flags(folder: Path) -> frozenset[Optional[str]]:
    """What the files of a series say about text burnt into their pixels (`burned_in_flag`).

    Raises:
        UmedError: as `series_files`.
    """
    return series_stack(folder).flags


def series_stack(folder: Path) -> Stack:
    """The slices of a folder, and what was left out.

    Raises:
        UmedError: the folder has no images, several series or stacks, a damaged file, or images whose order is unknown.
    """
    return _stack(folder, tuple(file_states(folder)))


def burned_in_flag(header: Any) -> Optional[str]:
    """A header's BurnedInAnnotation, ``YES`` or ``NO`` in files that follow the standard; None if it says nothing."""
    return str(getattr(header, "BurnedInAnnotation", None) or "").strip().upper() or None


@functools.lru_cache(maxsize=64)
def _stack(folder: Path, states: tuple[tuple[str, int, int], ...]) -> Stack:
    left_out: dict[str, list[str]] = defaultdict(list)
    headers = image_headers(folder, states, left_out)
    _leave_out_copies(headers, left_out)
    _leave_out_other_pictures(headers, left_out)
    if not headers:
        raise UmedError(f"{folder}: has no DICOM images. Allowed: the folder of one series, without subfolders.")
    _check_one_stack(folder, headers)
    check_sub_folders(folder, states, headers, left_out)
    positions = _positions(folder, headers)
    files = tuple(sorted(positions, key=lambda path: positions[path]))
    unit = " mm" if all(_has_position(header) for header in headers.values()) else ""
    remarks = [
        Remark(f"are of series folders from which {reason} were left out", _some(names))
        for reason, names in left_out.items()
    ]
    remarks += _uneven([positions[file] for file in files], unit)
    return Stack(files, frozenset(burned_in_flag(header) for header in headers.values()), tuple(remarks))


def _leave_out_copies(headers: dict[Path, Any], left_out: dict[str, list[str]]) -> None:
    """Keep the first of several files of one instance, if they have the same size."""
    seen: set[tuple[str, int]] = set()
    for path, header in list(headers.items()):
        uid = str(getattr(header, "SOPInstanceUID", None) or "")
        key = (uid, path.stat().st_size)
        if uid and key in seen:
            left_out["second copies"].append(path.name)
            del headers[path]
        seen.add(key)


def _leave_out_other_pictures(headers: dict[Path, Any], left_out: dict[str, list[str]]) -> None:
    """Leave out scouts and screenshots, unless the folder holds nothing else."""
    others = {path for path, header in headers.items() if _is_other_picture(header)}
    if len(others) == len(headers):
        return
    for path in sorted(others):
        left_out["scouts, reports or screenshots"].append(path.name)
        del headers[path]


def _is_other_picture(header: Any) -> bool:
    words = [str(word).strip().upper() for word in getattr(header, "ImageType", None) or []]
    kind = str(getattr(header, "SOPClassUID", ""))
    is_capture = kind.startswith(_SECONDARY_CAPTURE) and not _has_position(header)
    return is_capture or any(word in _NO_SLICE_TYPES for word in words)


def _check_one_stack(folder: Path, headers: Mapping[Path, Any]) -> None:
    series = Counter(str(getattr(header, "SeriesInstanceUID", "no UID")) for header in headers.values())
    if len(series) > 1:
        shown = ", ".join(f"{uid} ({count} images)" for uid, count in series.most_common(_SHOWN))
        raise UmedError(f"{folder}: has {len(series)} series: {shown}. Put each series into its own folder.")
    for path, header in headers.items():
        if frame_count_of(header) > 1:
            raise UmedError(
                f"{path}: has {frame_count_of(header)} frames, but a file of a series folder is one slice. Name multi-frame "
                "files themselves in the annotations."
            )
    shared: dict[str, dict[Path, Optional[tuple[float, ...]]]] = {
        "orientations": {path: _orientation(path, header) for path, header in headers.items()},
        "image sizes": {path: (float(header.Columns), float(header.Rows)) for path, header in headers.items()},
        "pixel spacings": {path: _spacing(path, header) for path, header in headers.items()},
    }
    for what, facts in shared.items():
        groups = _alike(facts, _SAME_DIRECTION if what == "orientations" else _SAME_SPACING)
        if len(groups) > 1:
            shown = "; ".join(
                f"{_text(facts[group[0]])} in {len(group)} ({group[0].name})" for group in groups[:_SHOWN]
            )
            raise UmedError(
                f"{folder}: is not one stack of slices. It has {len(groups)} {what}: {shown}. Put each stack into its own "
                "folder, and remove scouts and reports."
            )


def _alike(facts: Mapping[Path, Optional[tuple[float, ...]]], tolerance: float) -> list[list[Path]]:
    """The files in groups of the same values, the largest first."""
    groups: list[list[Path]] = []
    for path, values in facts.items():
        for group in groups:
            first = facts[group[0]]
            if values == first or (values and first and np.allclose(values, first, rtol=tolerance, atol=tolerance)):
                group.append(path)
                break
        else:
            groups.append([path])
    return sorted(groups, key=len, reverse=True)


def _text(values: Optional[tuple[float, ...]]) -> str:
    return "none" if values is None else "\\".join(f"{value:.4g}" for value in values)


def _numbers(path: Path, header: Any, name: str, count: int) -> Optional[tuple[float, ...]]:
    value = getattr(header, name, None)
    if value is None or isinstance(value, str) or len(value) != count:
        return None
    with unreadable(path):
        numbers = tuple(float(each) for each in value)
        if not np.isfinite(numbers).all():
            raise ValueError(f"{name} is {value}")
    return numbers


def _orientation(path: Path, header: Any) -> Optional[tuple[float, ...]]:
    return _numbers(path, header, "ImageOrientationPatient", 6)


def _spacing(path: Path, header: Any) -> Optional[tuple[float, ...]]:
    return _numbers(path, header, "PixelSpacing", 2)


def _has_position(header: Any) -> bool:
    return all(getattr(header, name, None) for name in ("ImagePositionPatient", "ImageOrientationPatient"))


def _positions(folder: Path, headers: Mapping[Path, Any]) -> dict[Path, float]:
    """Millimetres along the normal of the stack or, if no file has a position, instance numbers."""
    located = {_has_position(header) for header in headers.values()}
    if len(located) > 1:
        raise UmedError(
            f"{folder}: some images have an ImagePositionPatient and others have none, so they cannot be ordered."
        )
    positions = _along_normal(headers) if located == {True} else _instance_numbers(headers)
    order = sorted(positions, key=lambda path: positions[path])
    repeated = [
        second for first, second in zip(order, order[1:]) if abs(positions[second] - positions[first]) < _SAME_POSITION
    ]
    if repeated:
        raise UmedError(
            f"{folder}: {len(repeated)} positions have more than one image (the first: {positions[repeated[0]]:g}). Is this a "
            "series over time, or two acquisitions? Put each pass into its own folder."
        )
    return positions


def _along_normal(headers: Mapping[Path, Any]) -> dict[Path, float]:
    first_path, first = next(iter(headers.items()))
    cosines = _orientation(first_path, first)
    places = {path: _numbers(path, header, "ImagePositionPatient", 3) for path, header in headers.items()}
    bad = [path for path, place in places.items() if place is None]
    if cosines is None or bad:
        raise UmedError(f"{bad[0] if bad else first_path}: its position or orientation is not 3 and 6 numbers.")
    normal = np.cross(cosines[:3], cosines[3:])
    # The normal points in the same direction of the patient, whichever way rows and columns run.
    normal = normal * np.sign(normal[np.argmax(np.abs(normal))])
    return {path: round(float(np.dot(normal, place)), 3) for path, place in places.items() if place is not None}


def _instance_numbers(headers: Mapping[Path, Any]) -> dict[Path, float]:
    positions = {}
    for path, header in headers.items():
        with unreadable(path):
            number = getattr(header, "InstanceNumber", None)
            if number is None:
                raise UmedError(
                    f"{path}: has neither ImagePositionPatient nor InstanceNumber, so its slice has no position."
                )
            positions[path] = float(number)
    return positions


def _uneven(positions: Sequence[float], unit: str) -> list[Remark]:
    """A remark if the distances between slices differ: one is missing, or two acquisitions are mixed."""
    distances = np.diff(positions)
    if len(distances) < 2:
        return []
    usual = float(np.sort(distances)[(len(distances) - 1) // 2])
    odd = [i for i, distance in enumerate(distances) if abs(distance - usual) > _SAME_DISTANCE * usual]
    if not odd:
        return []
    kind = "are of series folders with uneven distances: if a slice is missing, all later ones have too low a number"
    return [Remark(kind, f"{_some_numbers(distances)}{unit}, uneven after slice {odd[0]}")]


def _some_numbers(distances: Iterable[float]) -> str:
    counts = Counter(round(float(distance), 2) for distance in distances)
    shown = ", ".join(f"{distance:g} ({count}x)" for distance, count in counts.most_common(_SHOWN))
    return shown + (", ..." if len(counts) > _SHOWN else "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
