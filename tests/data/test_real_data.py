"""Recipes and readers on real images: Roboflow's COCO, Kvasir-SEG's masks, DeepLesion's 16-bit PNG, NIfTI, DICOM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from umed_plugin.data.build import build_records
from umed_plugin.data.checking.check import check_recipe
from umed_plugin.data.images import load_image
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.records import record_geometry, true_boxes
from umed_plugin.errors import UmedError
from umed_plugin.grounding.boxes import parse_boxes, set_iou

pytestmark = pytest.mark.llava  # pixels are read by MONAI, which needs torch


def test_brain_tumors(real_data: Path, tmp_path: Path) -> None:
    records = build_records(load_recipe("brain_tumor_coco"), out_dir=tmp_path, data_root=real_data / "brain_tumor_coco")
    assert [sum(record["split"] == split for record in records) for split in ("train", "val", "test")] == [154, 20, 4]
    assert sum(len(record["objects"]["ref"]) for record in records) == 233
    assert all(record["terms"]["brain tumor"][0] == "brain tumor" for record in records)
    assert [path.name for path in tmp_path.iterdir()] == [".umed_checked.jsonl"], "JPEGs are used where they lie"
    for record in records:
        told = parse_boxes(record["conversations"][1]["value"])
        assert set_iou(record_geometry(record).from_square(told), true_boxes(record)) > 0.7
        assert record["conversations"][1]["value"].count("brain tumor") == len(told)


def test_brain_tumors_are_brighter_than_their_surroundings(real_data: Path, tmp_path: Path) -> None:
    """Contrast-enhanced tumors: in most images the box is brighter than the image; rows and columns swapped, it is not."""
    records = build_records(load_recipe("brain_tumor_coco"), out_dir=tmp_path, data_root=real_data / "brain_tumor_coco")

    def share_brighter(swap: bool) -> float:
        brighter = []
        for record in records:
            image, _ = load_image(record["image"])
            for x1, y1, x2, y2 in np.array(true_boxes(record)).astype(int):
                inside = image[x1:x2, y1:y2] if swap else image[y1:y2, x1:x2]
                brighter.append(inside.mean() > 1.5 * image.mean())
        return float(np.mean(brighter))

    assert share_brighter(swap=False) > share_brighter(swap=True) + 0.2


def test_deeplesion_is_rendered_in_its_window(real_data: Path, tmp_path: Path) -> None:
    root = real_data / "deeplesion"
    records = build_records(load_recipe("deeplesion_liver"), out_dir=tmp_path, data_root=root)
    assert len(records) == 23
    assert {record["split"] for record in records} == {"val", "test"}
    for record in records:
        shown = np.asarray(Image.open(tmp_path / record["image"]))
        stored = np.asarray(Image.open(root / record["provenance"]["original"])).astype(float) - 32768
        expected = np.clip((stored + 150) / 400, 0, 1) * 255
        assert np.abs(shown[:, :, 0] - expected).max() <= 0.51
        ((x1, y1, x2, y2),) = true_boxes(record)
        # Liver tissue around the lesion: neither air nor bone.
        assert 60 < shown[int(y1) : int(y2), int(x1) : int(x2)].mean() < 220


def test_deeplesions_own_windows_can_be_taken_from_the_csv(real_data: Path, tmp_path: Path) -> None:
    text = Path(load_recipe("deeplesion_liver").path).read_text().replace("window: abdomen", "window: column")
    (tmp_path / "own.yaml").write_text(text)
    (first, *_) = build_records(
        load_recipe(tmp_path / "own.yaml"), out_dir=tmp_path, data_root=real_data / "deeplesion"
    )
    stored = np.asarray(Image.open(real_data / "deeplesion" / first["provenance"]["original"])).astype(float) - 32768
    shown = np.asarray(Image.open(tmp_path / first["image"]))[:, :, 0]
    assert np.abs(shown - np.clip((stored + 175) / 450, 0, 1) * 255).max() <= 0.51


@pytest.mark.parametrize(
    ("name", "folder"),
    [("brain_tumor_coco", "brain_tumor_coco"), ("kvasir_seg_masks", "kvasir_seg"), ("deeplesion_liver", "deeplesion")],
)
def test_checks_pass(real_data: Path, name: str, folder: str) -> None:
    check = check_recipe(load_recipe(name), data_root=real_data / folder)
    assert check.ok, check.faults
    (found,) = check.classes.values()
    assert min(found.best_iou[2]) < min(found.best_iou[3])


def test_an_anatomical_volume_is_turned_as_nibabel_says(real_data: Path) -> None:
    import nibabel

    path = real_data / "nifti" / "anatomical.nii"
    canonical = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    for axis in range(3):
        shown, _ = load_image(path, slice=7, slice_axis=axis, window="full")
        # The file is LAS: along its first axis slices count from the other side than in RAS.
        index = canonical.shape[0] - 1 - 7 if axis == 0 else 7
        expected = np.take(canonical, index, axis=axis).T[::-1, ::-1]
        expected = (expected - expected.min()) / (expected.max() - expected.min()) * 255
        assert np.abs(shown[:, :, 0] - expected).max() <= 0.51


def test_one_volume_of_a_series_is_shown(real_data: Path) -> None:
    """What nibabel itself reads, in all three planes."""
    import nibabel

    path = real_data / "nifti" / "example4d.nii.gz"
    series = nibabel.load(path).get_fdata()
    assert series.shape == (128, 96, 24, 2)
    as_stored = {"orientation": "as_stored", "pixels": "as_stored"}
    for axis in range(3):
        middle = series.shape[axis] // 2
        shown, _ = load_image(path, slice=middle, slice_axis=axis, volume=1, window="full", **as_stored)
        expected = np.take(series[..., 1], middle, axis=axis).T
        expected = (expected - expected.min()) / (expected.max() - expected.min()) * 255
        assert np.abs(shown[:, :, 0] - expected).max() <= 0.51
    with pytest.raises(UmedError, match=r"has 2 volumes and none is chosen.*image\.volume"):
        load_image(path, slice=3)


@pytest.mark.llava
@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm"]
)
def test_real_dicom_files_in_several_transfer_syntaxes(name: str) -> None:
    """These come with pydicom."""
    pydicom_data = pytest.importorskip("pydicom.data")
    import pydicom

    path = pydicom_data.get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"this pydicom has no {name}")
    header = pydicom.dcmread(path)
    values = header.pixel_array * float(getattr(header, "RescaleSlope", 1)) + float(
        getattr(header, "RescaleIntercept", 0)
    )
    low, high = float(values.min()), float(values.max())
    shown, _ = load_image(path, window=(low, high), orientation="as_stored")
    assert np.abs(shown[:, :, 0] - (values - low) / (high - low) * 255).max() <= 0.51


@pytest.mark.llava
@pytest.mark.parametrize("name", ["MR_truncated.dcm", "rtplan.dcm"])
def test_real_dicom_files_without_a_whole_image(name: str) -> None:
    pydicom_data = pytest.importorskip("pydicom.data")
    path = pydicom_data.get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"this pydicom has no {name}")
    with pytest.raises(UmedError, match=name):
        load_image(path)
