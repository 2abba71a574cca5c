"""Every file of the real data is read by something and holds what is known of it, or is here with the reason why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from umed_plugin.data.annotations import read_annotations
from umed_plugin.data.build import build_records
from umed_plugin.data.images import load_image, slice_count
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS
from umed_plugin.evaluation.questions import chosen_questions


def brain_tumors(root: Path, work: Path) -> None:
    records = build_records(load_recipe("brain_tumor_coco"), out_dir=work, data_root=root / "brain_tumor_coco")
    assert (len(records), sum(len(record["objects"]["bbox"]) for record in records)) == (178, 233)
    assert {Path(record["image"]).stat().st_size > 0 for record in records} == {True}
    assert len({record["image"] for record in records}) == len(list((root / "brain_tumor_coco").rglob("*.jpg")))


def liver_lesions(root: Path, work: Path) -> None:
    records = build_records(load_recipe("deeplesion_liver"), out_dir=work, data_root=root / "deeplesion")
    assert len({record["provenance"]["original"] for record in records}) == 23
    assert len(list((root / "deeplesion" / "liver_flat").iterdir())) == 23


def deeplesion_rows(root: Path, work: Path) -> None:
    """14 rows of 13 slices: seven of class -1, which are left out, and seven boxes on six slices, two on one."""
    found = read_annotations(load_recipe("deeplesion"), root / "deeplesion")
    assert found.faults.messages == [] and found.left_out == {"holds an ignored class": 7}
    assert (len(found.missing), sum(len(item.boxes) for item in found.missing)) == (6, 7)


def nih_boxes(root: Path, work: Path) -> None:
    found = read_annotations(load_recipe("nih_cxr14"), root / "nih_cxr14")
    assert (len(found.missing), sum(len(item.boxes) for item in found.missing)) == (880, 984)
    assert len({name for item in found.missing for name in item.classes}) == 8
    # The uploader's row of two labels; and, of Data_Entry's 14 rows, two without a finding whose images are not here.
    assert found.left_out == {"holds an ignored class": 1, "listed as negative, not on disk": 2}


def polyp_boxes(root: Path, work: Path) -> None:
    """11 entries; the images of none of them are here, so they are read as missing."""
    found = read_annotations(load_recipe("kvasir_seg"), root / "kvasir_seg")
    entries = json.loads((root / "kvasir_seg" / "kavsir_bboxes_excerpt.json").read_text())
    assert len(entries) == 11 and found.faults.messages == []
    assert len(found.items) + len(found.missing) == 11
    boxes = sum(len(item.boxes) for item in (*found.items, *found.missing))
    assert boxes == sum(len(entry["bbox"]) for entry in entries.values())


def polyp_masks(root: Path, work: Path) -> None:
    records = build_records(load_recipe("kvasir_seg_masks"), out_dir=work, data_root=root / "kvasir_seg")
    assert len(records) == 5 and all(record["objects"]["bbox"] for record in records)


def rad_rows(root: Path, work: Path) -> None:
    """19 rows about 13 images, of which two are here."""
    there, skipped = chosen_questions(BENCHMARKS["vqa_rad"], root / "vqa_rad", split="train", work=work, skip=True)
    assert len(there) + skipped == 19
    images = sorted({question.image for question in there})
    assert [Path(image).name for image in images] == ["synpic32933.jpg", "synpic42202.jpg"]
    assert all(load_image(image)[0].shape[2] == 3 for image in images)


def slake_rows(root: Path, work: Path) -> None:
    """80 rows, all in English; their images are not here, and stand-ins are drawn."""
    rows = json.loads((root / "slake" / "train_first80.json").read_text())
    assert len(rows) == 80 and {row["q_lang"] for row in rows} == {"en"}
    shutil.copy(root / "slake" / "train_first80.json", work / "train.json")
    for name in {row["img_name"] for row in rows}:
        (work / "imgs" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(work / "imgs" / name)
    questions, skipped = chosen_questions(BENCHMARKS["slake"], work, split="train", work=work)
    assert (len(questions), skipped) == (80, 0)


def volumes(root: Path, work: Path) -> None:
    """Every slice of both, in each plane: no recipe is about them, but they are what recipes' images and `umed serve` may be."""
    shapes = {"anatomical.nii": (33, 41, 25, 1), "example4d.nii.gz": (128, 96, 24, 2)}
    for name, (*lengths, count) in shapes.items():
        path = root / "nifti" / name
        assert [slice_count(path, axis) for axis in range(3)] == lengths
        for axis, length in enumerate(lengths):
            shown = [
                load_image(path, slice=at, slice_axis=axis, volume=count - 1, window="full")[0] for at in range(length)
            ]
            assert len({picture.shape for picture in shown}) == 1 and max(int(np.ptp(one)) for one in shown) == 255


# What reads the files that a pattern names, and of the rest why nothing does.
Reader = Callable[[Path, Path], None]
READ: dict[str, Reader] = {
    "brain_tumor_coco/*/_annotations.coco.json": brain_tumors,
    "brain_tumor_coco/*/*.jpg": brain_tumors,
    "deeplesion/NNProject_liver_image_dataset_info.csv": liver_lesions,
    "deeplesion/liver_flat/*.png": liver_lesions,
    "deeplesion/DL_info_excerpt.csv": deeplesion_rows,
    "nih_cxr14/BBox_List_2017.csv": nih_boxes,
    "nih_cxr14/Data_Entry_2017_v2020_excerpt.csv": nih_boxes,
    "kvasir_seg/kavsir_bboxes_excerpt.json": polyp_boxes,
    "kvasir_seg/images/*.jpg": polyp_masks,
    "kvasir_seg/masks/*.jpg": polyp_masks,
    "vqa_rad/*": rad_rows,
    "slake/train_first80.json": slake_rows,
    "nifti/*.nii*": volumes,
}
NOT_READ = {
    "README.md": "says what the folders hold and under which terms",
    "brain_tumor_coco/README.md": "the title of the data set's repository",
    "nifti/COPYING.nibabel": "the licence of the volumes",
}


def test_every_file_is_read_or_has_a_reason(real_data: Path) -> None:
    names = [str(path.relative_to(real_data)) for path in sorted(real_data.rglob("*")) if path.is_file()]
    patterns = [*READ, *NOT_READ]
    unknown = [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)]
    assert unknown == [], "say what reads them, or why nothing does"
    assert [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in names)] == []


@pytest.mark.llava
@pytest.mark.parametrize("reader", dict.fromkeys(READ.values()), ids=lambda reader: reader.__name__)
def test_what_is_read_holds_what_is_known_of_it(reader: Reader, real_data: Path, tmp_path: Path) -> None:
    reader(real_data, tmp_path)
