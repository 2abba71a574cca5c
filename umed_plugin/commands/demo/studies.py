"""Generated studies for the demo: CT as DICOM, MR as NIfTI volumes, X-ray as 8-bit PNG, with boxes in ``annotations.csv``.

The images are drawn and contain no patient data: a body with soft organs and noise, and lesions of four classes that differ in
shape and brightness. About one study in eight has no lesion, about one in six has two. The file formats are complete: DICOM with
rescale and window tags, NIfTI volumes with the lesion in one of the slices. Most images are not square.

``annotations.csv`` has one row per lesion: ``file, x1, y1, x2, y2, lesion, patient, split, modality, slice``. Boxes are pixels of
the image as a viewer shows it (x to the right, y down, half-open). A study without a lesion has one row with empty box and
lesion. ``slice`` is the 0-based index along the volume's last axis, empty for other formats. Splits are by patient.

How to run: ``make_studies(Path("studies"), seed=0)``. The same seed gives the same bytes; gzip stores no time.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COLUMNS = ("file", "x1", "y1", "x2", "y2", "lesion", "patient", "split", "modality", "slice")
LESIONS = ("nodule", "cyst", "calcification", "effusion")
STUDIES_PER_PATIENT = 4
# DICOM, PNG, DICOM, NIfTI: volumes are the slowest to write and read, so there are fewest of them.
FORMATS = ("CT", "X-ray", "CT", "MR")
SIZES = ((128, 128), (144, 112), (112, 144), (136, 104), (104, 136))
SLICES = 5
SHARE_NEGATIVE, SHARE_DOUBLE = 0.12, 0.17
WINDOW_CENTER, WINDOW_WIDTH = 40, 400


@dataclass(frozen=True)
class Lesion:
    """One drawn lesion: its class and its box, (x1, y1, x2, y2) in pixels, half-open."""

    name: str
    box: tuple[int, int, int, int]


def make_studies(
    folder: Path | str,
    *,
    seed: int = 0,
    train: int = 1600,
    val: int = 40,
    test: int = 200,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the studies under ``folder`` and return the path of ``annotations.csv``.

    Args:
        folder: created if missing.
        seed: determines every pixel.
        train: number of studies in this split; the last patient of a split may have fewer than the others.
        val: as ``train``.
        test: as ``train``.
        progress: called with (studies done, studies in all).
    """
    folder = Path(folder)
    for name in ("ct", "mr", "xray"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    total, done, patient, rows = train + val + test, 0, 0, []
    for split, count in (("train", train), ("val", val), ("test", test)):
        for index in range(count):
            if index % STUDIES_PER_PATIENT == 0:
                patient += 1
            # A study depends only on the seed, its split and its index, so a smaller set is a prefix of a larger one.
            rng = np.random.default_rng([seed, ("train", "val", "test").index(split), index])
            rows += _write_study(folder, f"D{patient:04d}", split, index % STUDIES_PER_PATIENT, rng)
            done += 1
            if progress is not None:
                progress(done, total)
    path = folder / "annotations.csv"
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def draw_study(rng: np.random.Generator) -> tuple[np.ndarray, list[Lesion]]:
    """Draw one study: (gray image ``[height, width]``, nominally 0-1 but not clipped; its lesions)."""
    width, height = SIZES[rng.integers(len(SIZES))]
    picture = _draw_body(rng, width, height)
    draw = rng.random()
    count = 0 if draw < SHARE_NEGATIVE else 2 if draw < SHARE_NEGATIVE + SHARE_DOUBLE else 1
    lesions: list[Lesion] = []
    for name in rng.choice(LESIONS, size=count, replace=False):
        placed = _place_lesion(rng, str(name), width, height, [lesion.box for lesion in lesions])
        if placed is None:
            continue
        cover, change = placed
        picture = picture * (1 - cover) + (picture * 0.5 + change) * cover
        ys, xs = np.nonzero(cover > 0.5)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        lesions.append(Lesion(str(name), box))
    return picture + rng.normal(0, 0.025, picture.shape), lesions


def _ellipse(width: int, height: int, cx: float, cy: float, rx: float, ry: float, edge: float) -> np.ndarray:
    """Coverage 0-1 of an ellipse per pixel, ``[height, width]``; ``edge`` is the width of its soft rim in pixels."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    distance = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2)
    return np.clip(0.5 + (1 - distance) * min(rx, ry) / edge, 0, 1)


def _draw_body(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    body = _ellipse(width, height, width / 2, height / 2, width * 0.47, height * 0.47, 3)
    tissue = np.full((height, width), 0.42 + rng.uniform(-0.03, 0.03))
    for _ in range(4):
        rx, ry = rng.uniform(0.12, 0.3, 2) * (width, height)
        cx, cy = rng.uniform(0.2, 0.8, 2) * (width, height)
        tissue += rng.uniform(-0.05, 0.05) * _ellipse(width, height, cx, cy, rx, ry, 8)
    return 0.03 + body * tissue


def _place_lesion(
    rng: np.random.Generator, name: str, width: int, height: int, taken: list[tuple[int, int, int, int]]
) -> tuple[np.ndarray, float] | None:
    """Return (coverage 0-1, gray value) of a lesion inside the body that does not touch ``taken``; None if there is no room."""
    side = min(width, height)
    if name == "nodule":
        rx = ry = rng.uniform(0.10, 0.16) * side
        grey, edge = 0.48, 2.5
    elif name == "cyst":
        rx, ry = rng.uniform(0.13, 0.19) * side, rng.uniform(0.09, 0.12) * side
        rx, ry = (rx, ry) if rng.random() < 0.5 else (ry, rx)
        grey, edge = -0.08, 1.5
    elif name == "calcification":
        rx = ry = rng.uniform(0.065, 0.085) * side
        grey, edge = 0.95, 1.0
    else:
        rx, ry = rng.uniform(0.19, 0.26) * side, rng.uniform(0.08, 0.11) * side
        grey, edge = 0.40, 1.5
    for _ in range(50):
        cx, cy = rng.uniform(0.15, 0.85) * width, rng.uniform(0.15, 0.85) * height
        inside = (
            np.hypot((abs(cx - width / 2) + rx) / (0.46 * width), (abs(cy - height / 2) + ry) / (0.46 * height)) < 1
        )
        clear = all(
            cx + rx + 4 < x1 or cx - rx - 4 > x2 or cy + ry + 4 < y1 or cy - ry - 4 > y2 for x1, y1, x2, y2 in taken
        )
        if inside and clear:
            break
    else:
        return None
    if name == "effusion":
        y, x = np.mgrid[0:height, 0:width] + 0.5
        depth = np.minimum(rx - abs(x - cx), ry - abs(y - cy))
        return np.clip(0.5 + depth / edge, 0, 1), grey
    return _ellipse(width, height, cx, cy, rx, ry, edge), grey


def _write_study(
    folder: Path, patient: str, split: str, index: int, rng: np.random.Generator
) -> list[dict[str, object]]:
    modality = FORMATS[index % len(FORMATS)]
    picture, lesions = draw_study(rng)
    row: dict[str, object] = {"patient": patient, "split": split, "modality": modality, "slice": ""}
    if modality == "CT":
        row["file"] = f"ct/{patient}_{index}.dcm"
        _write_dicom(folder / str(row["file"]), picture, patient, index)
    elif modality == "MR":
        row["file"] = f"mr/{patient}_{index}.nii.gz"
        row["slice"] = lesion_slice = int(rng.integers(SLICES))
        _write_nifti(folder / str(row["file"]), picture, lesion_slice, rng)
    else:
        row["file"] = f"xray/{patient}_{index}.png"
        _write_png(folder / str(row["file"]), picture)
    if not lesions:
        return [{**row, "x1": "", "y1": "", "x2": "", "y2": "", "lesion": ""}]
    return [{**row, "lesion": lesion.name, **dict(zip(("x1", "y1", "x2", "y2"), lesion.box))} for lesion in lesions]


def _write_png(path: Path, picture: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(np.uint8(np.clip(picture, 0, 1) * 255)).save(path)


def _write_dicom(path: Path, picture: np.ndarray, patient: str, index: int) -> None:
    """Write 16-bit CT: stored values are HU + 1024, and the soft-tissue window maps them back to the image's gray 0-1."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    instance = generate_uid(entropy_srcs=["umed demo", patient, str(index)])
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = CTImageStorage, instance, "CT"
    data.PatientID, data.PatientName = patient, f"Generated^{patient}"
    data.SeriesInstanceUID = generate_uid(entropy_srcs=["umed demo series", patient])
    data.StudyInstanceUID = generate_uid(entropy_srcs=["umed demo study", patient])
    data.Rows, data.Columns = picture.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.PixelSpacing = [1.0, 1.0]
    data.ImagePositionPatient, data.ImageOrientationPatient = [0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    data.RescaleSlope, data.RescaleIntercept, data.RescaleType = 1, -1024, "HU"
    data.WindowCenter, data.WindowWidth = WINDOW_CENTER, WINDOW_WIDTH
    hounsfield = (picture - 0.5) * WINDOW_WIDTH + WINDOW_CENTER
    data.PixelData = np.clip(np.round(hounsfield + 1024), 0, 4095).astype("<u2").tobytes()
    data.save_as(path, enforce_file_format=True)


def _write_nifti(path: Path, picture: np.ndarray, index: int, rng: np.random.Generator) -> None:
    """Write an int16 volume ``[x, y, slice]``; its first axis runs to the patient's left, the second to the back, as in DICOM."""
    import nibabel

    height, width = picture.shape
    volume = np.empty((width, height, SLICES), np.int16)
    for z in range(SLICES):
        shown = picture if z == index else _draw_body(rng, width, height) + rng.normal(0, 0.025, picture.shape)
        volume[:, :, z] = np.round(np.clip(shown, 0, 1) * 1000).T
    # A black and a white pixel beside the body: MR has no units, so a viewer scales a slice by its own range of values.
    volume[0, 0, :], volume[1, 0, :] = 0, 1000
    image = nibabel.Nifti1Image(volume, np.diag([-1.0, -1.0, 5.0, 1.0]))
    # gzip's header contains time and name, so nibabel's own compression would not be reproducible.
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
