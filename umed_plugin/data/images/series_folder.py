"""What lies in the folder of a series: headers of its images, other files, and slices that are elsewhere or not there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from umed_plugin.data.images.dicom import open_header
from umed_plugin.data.images.stored import unreadable
from umed_plugin.data.places import folders_below, not_fetched
from umed_plugin.errors import UmedError

# Files that archives and systems put beside the slices, by ending or name, in lower case.
_OTHER_ENDINGS = (
    ".txt",
    ".csv",
    ".tsv",
    ".json",
    ".xml",
    ".html",
    ".htm",
    ".md",
    ".pdf",
    ".log",
    ".yaml",
    ".yml",
    ".xlsx",
)
_OTHER_NAMES = ("dicomdir", "thumbs.db", "desktop.ini", "readme", "license", "licence", "version", "lockfile")


def file_states(path: str | Path) -> list[tuple[str, int, int]]:
    """Name, size in bytes and modification time in ns of a file, or of every file in a folder. Changes if the image does.

    A sub folder counts with a slash behind its name and size 0, and a link that leads nowhere as the link itself.

    Raises:
        OSError: the path does not exist.
    """
    if not os.path.isdir(path):
        status = os.stat(path)
        return [(os.path.basename(path), status.st_size, status.st_mtime_ns)]
    with os.scandir(path) as files:
        states = [_state(file) for file in files if _counts(file)]
    return sorted(states)


def _counts(entry: os.DirEntry[str]) -> bool:
    """True for files, links that lead nowhere, and folders that are not hidden."""
    if entry.is_dir():
        return not entry.name.startswith(".")
    return entry.is_file() or not_fetched(entry.path) is not None


def _state(entry: os.DirEntry[str]) -> tuple[str, int, int]:
    if entry.is_dir():
        return f"{entry.name}/", 0, entry.stat().st_mtime_ns
    status = entry.stat(follow_symlinks=not_fetched(entry.path) is None)
    return entry.name, status.st_size, status.st_mtime_ns


def image_headers(
    folder: Path, states: Sequence[tuple[str, int, int]], left_out: dict[str, list[str]]
) -> dict[Path, Any]:
    """The header of every image; whatever else is in the folder is left out or refused."""
    headers: dict[Path, Any] = {}
    damaged = []
    slices = [(name, size) for name, size, _ in states if not name.endswith("/")]
    _check_fetched([folder / name for name, _ in slices if not _is_other_file(name)], folder)
    for name, size in slices:
        path = folder / name
        if _is_other_file(name) or (_is_unlike_dicom(path) and size):
            left_out["files of other kinds"].append(name)
            continue
        try:
            with unreadable(path):
                if size == 0:
                    raise ValueError("empty file")
                header = open_header(path, pixels=False)
                if not getattr(header, "Rows", None) and not _is_another_object(header):
                    raise ValueError("it has no image")
        except UmedError as fault:
            damaged.append((name, size, fault))
            continue
        if getattr(header, "Rows", None):
            headers[path] = header
        else:
            left_out["DICOM objects without an image"].append(name)
    if damaged:
        name, size, cause = damaged[0]
        raise UmedError(
            f"{folder}: {len(damaged)} files cannot be read as DICOM, so slices may be missing (the first: {name}, {size} "
            "bytes). Download the series again, or remove the files if they are not slices."
        ) from cause
    return headers


def _check_fetched(paths: Iterable[Path], folder: Path) -> None:
    """Refuse links to files that are not there: each may be a slice."""
    said = [f"{path.relative_to(folder)} {text}" for path in paths if (text := not_fetched(path)) is not None]
    if said:
        raise UmedError(
            f"{folder}: {len(said)} of its files are not there, so slices may be missing. The first: {said[0]}."
        )


def check_sub_folders(
    folder: Path,
    states: Sequence[tuple[str, int, int]],
    headers: Mapping[Path, Any],
    left_out: dict[str, list[str]],
) -> None:
    """Refuse a slice of the series that lies in a sub folder; other DICOM files there are left out."""
    names = [name for name, _, _ in states if name.endswith("/")]
    paths = [path for name in names for below in folders_below(folder / name) for path in sorted(below.iterdir())]
    paths = [path for path in paths if not path.is_dir() and not _is_other_file(path.name)]
    _check_fetched((path for path in paths if _is_named_like_dicom(path)), folder)
    series = {str(getattr(header, "SeriesInstanceUID", "")) for header in headers.values()}
    inside = []
    for path in paths:
        if not path.is_file() or _is_unlike_dicom(path):
            continue
        uid = _series_of(path)
        if uid in series:
            inside.append(path)
        elif uid is not None:
            left_out["DICOM files in sub folders"].append(str(path.relative_to(folder)))
    if inside:
        raise UmedError(
            f"{folder}: {len(inside)} DICOM files of the same series are in sub folders, so slices may be missing. The first: "
            f"{inside[0].relative_to(folder)}. Move them into the folder, or remove them if they are not slices."
        )


def _series_of(path: Path) -> Optional[str]:
    """The SeriesInstanceUID of a DICOM file, empty if it names none; None for a file that is not DICOM."""
    from pydicom import dcmread

    try:
        return str(
            dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"]).get("SeriesInstanceUID", "")
        )
    # What is damaged in a sub folder is no slice of this folder.
    except Exception:  # noqa: BLE001
        return None


def _is_other_file(name: str) -> bool:
    lower = name.lower()
    return lower.startswith(".") or lower.endswith(_OTHER_ENDINGS) or os.path.splitext(lower)[0] in _OTHER_NAMES


def _is_unlike_dicom(path: Path) -> bool:
    """True for a file that has neither DICOM's preamble nor a name that slices have: no ending, a number, .dcm, .dicom, .ima."""
    from pydicom.misc import is_dicom

    return not _is_named_like_dicom(path) and not is_dicom(path)


def _is_named_like_dicom(path: Path) -> bool:
    ending = path.suffix.lower()
    return ending in ("", ".dcm", ".dicom", ".ima", ".img") or ending[1:].isdigit()


def _is_another_object(header: Any) -> bool:
    """True for a DICOM object that says of itself that it is something else than an image, such as a report."""
    from pydicom.uid import UID

    kind = getattr(header, "SOPClassUID", None) or getattr(header.file_meta, "MediaStorageSOPClassUID", None)
    name = UID(str(kind or "")).name.lower()  # the UID itself if it is not of the standard
    return "storage" in name and "image storage" not in name
