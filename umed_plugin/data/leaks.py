"""Pictures that stand in two places: in train and test, or in training data and an evaluation set.

Names do not tell. SLAKE calls its NIH X-rays ``xmlab1/source.jpg``, and Kvasir's frames stand in OmniMedVQA. So pictures are
compared as small versions from which the coarse light and dark, alike in all X-rays of a chest, is taken away. On the real images
that the tests read (CT, MRI, endoscopy) a picture scaled to half its size and saved as JPEG anew keeps a likeness of 0.99 and
more, neighbouring slices of one CT reach 0.95, and different patients 0.77.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import numpy as np
from PIL import Image

from umed_plugin.data.images import load_image
from umed_plugin.errors import UmedError

# Likeness from which two pictures are taken for the same one, or for neighbours that give each other away.
SAME = 0.9
_SIDE, _COARSE = 32, 3.0  # side of the small version, and the spread of the blur that is taken away, in its pixels
_ROWS = 512  # compared at a time
_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leak:
    """A picture in one place that is as good as the same as one in another.

    Attributes:
        name, other: what the pictures are called.
        likeness: correlation of the small versions, `SAME` to 1.
    """

    name: str
    other: str
    likeness: float


def thumbprint(shown: np.ndarray) -> np.ndarray:
    """The small version: float32 ``[32, 32]`` of length 1, or 0 for a picture of one grey.

    Args:
        shown: uint8 RGB ``[height, width, 3]``.
    """
    from scipy.ndimage import gaussian_filter

    small = np.asarray(Image.fromarray(shown).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32)
    fine = small - gaussian_filter(small, _COARSE)
    length = float(np.linalg.norm(fine))
    # Below one grey level in all, what is left is rounding.
    return fine / length if length > 1 else np.zeros_like(fine)


class Pictures:
    """Thumbprints of many pictures by name."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._prints: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, shown: np.ndarray) -> None:
        """Remember a picture, uint8 RGB ``[height, width, 3]``."""
        self.names.append(name)
        self._prints.append(thumbprint(shown))

    def also_in(self, others: Pictures) -> list[Leak]:
        """Each picture that is among the others too, as it is, mirrored or turned by 90 degrees, with the one most like it."""
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
        """Whether a picture, uint8 RGB ``[height, width, 3]``, is among these."""
        one = Pictures()
        one.add("", shown)
        return bool(one.also_in(self))


def evaluation_pictures(paths: Iterable[Union[str, Path]]) -> Pictures:
    """The pictures of evaluation sets, each given as a folder of images, those below it included.

    Raises:
        UmedError: a path is no folder, or holds no image.
    """
    pictures = Pictures()
    for path in map(Path, paths):
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _ENDINGS)
        if not files:
            raise UmedError(f"{path}: no folder with images below it. Give the folder of an evaluation set's images")
        for file in files:
            try:
                pictures.add(str(file), load_image(file)[0])
            except UmedError as error:
                _log.warning("not compared: %s", error)
    return pictures


def _turned(prints: np.ndarray) -> list[np.ndarray]:
    """The eight ways to lay a square: ``[n, side, side]`` each."""
    mirrored = prints[:, :, ::-1]
    return [np.rot90(one, quarter, axes=(1, 2)) for one in (prints, mirrored) for quarter in range(4)]


def _flat(prints: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(prints).reshape(len(prints), -1)
