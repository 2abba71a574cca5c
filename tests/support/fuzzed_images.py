"""Changed image files of every format, any number of them: each is shown, or refused by one clear error that names the file."""

from __future__ import annotations

import gzip
import io
import random
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian

from support.drawn import scene, write_dicom_as, write_nifti
from umed_plugin.data.images import load_image
from umed_plugin.errors import UmedError

KINDS = ("dcm", "nii", "nii.gz", "tif", "png", "jpg", "gif", "bmp", "webp")
_HEADER = 400  # bytes at the beginning, where most changes are made


def outcomes(kind: str, count: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Read ``count`` changed files of one of `KINDS`.

    Returns:
        How many were ``shown`` and ``refused``. Any other exception than our own passes through.
    """
    rng, whole = random.Random(f"{kind}:{seed}"), _whole(kind, folder)
    path, found = folder / f"fuzzed.{kind}", Counter[str]()
    for _ in range(count):
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            place = rng.randrange(min(_HEADER, len(changed)) if rng.random() < 0.8 else len(changed))
            changed[place] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        end = len(changed) if rng.random() < 0.8 else rng.randrange(len(changed))
        content = bytes(changed[:end])
        path.write_bytes(gzip.compress(content, 1) if kind == "nii.gz" else content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image, turned = load_image(path, slice=rng.choice([None, 0, 1]))
        except UmedError as error:
            assert path.name in str(error)
            found["refused"] += 1
        else:
            assert image.dtype == np.uint8
            assert image.shape == (*turned.size[::-1], 3)
            found["shown"] += 1
    return found


def _whole(kind: str, folder: Path) -> bytes:
    values = scene(width=24, height=16, box=(3, 2, 9, 7))
    if kind == "dcm":
        stored = np.rint(values * 1000).astype(np.int16)
        return write_dicom_as(folder / "whole.dcm", stored, ExplicitVRLittleEndian).read_bytes()
    if kind.startswith("nii"):
        return write_nifti(folder / "whole.nii", np.stack([values] * 3, axis=2), np.eye(4)).read_bytes()
    file = io.BytesIO()
    deep = kind in ("tif", "png")
    grey = np.rint(values * (60000 if deep else 255)).astype(np.uint16 if deep else np.uint8)
    names = {"jpg": "JPEG", "tif": "TIFF"}
    Image.fromarray(grey).save(file, names.get(kind, kind.upper()))
    return file.getvalue()
