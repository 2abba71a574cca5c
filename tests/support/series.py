"""A series of slices with three lesions, as DICOM files or as one NIfTI volume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from support.drawn import HEIGHT, WIDTH, scene, write_dicom, write_nifti

# Slice -> the box on it; the one on slice 7 is the largest.
LESIONS = {2: (11, 7, 20, 12), 7: (11, 7, 42, 19), 9: (50, 20, 60, 26)}


SLICES = 12


def slices() -> list[np.ndarray]:
    """Grey levels 0-1 of each slice, [HEIGHT, WIDTH]."""
    empty = np.full((HEIGHT, WIDTH), 0.1)
    empty[-4:, -6:] = 0.4
    return [scene(LESIONS[k]) if k in LESIONS else empty for k in range(SLICES)]


def write_series(folder: Path, *, feet_first: bool = True, **tags: Any) -> Path:
    """One file a slice, under names in no order."""
    folder.mkdir()
    for k, values in enumerate(slices()):
        number = k if feet_first else SLICES - k
        name = f"IM{(k * 7) % SLICES:03d}"
        own = {"SeriesInstanceUID": "1.2.3", "ImagePositionPatient": [0, 0, 3.0 * k - 50], "InstanceNumber": number + 1}
        write_dicom(folder / name, values, **{**own, **tags})
    (folder / "readme.txt").write_text("no image")
    return folder


def write_volume(path: Path) -> Path:
    """The series as one NIfTI file."""
    return write_nifti(path, np.stack([values.T for values in slices()], axis=2), np.diag([-0.7, -0.7, 3, 1]))
