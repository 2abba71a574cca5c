"""Images drawn for tests: not square, not symmetric, with one bright rectangle at a known place, in every file format."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 97, 61
BOX = (11, 7, 42, 19)
IDENTITY = (1, 0, 0, 0, 1, 0)


def scene(box: tuple[int, int, int, int] = BOX, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """0-1 float ``[height, width]``: dark, a grey corner mark at the lower right, and a white rectangle."""
    values = np.full((height, width), 0.1)
    values[height - 4 :, width - 6 :] = 0.4
    x1, y1, x2, y2 = box
    values[y1:y2, x1:x2] = 1.0
    return values


def bright_box(image: np.ndarray, threshold: int = 160) -> tuple[int, int, int, int]:
    """The extent of what is bright in a uint8 image."""
    grey = image if image.ndim == 2 else image.min(axis=2)
    rows, columns = np.nonzero(grey > threshold)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def write_png(path: Path, values: np.ndarray, mode: str = "L") -> Path:
    image = Image.fromarray(np.rint(values * 255).astype(np.uint8))
    image.convert(mode).save(path)
    return path


def write_png16(path: Path, values: np.ndarray, offset: int = 32768) -> Path:
    """0-1 becomes -1000 to 1000 Hounsfield units, stored with DeepLesion's offset."""
    Image.fromarray((np.rint(values * 2000 - 1000) + offset).astype(np.uint16)).save(path)
    return path


def new_uid() -> str:
    """A DICOM UID that is always 26 characters long, so that files of the same pixels have the same size."""
    return f"2.25.1{secrets.randbelow(10**20):020d}"


def write_dicom(path: Path, stored: np.ndarray, *, orientation: Any = IDENTITY, **tags: Any) -> Path:
    """0-1 ``[rows, columns]`` or ``[frames, rows, columns]`` becomes -1000 to 1000 after slope 2 and intercept -1000."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, new_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    header.Modality, header.PatientName, header.PatientID = "CT", "Doe^Jane", "secret-7"
    if stored.dtype == np.uint8:
        pixels, header.SamplesPerPixel, header.PhotometricInterpretation = stored, 3, "RGB"
        header.PlanarConfiguration = 0
    else:
        pixels, header.SamplesPerPixel, header.PhotometricInterpretation = np.rint(stored * 1000), 1, "MONOCHROME2"
        pixels = pixels.astype(np.int16)
        header.RescaleSlope, header.RescaleIntercept = 2, -1000
    header.Rows, header.Columns = stored.shape[1:3] if stored.ndim == 3 and stored.shape[-1] != 3 else stored.shape[:2]
    if stored.ndim == 3 and stored.shape[-1] != 3:
        header.NumberOfFrames = stored.shape[0]
    bits = pixels.dtype.itemsize * 8
    header.BitsAllocated, header.BitsStored, header.HighBit = bits, bits, bits - 1
    header.PixelRepresentation = int(pixels.dtype == np.int16)
    header.ImageOrientationPatient, header.ImagePositionPatient = list(orientation), [0, 0, 0]
    header.PixelSpacing = [0.7, 0.7]
    for name, value in tags.items():
        setattr(header, name, value)
    header.PixelData = pixels.tobytes()
    header.save_as(path, enforce_file_format=True)
    return path


def write_dicom_as(path: Path, values: np.ndarray, syntax: str, **tags: Any) -> Path:
    """Whole numbers ``[rows, columns]``, ``[rows, columns, 3]`` or ``[frames, ...]`` as they are, in any uncompressed syntax.

    ``tags`` go over the header; one that is None is taken out.
    """
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import SecondaryCaptureImageStorage

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, new_uid()
    meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    is_implicit, is_little = meta.TransferSyntaxUID.is_implicit_VR, meta.TransferSyntaxUID.is_little_endian
    header = FileDataset(str(path), {}, b"\0" * 128, meta, is_implicit, is_little)
    header.SOPClassUID, header.SOPInstanceUID = SecondaryCaptureImageStorage, meta.MediaStorageSOPInstanceUID
    colour = values.shape[-1] == 3
    header.SamplesPerPixel, header.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        header.PlanarConfiguration = 0
    plane = values.shape[:-1] if colour else values.shape
    header.Rows, header.Columns = plane[-2:]
    if len(plane) == 3:
        header.NumberOfFrames = plane[0]
    bits = values.dtype.itemsize * 8
    header.BitsAllocated, header.BitsStored, header.HighBit = bits, bits, bits - 1
    header.PixelRepresentation = int(values.dtype.kind == "i")
    for name, value in tags.items():
        if value is None:
            delattr(header, name)
        else:
            setattr(header, name, value)
    order = "<" if is_little else ">"
    header.PixelData = values.astype(values.dtype.newbyteorder(order)).tobytes()
    header["PixelData"].VR = "OB" if bits == 8 else "OW"
    header.save_as(path, enforce_file_format=True)
    return path


def write_nifti(path: Path, volume: np.ndarray, affine: np.ndarray) -> Path:
    import nibabel

    nibabel.save(nibabel.Nifti1Image(np.rint(volume * 1000).astype(np.int16), affine), path)
    return path


RECIPE = """
name: drawn
description: drawn for a test
terms: {licence: CC0, url: "https://example.org/drawn"}
data_root: DATA
modality: CT
annotations: ANNOTATIONS
classes:
  nod: {name: nodule, synonyms: [nodular opacity]}
  cy: {name: cyst}
split: SPLIT
"""


def write_recipe(folder: Path, annotations: str, split: str = "{by: patient}", extra: str = "") -> Path:
    """A recipe for data in ``folder``; ``extra`` is further YAML at the top level."""
    text = RECIPE.replace("DATA", str(folder)).replace("ANNOTATIONS", annotations).replace("SPLIT", split) + extra
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


NOISE_RECIPE = """
name: small
description: Noise.
terms: {licence: CC0, url: "https://example.org"}
data_root: DATA
annotations:
  reader: csv
  files: a.csv
  columns: {file: file, box: [x1, y1, x2, y2], lesion: lesion, split: split}
classes: {cyst: {name: cyst}, nodule: {name: nodule, NODULE}}
split: {by: column}
"""


def write_noise_recipe(
    folder: Path,
    studies: list[tuple[str, tuple[int, int, int, int]]],
    *,
    side: int,
    nodule: str = "synonyms: []",
    extra: str = "",
) -> Path:
    """A recipe for studies of noise, the same lesions and boxes in the training and in the test split; "" is no lesion.

    Args:
        side: of the images, in pixels.
        nodule: a further key of the class nodule.
        extra: further YAML at the top level.
    """
    rows = ["file,x1,y1,x2,y2,lesion,split"]
    for split in ("train", "test"):
        for number, (lesion, box) in enumerate(studies):
            name = f"{split}{number}.png"
            pixels = np.random.default_rng(len(rows)).integers(0, 255, (side, side), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
            corners = ",".join(map(str, box)) if lesion else ",,,"
            rows.append(f"{name},{corners},{lesion},{split}")
    (folder / "a.csv").write_text("\n".join(rows) + "\n")
    text = NOISE_RECIPE.replace("DATA", str(folder)).replace("NODULE", nodule) + extra
    (folder / "small.yaml").write_text(text)
    return folder / "small.yaml"
