"""Whether boxes and words of side stay right in augmented studies: a bright square in images of every format.

    python benchmarks/augmentation.py

Draws images of odd sizes with one bright square each, writes them in every format that the plugin reads, and builds records with
a recipe. Each study is then shown in several epochs as ``--umed_augment`` shows it. What is bright in its pixels is compared with
its box, and where it lies with the answer's words. Half of the answers are the template writer's, half are free text.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BASE, SIDE = 100, 336  # different images of each format; side of the model's square in pixels
BRIGHT = 0.6  # grey level that only the square reaches, whatever gamma, brightness and noise
RULE = "{flips: [left_right, up_down], rotation: 10, zoom: [0.8, 1.5], share: 1}"
RECIPE = """
name: squares
description: Bright squares.
terms: {licence: CC0, url: "https://example.org"}
annotations:
  reader: csv
  files: boxes.csv
  columns: {file: file, box: [x1, y1, x2, y2], lesion: lesion, slice: slice}
image: {window: {low: 0, high: 1000}}
classes: {square: {name: nodule}}
split: {by: patient, fractions: {train: 1.0}}
augment: RULE
"""


def drawn(rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Grey levels in 0-1, [height, width], and the box of the square in them."""
    width, height = (int(value) for value in rng.integers(90, 260, 2))
    picture = rng.uniform(0.05, 0.3) + rng.uniform(0, 0.05, (height, width))
    side = int(rng.integers(16, 40))
    x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
    picture[y : y + side, x : x + side] = 1.0
    return picture, (x, y, x + side, y + side)


def _png(folder: Path, name: str, values: np.ndarray) -> str:
    Image.fromarray(np.rint(values * 255).astype(np.uint8)).save(folder / f"{name}.png")
    return f"{name}.png"


def _jpeg(folder: Path, name: str, values: np.ndarray) -> str:
    Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB").save(folder / f"{name}.jpg", quality=95)
    return f"{name}.jpg"


def _tiff(folder: Path, name: str, values: np.ndarray) -> str:
    Image.fromarray(np.rint(values * 255).astype(np.uint8)).save(folder / f"{name}.tif")
    return f"{name}.tif"


def _png16(folder: Path, name: str, values: np.ndarray) -> str:
    Image.fromarray(np.rint(values * 1000).astype(np.uint16)).save(folder / f"{name}.png")
    return f"{name}.png"


def _dicom(folder: Path, name: str, values: np.ndarray) -> str:
    """Every second one lies mirrored in the file, and is turned for display."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(str(folder / f"{name}.dcm"), {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID, header.Modality = CTImageStorage, generate_uid(), "CT"
    header.Rows, header.Columns = values.shape
    header.BitsAllocated = header.BitsStored = 16
    header.HighBit, header.PixelRepresentation, header.SamplesPerPixel = 15, 1, 1
    header.PhotometricInterpretation, header.RescaleSlope, header.RescaleIntercept = "MONOCHROME2", 1, 0
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0] if int(name) % 2 else [-1, 0, 0, 0, 1, 0]
    header.ImagePositionPatient, header.PixelSpacing = [0, 0, 0], [0.7, 0.7]
    header.PixelData = np.rint(values * 1000).astype(np.int16).tobytes()
    header.save_as(folder / f"{name}.dcm", enforce_file_format=True)
    return f"{name}.dcm"


def _nifti(folder: Path, name: str, values: np.ndarray) -> str:
    """A volume of three slices, of which the second has the square. x is the first axis."""
    import nibabel

    volume = np.stack([values.T * 0.2, values.T, values.T * 0.2], axis=2)
    affine = np.diag([-0.7, -0.7, 2.0, 1.0]) if int(name) % 2 else np.diag([0.7, -0.7, 2.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(np.rint(volume * 1000).astype(np.int16), affine), folder / f"{name}.nii.gz")
    return f"{name}.nii.gz"


FORMATS: dict[str, Callable[[Path, str, np.ndarray], str]] = {
    "png": _png,
    "jpeg": _jpeg,
    "tiff": _tiff,
    "png16": _png16,
    "dicom": _dicom,
    "nifti": _nifti,
}


@dataclass
class Found:
    """What was found in the augmented studies of one format.

    Attributes:
        inside: share of the bright pixels that lie in the box, one for each study.
        filled: share of the box that is bright.
        in_patches: share of the bright pixels in the patches that the box touches: the mask of vision relevance.
        words: studies whose words of place were compared with the pixels; ``wrong`` of them say something else.
        boxes_in_text: studies whose answer has the true box, to its two decimals.
        mirrored: studies that were mirrored.
    """

    inside: list[float] = field(default_factory=list)
    filled: list[float] = field(default_factory=list)
    in_patches: list[float] = field(default_factory=list)
    words: int = 0
    wrong: int = 0
    boxes_in_text: int = 0
    mirrored: int = 0


def make_records(kind: str, count: int, folder: Path, mode: str) -> list[dict[str, Any]]:
    """Records of ``count`` images in one format; every second with free text in place of the template writer's."""
    from umed_plugin.data.build import build_records
    from umed_plugin.data.recipes.recipe import load_recipe
    from umed_plugin.data.records import box_decimals, record_geometry, true_boxes
    from umed_plugin.grounding.boxes import format_box

    folder.mkdir(parents=True)
    with (folder / "boxes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "x1", "y1", "x2", "y2", "lesion", "slice"])
        for number in range(count):
            values, box = drawn(np.random.default_rng([number, *kind.encode()]))
            writer.writerow([FORMATS[kind](folder, str(number), values), *box, "square", 1 if kind == "nifti" else ""])
    (folder / "squares.yaml").write_text(RECIPE.replace("RULE", RULE))
    records = build_records(
        load_recipe(folder / "squares.yaml"),
        out_dir=folder / "built",
        data_root=folder,
        image_aspect_ratio=mode,
        workers=1,
    )
    for record in records[::2]:
        ((x1, y1, x2, y2),) = boxes = record_geometry(record).to_square(true_boxes(record))
        sides = f"{'upper' if y1 + y2 < 1 else 'lower'} {'left' if x1 + x2 < 1 else 'right'}"
        written = format_box(boxes[0], box_decimals(record))
        record["conversations"][1]["value"] = f"There is a nodule in the {sides} part, at {written}."
    return records


def look(record: dict[str, Any], image: Any, epochs: int, processor: Any, found: Found) -> None:
    """Compare pixels, box and words of a record in several epochs."""
    from umed_plugin.data.augmentation.pixels import augment_pixels
    from umed_plugin.data.augmentation.study import augmented_study
    from umed_plugin.data.records import record_geometry, true_boxes
    from umed_plugin.grounding.boxes import parse_boxes

    geometry = record_geometry(record, SIDE)
    (content,) = geometry.to_square([(0, 0, geometry.width, geometry.height)])
    mean, std = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    for epoch in range(epochs):
        study = augmented_study(record, 0, epoch)
        pixels = augment_pixels(image, content, study.move, study.grey, processor).numpy() * std + mean
        rows, columns = np.nonzero(pixels.min(axis=0) > BRIGHT)
        (box,) = geometry.to_square(true_boxes(study.record))
        x1, y1, x2, y2 = (value * SIDE for value in box)
        within = (columns + 1 > x1) & (columns < x2) & (rows + 1 > y1) & (rows < y2)
        found.inside.append(float(within.mean()))
        found.filled.append(float(within.sum() / ((x2 - x1) * (y2 - y1))))
        cover = geometry.patch_cover(true_boxes(study.record)).reshape(geometry.grid, geometry.grid)
        touched = cover[rows // geometry.patch_size, columns // geometry.patch_size] > 0
        found.in_patches.append(float(touched.mean()))
        answer = study.record["conversations"][1]["value"]
        written = parse_boxes(answer)
        found.boxes_in_text += len(written) == 1 and bool(np.abs(np.subtract(written[0], box)).max() < 0.0051)
        found.mirrored += study.move.mirrors
        right = words_right(answer, (columns.mean() + 0.5) / SIDE, (rows.mean() + 0.5) / SIDE)
        found.words += right is not None
        found.wrong += right is False


def words_right(answer: str, x: float, y: float) -> bool | None:
    """Whether the answer's words fit the middle (x, y) in 0-1 of what is bright; None too near to a border between words."""
    free = "part" in answer
    borders = (0.5,) if free else (1 / 3, 2 / 3)
    if min(abs(value - border) for value in (x, y) for border in borders) < 0.02:
        return None
    across = ("left", "right") if free else ("left", "", "right")
    down = ("upper", "lower") if free else ("upper", "", "lower")
    expected = {across[sum(x > border for border in borders)], down[sum(y > border for border in borders)]} - {""}
    said = {word for word in ("left", "right", "upper", "lower") if word in answer}
    return said == expected


def measure(kind: str, studies: int, folder: Path, mode: str = "pad", base: int = BASE) -> Found:
    """Look at ``studies`` augmented studies of one format, of at most ``base`` different images."""
    from transformers import CLIPImageProcessor

    from umed_plugin.data.images.cache import _padded

    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    base = min(base, studies)
    records, found = make_records(kind, base, folder, mode), Found()
    for number, record in enumerate(records):
        picture = Image.open(folder / "built" / record["image"]).convert("RGB")
        square = processor.preprocess(_padded(picture, processor, mode), return_tensors="pt")["pixel_values"][0]
        look(record, square, len(range(number, studies, len(records))), processor, found)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000, help="augmented studies of each format (default: 1000)")
    parser.add_argument("--formats", nargs="*", choices=list(FORMATS), default=list(FORMATS))
    options = parser.parse_args(arguments)
    titles = ("format", "square", "studies", "mirrored", "bright in the box", "box filled", "bright in its patches")
    print("|", " | ".join([*titles, "box in text", "words wrong"]), "|")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(options.formats):
            mode = ("pad", "square")[number % 2]
            found = measure(kind, options.studies, Path(folder) / kind, mode)
            shares = (found.inside, found.filled, found.in_patches)
            cells: list[Any] = [kind, mode, len(found.inside), found.mirrored]
            cells += [f"{np.mean(share):.3f} (least {min(share):.3f})" for share in shares]
            cells += [found.boxes_in_text, f"{found.wrong} of {found.words}"]
            print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
