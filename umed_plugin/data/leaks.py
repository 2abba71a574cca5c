"""Find images that appear twice: in train and test, or in training data and an evaluation set.

File names do not help: SLAKE calls its NIH X-rays ``xmlab1/source.jpg``, and OmniMedVQA contains Kvasir's frames. So images are
compared as thumbnails without their coarse light and dark, which is alike in all chest X-rays. Measured on the real images that
the tests read (CT, MRI, endoscopy): an image scaled to half its size and saved again as JPEG has a similarity of 0.99 or more,
neighbouring slices of one CT reach 0.95, and different patients 0.77.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import numpy as np
from PIL import Image

from umed_plugin.data.annotations.finding import matches
from umed_plugin.data.endings import IMAGE_ENDINGS, NIFTI_ENDINGS
from umed_plugin.data.images import has_dicom_magic, load_image, slice_count
from umed_plugin.data.images.stored import unreadable
from umed_plugin.data.own_files import OwnFiles
from umed_plugin.data.places import check_fetched
from umed_plugin.errors import UmedError, warn

# Similarity from which two images count as the same one, or as neighbours of which one reveals the other.
SAME = 0.9
_SIDE, _COARSE = 32, 3.0  # side of a thumbnail, and standard deviation of the blur that is subtracted, in its pixels
_ROWS = 512  # thumbnails compared at a time


@dataclass(frozen=True)
class Leak:
    """An image in one place that is, or nearly is, an image in another.

    Attributes:
        name, other: names of the two images.
        likeness: correlation of their thumbnails, `SAME` to 1.
    """

    name: str
    other: str
    likeness: float


def thumbprint(shown: np.ndarray) -> np.ndarray:
    """The thumbnail of an image: float32 ``[32, 32]`` with L2 norm 1, or all 0 for an image of one grey level.

    Args:
        shown: uint8 RGB ``[height, width, 3]``.
    """
    from scipy.ndimage import gaussian_filter

    small = np.asarray(Image.fromarray(shown).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32)
    fine = small - gaussian_filter(small, _COARSE)
    length = float(np.linalg.norm(fine))
    # Less than one grey level in total is rounding error.
    return fine / length if length > 1 else np.zeros_like(fine)


def likeness(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Correlation [n] of a thumbnail with others ``[n, 32, 32]``, each as it is, mirrored, or rotated by 90 degrees."""
    theirs = _flat(others).T
    best: np.ndarray = np.max([_flat(turned) @ theirs for turned in _turned(one[None])], axis=0)[0]
    return best


class Pictures:
    """Thumbnails of many images, by name."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._prints: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, shown: np.ndarray) -> None:
        """Add an image, uint8 RGB ``[height, width, 3]``."""
        self.names.append(name)
        self._prints.append(thumbprint(shown))

    def also_in(self, others: Pictures) -> list[Leak]:
        """Images that are also among the others (as they are, mirrored, or rotated by 90 degrees), each with its best match."""
        if not self.names or not others.names:
            return []
        theirs = _flat(np.stack(others._prints)).T
        leaks = []
        for start in range(0, len(self), _ROWS):
            ours = np.stack(self._prints[start : start + _ROWS])
            likeness = np.max([_flat(turned) @ theirs for turned in _turned(ours)], axis=0)
            for row, best in enumerate(likeness.argmax(axis=1)):
                if likeness[row, best] >= SAME:
                    leaks.append(Leak(self.names[start + row], others.names[best], float(likeness[row, best])))
        return leaks

    def has(self, shown: np.ndarray) -> bool:
        """True if an image, uint8 RGB ``[height, width, 3]``, is among these."""
        if not self.names:
            return False
        single = Pictures()
        single.add("", shown)
        return bool(single.also_in(self))

    def digest(self) -> str:
        """Tells these images from others; empty for none."""
        if not self._prints:
            return ""
        return hashlib.sha256(np.stack(self._prints).tobytes()).hexdigest()


def evaluation_pictures(paths: Iterable[Union[str, Path]], slice_axes: Iterable[int] = (2,)) -> Pictures:
    """The images of evaluation sets, by file, and by slice if a file has several.

    Args:
        paths: folders, one for each set, which are searched recursively.
        slice_axes: the axes of NIfTI arrays along which the training images are slices.

    Raises:
        UmedError: a path is not a folder, or holds no image.
    """
    pictures, axes = Pictures(), sorted(set(slice_axes))
    for path in map(Path, paths):
        # Links to folders are followed: evaluation sets often lie on another disk.
        others: Counter[str] = Counter()
        images = []
        for file in (file for file in matches(path, "**/*") if not file.is_dir()):
            if _may_be_image(file):
                images.append(file)
            else:
                others[file.suffix.lower() or "no ending"] += 1
        # Those of a run were trained on. A set that umed has built is compared with: too much is told, and too little is not.
        own = OwnFiles(path)
        files = [file for file in images if own.run_of(file) is None]
        if not files:
            raise UmedError(
                f"{path}: not a folder with images in it or below. Give the folder of an evaluation set's images"
            )
        for file in files:
            try:
                _add_slices(file, pictures, axes)
            except UmedError as error:
                warn(f"not compared with the training data: {error}")
        if len(files) < len(images):
            first = next(run for run in map(own.run_of, images) if run is not None)
            warn(
                f"{path}: {len(images) - len(files)} images of runs of umed are not compared, such as those in {first}"
            )
        if others:
            counted = ", ".join(f"{ending} ({count})" for ending, count in others.most_common())
            warn(f"{path}: files that are no images by their names are not compared with the training data: {counted}")
    return pictures


def _may_be_image(file: Path) -> bool:
    """True for the endings of images, and for a DICOM file of any name. A file that cannot be opened may be one too."""
    try:
        return file.name.lower().endswith(IMAGE_ENDINGS) or has_dicom_magic(file)
    except OSError:
        return True


def _add_slices(file: Path, pictures: Pictures, slice_axes: Sequence[int]) -> None:
    """Add every slice of a NIfTI volume along these axes, frame of a DICOM file and page of a TIFF.

    Any of them may be a training image.

    Raises:
        UmedError: the file cannot be read.
    """
    check_fetched(file)
    with unreadable(file):
        axes = slice_axes if file.name.lower().endswith(NIFTI_ENDINGS) else (2,)
        for axis in axes:
            along = f" along axis {axis}" if len(axes) > 1 else ""
            count = slice_count(file, axis)
            for index in range(count):
                name = f"{file}#{index}{along}" if count > 1 else str(file)
                pictures.add(name, load_image(file, slice=index if count > 1 else None, slice_axis=axis)[0])


def _turned(prints: np.ndarray) -> list[np.ndarray]:
    """The eight symmetries of a square: ``[n, side, side]`` each."""
    mirrored = prints[:, :, ::-1]
    return [np.rot90(version, quarter, axes=(1, 2)) for version in (prints, mirrored) for quarter in range(4)]


def _flat(prints: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(prints).reshape(len(prints), -1)
