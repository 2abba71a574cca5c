"""What every annotation reader returns, and how readers find files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from umed_plugin.data.recipes.recipe import Recipe
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box


@dataclass
class Annotated:
    """One image, or one slice of a volume, with its annotations.

    Attributes:
        image: absolute path of the file.
        boxes: xyxy, half-open, in pixels of the frame that the recipe declares (0-1 of it if ``normalised``).
        classes: one per box: names as in the annotations, and plain names after `read_annotations`.
        where: annotation file and line, for messages.
        size: width and height that the annotations state, in pixels, or None.
        slice: index from 0 in a volume, or None.
        window: low and high that the annotations state, or None.
        left_out: why the recipe leaves the image out; empty if it does not.
        copy_of: the picture of which the image is an augmented copy, or empty.
        recipe, root: recipe and folder of the image's data set; set by `read_annotations`.
    """

    image: Path
    boxes: list[Box]
    classes: list[str]
    where: str
    size: Optional[tuple[int, int]] = None
    normalised: bool = False
    patient: str = ""
    split: str = ""
    modality: str = ""
    slice: Optional[int] = None
    window: Optional[tuple[float, float]] = None
    left_out: str = ""
    copy_of: str = ""
    # Not in the repr: recipes are long, and the same for thousands of images.
    recipe: Recipe = field(default=None, repr=False)  # type: ignore[assignment]
    root: Path = Path()


@dataclass
class AnnotationSet:
    """All annotations of a recipe, or of a mixture.

    Attributes:
        root: data root.
        wanted: number of images that a mixture asks for, or None.
        items: images that are on disk, with plain class names, patient and split.
        missing: items whose image is not on disk.
        left_out: reason -> number of images left out on purpose.
        dropped_boxes: number of degenerate boxes left out, known after the images are read.
        faults: mistakes in the data. Nothing may be built while there are any.
    """

    root: Path
    wanted: Optional[int] = None
    items: list[Annotated] = field(default_factory=list)
    missing: list[Annotated] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    dropped_boxes: int = 0
    faults: Faults = field(default_factory=Faults)


class ImageFolders:
    """Where the images of a split are: the folders that match ``image_root``, searched in order.

    Each folder is listed once. Testing for each of 100,000 images in each of NIH's 12 folders takes minutes on a network disk.
    """

    def __init__(self, options: Any, root: Path, split: str, default: Path) -> None:
        self._listed: dict[str, set[str]] = {}
        patterns = options.image_roots(split)
        self.folders = [folder for pattern in patterns for folder in _matching_folders(root, pattern)] or [default]

    def find(self, names: Sequence[str]) -> Path:
        """The first file that exists under one of the names; if none does, the path at which the first name was tried."""
        for name in names:
            below, file = os.path.split(name)
            for folder in self.folders:
                if file in self._names_in(os.path.join(folder, below)):
                    return folder / name
        return self.folders[0] / names[0]

    def images(self, endings: Iterable[str]) -> list[Path]:
        """All files with one of the endings (lower case), sorted."""
        return sorted(
            folder / name
            for folder in self.folders
            for name in self._names_in(os.path.join(folder, ""))
            if os.path.splitext(name)[1].lower() in endings
        )

    def _names_in(self, folder: str) -> set[str]:
        if folder not in self._listed:
            self._listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return self._listed[folder]


def _matching_folders(root: Path, pattern: str) -> list[Path]:
    """The folders that match; the pattern itself if none does, so that a message can name it."""
    if "*" not in pattern:
        return [root / pattern]
    return sorted(path for path in root.glob(pattern) if path.is_dir()) or [root / pattern]


def matching_files(root: Path, pattern: str, faults: Faults) -> list[Path]:
    """Files that match a pattern under the root, sorted. It is a fault if none does."""
    matches = sorted(path for path in root.glob(pattern) if path.is_file())
    if not matches:
        faults.add(root / pattern, "no file matches. Check annotations.files and the data root")
    return matches


def annotation_file(root: Path, name: str, faults: Faults) -> Optional[Path]:
    """The file of that name, or the one file that a pattern matches; None after a fault."""
    matches = sorted(path for path in root.glob(name) if path.is_file()) if "*" in name else [root / name]
    if len(matches) > 1:
        faults.add(
            root / name, f"matches {', '.join(path.name for path in matches)}; needed: one. Name it in the recipe"
        )
        return None
    if not matches or not matches[0].is_file():
        faults.add(root / name, "no such annotation file")
        return None
    return matches[0]


def as_xyxy(values: Sequence[float], convention: str) -> Box:
    """A box of four numbers as xyxy, in the same unit.

    Args:
        convention: ``xyxy`` (two corners), ``xywh`` (corner and size) or ``cxcywh`` (centre and size).
    """
    a, b, c, d = values
    if convention == "xywh":
        return (a, b, a + c, b + d)
    return (a - c / 2, b - d / 2, a + c / 2, b + d / 2) if convention == "cxcywh" else (a, b, c, d)
