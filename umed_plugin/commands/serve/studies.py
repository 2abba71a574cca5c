"""The uploaded images as a viewer shows them: series and files with their slices, planes and windows, and one slice as a picture.

`umed_plugin.data.images` reads everything, one slice at a time in the whole process. Nothing of a DICOM header is shown or
stored. Error messages of the libraries are replaced, because they may quote it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from umed_plugin.commands.serve.uploads import ALLOWED, Received
from umed_plugin.data.images import StoredSlice, load_image, read_stored, slice_count
from umed_plugin.data.images.dicom import open_header
from umed_plugin.data.images.nifti import volume_shape
from umed_plugin.data.images.raster import RASTER_ENDINGS
from umed_plugin.data.images.series import series_stack
from umed_plugin.data.images.stored import Limits, limited, unreadable
from umed_plugin.data.recipes.options import WINDOW_PRESETS
from umed_plugin.errors import UmedError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_VOXELS = 2**31
MOST_MEGAPIXELS = 16  # of one slice or picture: a mammogram has 14
_MOST_CACHED = 2**26
_MOST_ITEMS = 40_000  # an enhanced file has about 10 for each frame
# What the page says of a series; what the headers say stays out of it.
NO_STACK = (
    "not one stack of slices, so neighbours may not be neighbours in the body. The files have no positions, share positions, or "
    "differ in orientation, size or pixel spacing"
)
UNEVEN = "the distances between its slices differ: a slice may be missing"
PLANES = ("sagittal", "coronal", "axial")
_MIDDLE = 0.5


def limits_of(megapixels: int) -> Limits:
    """What one image of an upload may take. A slice needs about 12 bytes of memory for each pixel while it is read.

    Args:
        megapixels: of one slice or picture.
    """
    pixels = megapixels * 10**6
    return Limits(
        pixels,
        bytes=4 * pixels,
        inflated=9 * pixels // 4,  # 16 bits for each pixel, and a header
        cached=_MOST_CACHED,
        file=4 * pixels,
        items=_MOST_ITEMS,
    )


# One reader at a time: the readers cache the last volume between calls.
_reading = threading.Lock()


@dataclass(frozen=True)
class Plane:
    """A plane of a volume: the stored axis that its slices are across, its name, and the number of slices."""

    axis: int
    name: str
    slices: int


@dataclass(frozen=True)
class View:
    """One slice as it is shown: an item of the study, and the options that `load_image` reads it with."""

    item: int = 0
    axis: int = 2
    slice: int = 0
    volume: int = 0
    window: str = "file"


@dataclass(frozen=True)
class Item:
    """A series, a volume or a picture.

    Attributes:
        label: its name on the page.
        paths: one file, the folder of a series, or several files without slice positions, which ``slice`` indexes.
        planes: at least one; the first is the default.
        volumes: number of volumes of a 4-D file, else 1.
        windows: windows that make a difference, the first is the default; none for grey levels and colours.
    """

    label: str
    paths: tuple[Path, ...]
    planes: tuple[Plane, ...]
    volumes: int
    windows: tuple[str, ...]

    def reading(self, view: View) -> tuple[Path, dict[str, Any]]:
        """The file, and the arguments for `load_image`.

        Raises:
            UmedError: there is no such slice, plane, volume or window.
        """
        plane = next((plane for plane in self.planes if plane.axis == view.axis), None)
        if plane is None or not 0 <= view.slice < plane.slices or not 0 <= view.volume < self.volumes:
            raise UmedError(f"{self.label}: no such slice, plane or volume. Choose one that the page offers.")
        if view.window not in (self.windows or ("file",)):
            raise UmedError(f"{self.label}: no such window. Allowed: {', '.join(self.windows) or 'file'}.")
        if len(self.paths) > 1:
            return self.paths[view.slice], {"window": view.window}
        how = {"window": view.window, "slice": view.slice, "slice_axis": view.axis, "volume": view.volume}
        return self.paths[0], how


class Study:
    """The images of one upload.

    Args:
        folder: holds the files; each series is moved to a subfolder.
        files: the uploaded images.
        left_out: (name, reason) of files that were already left out.
        limits: what one image may take.

    Raises:
        UmedError: none of them can be shown.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[Received],
        left_out: Sequence[tuple[str, str]] = (),
        limits: Optional[Limits] = None,
    ) -> None:
        self._folder = folder
        self._limits = limits or limits_of(MOST_MEGAPIXELS)
        self._names = {file.path: file.name for file in files}
        self.left_out = list(left_out)
        self.items: list[Item] = []
        with _reading, limited(self._limits):
            for group in self._groups(files):
                self._add(group)
        if not self.items:
            raise UmedError(self._why_nothing())

    def picture(self, view: View) -> Image:
        """One slice in RGB, in radiological orientation.

        Raises:
            UmedError: the slice cannot be read, or the view does not exist.
        """
        from PIL import Image

        if not 0 <= view.item < len(self.items):
            raise UmedError("There is no such image in this upload. Choose one that the page offers.")
        item = self.items[view.item]
        path, how = item.reading(view)
        with _reading, limited(self._limits):
            try:
                return Image.fromarray(load_image(path, **how)[0])
            except UmedError as error:
                raise UmedError(self._message(error, item.label)) from error

    def described(self) -> dict[str, Any]:
        """The study as JSON for the page."""
        items = [
            {
                "label": item.label,
                "planes": [vars(plane) for plane in item.planes],
                "volumes": item.volumes,
                "windows": item.windows,
            }
            for item in self.items
        ]
        return {"items": items, "left_out": [f"{name}: {why}" for name, why in self.left_out]}

    def _groups(self, files: Sequence[Received]) -> list[list[Path]]:
        """Group the slices of a series; every other image is a group of its own."""
        series: dict[str, list[Path]] = {}
        groups: list[list[Path]] = []
        for file in files:
            uid = self._series_of(file)
            group = series.get(uid) if uid else None
            if group is None:
                group = [file.path]
                groups.append(group)
                if uid:
                    series[uid] = group
            else:
                group.append(file.path)
        return groups

    def _series_of(self, file: Received) -> Optional[str]:
        """The series UID of a single-frame DICOM file; None for any other file."""
        if file.kind != "dicom":
            return None
        try:
            with unreadable(file.path):
                header = open_header(file.path, pixels=False)
                if int(getattr(header, "NumberOfFrames", None) or 1) > 1 or not getattr(header, "Rows", None):
                    return None
                return str(getattr(header, "SeriesInstanceUID", None) or "") or None
        except UmedError:
            return None  # `_add` hits the same error and reports it

    def _add(self, group: list[Path]) -> None:
        try:
            if len(group) > 1:
                self.items.append(self._series(group))
            else:
                self.items.append(self._single(group[0]))
        except UmedError as error:
            name = self._names[group[0]]
            self.left_out.append((name, self._message(error, name).removeprefix(f"{name}: ")))

    def _single(self, path: Path) -> Item:
        if path.name.endswith((".nii", ".nii.gz")):
            return self._volume(path)
        count = slice_count(path)
        windows = _windows(_middle_slice(path, count))
        if path.name.endswith(RASTER_ENDINGS):
            windows = windows[:1]  # 16-bit values without a unit: Hounsfield presets do not apply
        return Item(self._names[path], (path,), (Plane(2, "", count),), 1, windows)

    def _volume(self, path: Path) -> Item:
        x, y, z, volumes = volume_shape(path)
        if x * y * z > MOST_VOXELS:
            raise UmedError(f"{path}: {x} x {y} x {z} voxels are too many to show. Allowed: up to {MOST_VOXELS}.")
        stored = _middle_slice(path, z, volume=0)
        names = _plane_names(stored)
        planes = [Plane(axis, name, count) for axis, name, count in zip(range(3), names, (x, y, z))]
        # The recipes' default plane comes first. A flat image has no other.
        chosen = (planes[2], *planes[:2]) if z > 1 else (planes[2],)
        return Item(self._names[path], (path,), chosen, volumes, _windows(stored))

    def _series(self, group: list[Path]) -> Item:
        number = sum(len(item.paths) > 1 or item.paths[0].is_dir() for item in self.items) + 1
        folder = self._folder / f"series-{number}"
        folder.mkdir()
        for path in group:
            self._names[path.rename(folder / path.name)] = self._names.pop(path)
        label = f"series {number} ({len(group)} slices)"
        self._names[group[0]] = label  # `_add` needs it if the series cannot be shown
        try:
            stack = series_stack(folder)
        except UmedError:
            return self._unordered(folder, label)
        if len(stack.files) < len(group):
            label = f"series {number} ({len(stack.files)} slices)"
            kept = set(stack.files)
            others = [self._names[path] for path in sorted(folder.iterdir()) if path not in kept]
            self.left_out.append((label, f"no slices of it (a scout, a report or a second copy): {', '.join(others)}"))
        self.left_out += [(label, UNEVEN) for remark in stack.remarks if "uneven" in remark.kind]
        first = read_stored(folder, slice=int(len(stack.files) * _MIDDLE))
        return Item(label, (folder,), (Plane(2, "", len(stack.files)),), 1, _windows(first))

    def _unordered(self, folder: Path, label: str) -> Item:
        """The files of a series that `series_stack` refuses, by name; the page says that their order may not be anatomical."""
        paths = tuple(sorted(folder.iterdir(), key=lambda path: self._names[path]))
        label += ", sorted by file name: no slice positions"
        self.left_out.append((label, NO_STACK))
        first = read_stored(paths[int(len(paths) * _MIDDLE)])
        return Item(label, paths, (Plane(2, "", len(paths)),), 1, _windows(first))

    def _message(self, error: UmedError, name: str) -> str:
        """The error for the user, with the uploaded file's name and without library messages, which may quote the header."""
        if error.__cause__ is not None:
            return f"{name}: cannot be read as an image. It is damaged, truncated, or in an unsupported format."
        text = str(error)
        for path in (*self._names, self._folder):
            text = text.replace(str(path), name)
        return text

    def _why_nothing(self) -> str:
        if not self.left_out:
            return f"There is no image in this upload. Allowed: {ALLOWED}."
        shown = " ".join(f"{name}: {why}" for name, why in self.left_out[:3])
        more = len(self.left_out) - 3
        return shown + (f" And {more} more files could not be shown." if more > 0 else "")


def _middle_slice(path: Path, count: int, volume: Optional[int] = None) -> StoredSlice:
    return read_stored(path, slice=int(count * _MIDDLE) if count > 1 else None, volume=volume)


def _windows(stored: StoredSlice) -> tuple[str, ...]:
    """The windows that apply to a slice: the file's own, the full range, and Hounsfield presets."""
    if stored.is_grey_levels:
        return ()
    try:
        own = ("file",) if stored.view() is not None else ()
    except UmedError:
        own = ()
    presets = tuple(WINDOW_PRESETS) if stored.hounsfield else ()
    return (*own, "full", *presets)


def _plane_names(stored: StoredSlice) -> tuple[str, str, str]:
    """The plane names of slices across each stored axis, from the directions of the first two axes."""
    if stored.directions is None:
        return ("along x", "along y", "along z")
    first, second = stored.directions
    across = (first, second, np.cross(first, second))
    names = [PLANES[int(np.argmax(np.abs(direction)))] for direction in across]
    return (names[0], names[1], names[2])
