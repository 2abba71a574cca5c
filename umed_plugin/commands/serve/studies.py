"""The uploaded images as a viewer shows them: series and files, each with its planes and windows, and one slice as a picture.

`umed_plugin.data.images` reads everything, one slice at a time in the whole process. Nothing of a DICOM header is shown or
stored. Error messages of the libraries are replaced, because they may quote it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from umed_plugin.commands.serve.uploads import ALLOWED, Received
from umed_plugin.commands.serve.views import Item, Plane, View, edges_of, plane_edges, plane_names, says_ct, windows_of
from umed_plugin.data.endings import RASTER_ENDINGS
from umed_plugin.data.images import StoredSlice, load_image, read_stored, slice_count
from umed_plugin.data.images.dicom import open_header
from umed_plugin.data.images.nifti import volume_shape
from umed_plugin.data.images.series import series_stack
from umed_plugin.data.images.stored import Limits, limited, unreadable
from umed_plugin.data.images.windows import range_of
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
        self._persons: dict[Path, str] = {}
        persons: list[str] = []
        with _reading, limited(self._limits):
            for group in self._groups(files):
                before = len(self.items)
                self._add(group)
                persons += [self._persons[group[0]]] * (len(self.items) - before)
        if not self.items:
            raise UmedError(self._why_nothing())
        self._tell_people_apart(persons)

    def picture(self, view: View) -> Image:
        """One slice in RGB, in radiological orientation.

        Raises:
            UmedError: the slice cannot be read, or the view does not exist.
        """
        from PIL import Image

        item = self._item(view)
        path, how = item.reading(view)
        with _reading, limited(self._limits):
            try:
                return Image.fromarray(load_image(path, **how)[0])
            except UmedError as error:
                raise UmedError(self._message(error, item.label)) from error

    def window_range(self, view: View) -> tuple[float, float]:
        """The values of a slice that its window shows as black and white.

        Raises:
            UmedError: as `picture`, or the slice has grey levels, to which no window applies.
        """
        item = self._item(view)
        path, how = item.reading(view)
        if not item.windows:
            raise UmedError(f"{item.label}: has grey levels already. No window applies.")
        window = how.pop("window")
        with _reading, limited(self._limits):
            try:
                return range_of(read_stored(path, **how), window, path)
            except UmedError as error:
                raise UmedError(self._message(error, item.label)) from error

    def _item(self, view: View) -> Item:
        if not 0 <= view.item < len(self.items):
            raise UmedError("There is no such image in this upload. Choose one that the page offers.")
        return self.items[view.item]

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
        """Group the slices of a series of one person; every other image is a group of its own."""
        series: dict[tuple[str, str], list[Path]] = {}
        groups: list[list[Path]] = []
        for file in files:
            person, uid = self._person_and_series(file)
            group = series.get((person, uid)) if uid else None
            if group is None:
                group = [file.path]
                groups.append(group)
                self._persons[file.path] = person
                if uid:
                    series[person, uid] = group
            else:
                group.append(file.path)
        return groups

    def _person_and_series(self, file: Received) -> tuple[str, str]:
        """Patient's and series' identifiers of a single-frame DICOM file; the latter is empty for any other file, both may be."""
        if file.kind != "dicom":
            return "", ""
        try:
            with unreadable(file.path):
                header = open_header(file.path, pixels=False)
                person = str(getattr(header, "PatientID", None) or "")
                if int(getattr(header, "NumberOfFrames", None) or 1) > 1 or not getattr(header, "Rows", None):
                    return person, ""
                return person, str(getattr(header, "SeriesInstanceUID", None) or "")
        except UmedError:
            return "", ""  # `_add` hits the same error and reports it

    def _tell_people_apart(self, persons: Sequence[str]) -> None:
        """If the items belong to several people, number the people in the labels. Identifiers are not shown."""
        known = list(dict.fromkeys(filter(None, persons)))
        if len(known) < 2:
            return
        for place, person in enumerate(persons):
            name = f"person {known.index(person) + 1}" if person else "person unknown"
            self.items[place] = replace(self.items[place], label=f"{name}: {self.items[place].label}")
        self.left_out.append((f"{len(known)} people", "this upload holds images of each of them. Look at the labels"))

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
        middle = _middle_slice(path, count)
        if path.name.endswith(RASTER_ENDINGS):
            return Item(self._names[path], (path,), (Plane(2, "", count),), 1, windows_of(middle, is_ct=False))
        shown = [edges_of(middle)] + [edges_of(read_stored(path, slice=end)) for end in (0, count - 1) if count > 1]
        edges = shown[0] if len(set(shown)) == 1 else None  # the frames of one file may lie differently
        return Item(self._names[path], (path,), (Plane(2, "", count, edges),), 1, windows_of(middle, says_ct(path)))

    def _volume(self, path: Path) -> Item:
        x, y, z, volumes = volume_shape(path)
        if x * y * z > MOST_VOXELS:
            raise UmedError(f"{path}: {x} x {y} x {z} voxels are too many to show. Allowed: up to {MOST_VOXELS}.")
        stored = _middle_slice(path, z, volume=0)
        names, edges = plane_names(stored), plane_edges(stored)
        planes = [Plane(axis, *about) for axis, about in enumerate(zip(names, (x, y, z), edges))]
        # The recipes' default plane comes first. A flat image has no other.
        chosen = (planes[2], *planes[:2]) if z > 1 else (planes[2],)
        # NIfTI has no field for the unit of its values, so nothing says that they are Hounsfield units.
        return Item(self._names[path], (path,), chosen, volumes, windows_of(stored, is_ct=False))

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
        plane = Plane(2, "", len(stack.files), edges_of(first))
        return Item(label, (folder,), (plane,), 1, windows_of(first, says_ct(stack.files[0])))

    def _unordered(self, folder: Path, label: str) -> Item:
        """The files of a series that `series_stack` refuses, by name; the page says that their order may not be anatomical."""
        paths = tuple(sorted(folder.iterdir(), key=lambda path: self._names[path]))
        label += ", sorted by file name: no slice positions"
        self.left_out.append((label, NO_STACK))
        first = read_stored(paths[int(len(paths) * _MIDDLE)])
        return Item(label, paths, (Plane(2, "", len(paths)),), 1, windows_of(first, says_ct(paths[0])))

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
