"""What the page offers of one image: its planes with the patient's sides at their edges, its windows, and the view of a slice."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from umed_plugin.data.images import StoredSlice
from umed_plugin.data.images.dicom import open_header
from umed_plugin.data.images.sides import Edges, edge_letters
from umed_plugin.data.recipes.image_options import WINDOW_PRESETS
from umed_plugin.errors import UmedError

PLANES = ("sagittal", "coronal", "axial")
# A CT whose header has no window opens with this one.
_CT_WINDOW = "soft_tissue"
# A window that was set by hand: the values that become black and white.
_BY_HAND = re.compile(r"(-?\d{1,9}(?:\.\d{1,6})?),(-?\d{1,9}(?:\.\d{1,6})?)", re.ASCII)


@dataclass(frozen=True)
class Plane:
    """A plane of a volume.

    Attributes:
        axis: the stored axis that its slices are across.
        name: empty if there is no other.
        slices: their number.
        edges: letters of the patient's sides at the left, right, top and bottom edge; None if the file does not say how it lies.
    """

    axis: int
    name: str
    slices: int
    edges: Optional[Edges] = None


@dataclass(frozen=True)
class View:
    """One slice as it is shown: an item of the study, and the options that `load_image` reads it with.

    ``window`` is a name, or ``LOW,HIGH``: a window that was set by hand.
    """

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
        window = self._window(view.window)
        if len(self.paths) > 1:
            return self.paths[view.slice], {"window": window}
        how = {"window": window, "slice": view.slice, "slice_axis": view.axis, "volume": view.volume}
        return self.paths[0], how

    def _window(self, wanted: str) -> Union[str, tuple[float, float]]:
        by_hand = _BY_HAND.fullmatch(wanted) if self.windows else None
        if by_hand:
            low, high = float(by_hand[1]), float(by_hand[2])
            if math.isfinite(low) and low < high:
                return low, high
            raise UmedError(f"{self.label}: window {wanted}: the lower value must be below the upper one.")
        if wanted not in (self.windows or ("file",)):
            allowed = f"{', '.join(self.windows)}, or LOW,HIGH" if self.windows else "file"
            raise UmedError(f"{self.label}: no such window. Allowed: {allowed}.")
        return wanted


def windows_of(stored: StoredSlice, is_ct: bool) -> tuple[str, ...]:
    """The windows that apply to a slice, the one that it opens with first: the file's own, the full range, a CT's presets."""
    if stored.is_grey_levels:
        return ()
    try:
        own = ("file",) if stored.view() is not None else ()
    except UmedError:
        own = ()
    if not is_ct:
        return (*own, "full")
    first = (*own, "full") if own else (_CT_WINDOW, "full")
    return (*first, *(name for name in WINDOW_PRESETS if name not in first))


def says_ct(path: Path) -> bool:
    """Whether a DICOM file says that its values are Hounsfield units: by its modality, or, without one, by its rescale type."""
    header = open_header(path, pixels=False)
    modality = getattr(header, "Modality", None)
    return modality == "CT" if modality else getattr(header, "RescaleType", None) == "HU"


def edges_of(stored: StoredSlice) -> Optional[Edges]:
    """The letters at the edges of a slice; None if the file does not say how it lies."""
    return None if stored.directions is None else edge_letters(*stored.directions)


def plane_edges(stored: StoredSlice) -> tuple[Optional[Edges], Optional[Edges], Optional[Edges]]:
    """The letters of slices across each stored axis, from the directions of the first two axes."""
    if stored.directions is None:
        return None, None, None
    first, second = stored.directions
    third = np.cross(first, second)  # its sign does not matter: a slice is turned so that its sides are as usual
    return edge_letters(second, third), edge_letters(first, third), edge_letters(first, second)


def plane_names(stored: StoredSlice) -> tuple[str, str, str]:
    """The plane names of slices across each stored axis, from the directions of the first two axes."""
    if stored.directions is None:
        return ("along x", "along y", "along z")
    first, second = stored.directions
    across = (first, second, np.cross(first, second))
    names = [PLANES[int(np.argmax(np.abs(direction)))] for direction in across]
    return (names[0], names[1], names[2])
