"""The five sources of MAU: recipes on real rows where there are some, and on made-up files for each quirk."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.drawn import scene, write_png16
from support.source_files import DL_HEADER, dl_row, write_kidney_stones, write_tbx11k

from umed_plugin.data.annotations import read_annotations
from umed_plugin.data.build import build_records
from umed_plugin.data.checking.check import check_recipe
from umed_plugin.data.recipes.recipe import Recipe, load_recipe
from umed_plugin.data.records import true_boxes
from umed_plugin.grounding.boxes import iou_matrix

pytestmark = pytest.mark.one_stack
# In the few images of a test, a split may hold negatives alone, and would keep none of them.
ALL_IN_TRAIN = (("per_positive: 0.5", "per_positive: 9"), ("  seed: 0\n", "  seed: 0\n  fractions: {train: 1.0}\n"))


def own_recipe(name: str, folder: Path, *changes: tuple[str, str]) -> Recipe:
    """A shipped recipe with some of its text changed, as a user would."""
    text = Path(load_recipe(name).path).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / f"{name}.yaml").write_text(text)
    return load_recipe(folder / f"{name}.yaml")


def test_deeplesions_real_rows(real_data: Path) -> None:
    """14 rows of 13 slices: seven of the unknown type, two on one slice. Their images are not here."""
    found = read_annotations(load_recipe("deeplesion"), real_data / "deeplesion")
    assert found.faults.messages == []
    assert found.left_out == {"holds an ignored class": 7}
    root = real_data / "deeplesion" / "Images_png"
    assert {str(item.image.relative_to(root)): len(item.boxes) for item in found.missing} == {
        "000090_01_01/115.png": 1,
        "000090_02_01/056.png": 1,
        "000090_03_02/073.png": 1,
        "000091_01_02/004.png": 1,
        "000091_03_01/093.png": 2,
        "000091_04_01/090.png": 1,
    }
    told = {item.image.name: (item.classes, item.patient, item.window) for item in found.missing}
    assert told["093.png"] == (["abdominal lesion"] * 2, "91", (-175, 275))
    assert told["090.png"] == (["mediastinal lesion"], "91", (-177.5, 307.5))
    assert len({item.split for item in found.missing if item.patient == "91"}) == 1


@pytest.mark.llava
def test_deeplesions_liver_rows_by_the_full_recipe(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """23 real rows with their images, laid out as the archives are, and as Key_slices/ is: both give the same pictures."""
    flat = real_data / "deeplesion" / "liver_flat"
    monkeypatch.setenv("UMED_LINKED_ROOTS", str(flat))
    pictures = {}
    for layout in ("Images_png", "Key_slices"):
        root = tmp_path / layout
        for image in flat.iterdir():
            series, slice_name = image.name.rsplit("_", 1)
            target = root / layout / (f"{series}/{slice_name}" if layout == "Images_png" else image.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(image)
        rows = (real_data / "deeplesion" / "NNProject_liver_image_dataset_info.csv").read_text()
        (root / "DL_info.csv").write_text(rows)
        records = build_records(load_recipe("deeplesion"), out_dir=root / "out", data_root=root)
        assert len(records) == 23
        assert {name for record in records for name in record["objects"]["ref"]} == {"liver lesion"}
        pictures[layout] = [np.asarray(Image.open(root / "out" / record["image"])) for record in records]
        for record, shown in zip(records, pictures[layout]):
            ((x1, y1, x2, y2),) = true_boxes(record)
            assert 60 < shown[int(y1) : int(y2), int(x1) : int(x2)].mean() < 220
    assert all(np.array_equal(one, other) for one, other in zip(*pictures.values()))


@pytest.mark.llava
def test_deeplesions_quirks(tmp_path: Path) -> None:
    """Values stand for Hounsfield units by the offset, each slice has its window, boxes may stick out by RECIST's 5 px."""
    (tmp_path / "Images_png" / "000007_01_01").mkdir(parents=True)
    for number in (12, 13, 14, 15):
        write_png16(tmp_path / "Images_png" / "000007_01_01" / f"{number:03}.png", scene())
    rows = [
        dl_row("000007_01_01_012.png", "11, 7, 42, 19", 5, "-1500, 500"),
        dl_row("000007_01_01_012.png", "-4.5, 30.25, 20, 40", 2, "-1500, 500"),
        dl_row("000007_01_01_013.png", "11, 7, 42, 19", 5, "-177.5, 307.5"),
        dl_row("000007_01_01_014.png", "11, 7, 42, 19", 5, noisy=1),
        dl_row("000007_01_01_014.png", "50, 7, 60, 19", 5),
        dl_row("000007_01_01_015.png", "11, 7, 42, 19", -1),
    ]
    (tmp_path / "DL_info.csv").write_text(DL_HEADER + "".join(rows))
    recipe = load_recipe("deeplesion")
    first, second = build_records(recipe, out_dir=tmp_path / "out", data_root=tmp_path)
    assert first["objects"]["ref"] == ["lung lesion", "abdominal lesion"]
    assert true_boxes(first) == [(11, 7, 42, 19), (0, 30.25, 20, 40)]
    assert first["split"] == second["split"]
    assert read_annotations(recipe, tmp_path).left_out == {"Possibly_noisy is 1": 1, "holds an ignored class": 1}
    for record, low, high in ((first, -1500, 500), (second, -177.5, 307.5)):
        shown = np.asarray(Image.open(tmp_path / "out" / record["image"]))[:, :, 0]
        units = np.rint(scene() * 2000 - 1000)
        assert np.abs(shown - np.clip((units - low) / (high - low), 0, 1) * 255).max() <= 0.51
    (tmp_path / "DL_info.csv").write_text(DL_HEADER + rows[0].replace("11, 7", "-6, 7"))
    (fault,) = check_recipe(recipe, data_root=tmp_path).faults
    assert re.search(r"leaves 012.png \(97x61\) by 6.0 px. Allowed: 5", fault)


def test_nihs_real_boxes(real_data: Path) -> None:
    """984 boxes in 880 images of 8 classes, and the uploader's row, which is left out. Its images are not here."""
    found = read_annotations(load_recipe("nih_cxr14"), real_data / "nih_cxr14")
    assert found.faults.messages == []
    assert (len(found.missing), sum(len(item.boxes) for item in found.missing)) == (880, 984)
    assert len({name for item in found.missing for name in item.classes}) == 8
    assert sum(item.classes.count("infiltration") for item in found.missing) == 123
    assert found.left_out == {"holds an ignored class": 1, "listed as negative, not on disk": 2}
    assert all(item.patient == item.image.name[:8] for item in found.missing)
    for box in (box for item in found.missing for box in item.boxes):
        assert 0 <= box[0] < box[2] <= 1024
        assert 0 <= box[1] < box[3] <= 1024
    by_patient: dict[str, set[str]] = {}
    for item in found.missing:
        by_patient.setdefault(item.patient, set()).add(item.split)
    assert all(len(splits) == 1 for splits in by_patient.values())
    shares = [sum(item.split == split for item in found.missing) / 880 for split in ("train", "val", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.04)


@pytest.mark.llava
def test_nihs_folders_header_and_negatives(tmp_path: Path) -> None:
    """Twelve archives, a title split over four columns, `Infiltrate`, and patients that Data_Entry writes without zeros."""
    grey = Image.fromarray(np.full((1024, 1024), 90, np.uint8))
    for part, names in {
        "images_001/images": ("00000013_002.png", "00000013_000.png"),
        "images_012/images": ("00030801_001.png",),
        "images": ("00000500_000.png", "00000501_000.png"),
    }.items():
        (tmp_path / part).mkdir(parents=True)
        for name in names:
            grey.save(tmp_path / part / name)
    (tmp_path / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "00000013_002.png,Infiltrate,225.5,547.25,86.75,79\n"
        "00000013_002.png,Effusion,10,20,30,40\n"
        "00030801_001.png,Mass,700,700,300,324\n"
    )
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text(
        "Image Index,Finding Labels,Follow-up #,Patient ID\n"
        "00000013_002.png,Effusion|Infiltration,2,13\n"
        "00000013_000.png,No Finding,0,13\n"
        "00000500_000.png,Hernia,0,500\n"
        "00000501_000.png,No Finding,0,501\n"
        "00000777_000.png,No Finding,0,777\n"
    )
    recipe = own_recipe("nih_cxr14", tmp_path, *ALL_IN_TRAIN)
    found = read_annotations(recipe, tmp_path)
    assert found.faults.messages == []
    told = {item.image.name: item for item in found.items}
    assert {name: item.classes for name, item in told.items()} == {
        "00000013_002.png": ["infiltration", "pleural effusion"],
        "00030801_001.png": ["mass"],
        "00000013_000.png": [],
        "00000501_000.png": [],
    }
    assert told["00000013_002.png"].boxes == [(225.5, 547.25, 312.25, 626.25), (10, 20, 40, 60)]
    assert told["00000013_000.png"].patient == told["00000013_002.png"].patient == "00000013"
    assert found.left_out == {"listed as negative, not on disk": 1}
    assert check_recipe(recipe, data_root=tmp_path).ok


@pytest.mark.llava
def test_kvasirs_real_boxes_and_masks_agree(real_data: Path, tmp_path: Path) -> None:
    """11 entries, 5 with their image, of which one has a sliver at the border; grey JPEG masks give the same boxes."""
    root = real_data / "kvasir_seg"
    found = read_annotations(load_recipe("kvasir_seg"), root)
    assert found.faults.messages == []
    assert (len(found.items), len(found.missing)) == (5, 6)
    assert sum(len(item.boxes) for item in found.items + found.missing) == 15
    published = build_records(load_recipe("kvasir_seg"), out_dir=tmp_path, data_root=root, on_bad_image="skip")
    drawn = build_records(load_recipe("kvasir_seg_masks"), out_dir=tmp_path, data_root=root)
    for one, other in zip(published, drawn):
        assert (one["image"], one["split"], one["image_size"]) == (other["image"], other["split"], other["image_size"])
        overlaps = iou_matrix(true_boxes(one), true_boxes(other))
        assert overlaps.shape[0] == overlaps.shape[1]
        assert overlaps.max(axis=0).min() > 0.95
    assert sum(len(record["objects"]["ref"]) for record in published) == 6


@pytest.mark.llava
def test_kvasirs_slivers_and_grey_masks(tmp_path: Path) -> None:
    """A sliver beside a polyp goes; an image with a sliver alone is left out, as it is no negative."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for name, regions in {"a": [(30, 20, 70, 50), (97, 10, 100, 40)], "b": [(97, 10, 100, 40)]}.items():
        mask = np.full((60, 100), 12, np.uint8)
        for x1, y1, x2, y2 in regions:
            mask[y1:y2, x1:x2] = 241
        Image.fromarray(mask).save(tmp_path / "images" / f"{name}.jpg")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.jpg", quality=60)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "masks" / "a.jpg")))) > 10
    check = check_recipe(load_recipe("kvasir_seg_masks"), data_root=tmp_path)
    assert check.ok, check.faults
    assert check.classes["polyp"].sides == [(40, 30)]
    assert check.annotations.dropped_boxes == 2
    assert check.annotations.left_out == {"only degenerate boxes": 1}


@pytest.mark.llava
def test_tbx11k(tmp_path: Path) -> None:
    """Test labels are withheld, so train and val are dealt out anew; only an X-ray of a healthy person is a negative."""
    boxes = write_tbx11k(tmp_path)
    recipe = own_recipe("tbx11k", tmp_path, *ALL_IN_TRAIN)
    found = read_annotations(recipe, tmp_path)
    assert found.faults.messages == []
    told = {str(item.image.relative_to(tmp_path / "imgs")): item for item in found.items}
    assert set(told) == {"tb/tb0003.png", "tb/tb0004.png", *(name for name in boxes if name.startswith("health"))}
    assert found.left_out["without a lesion, but not one of negatives.only"] == 2
    assert told["tb/tb0004.png"].classes == ["obsolete pulmonary tuberculosis", "active tuberculosis"]
    np.testing.assert_allclose(told["tb/tb0003.png"].boxes, [boxes["tb/tb0003.png"][0][1]])
    assert check_recipe(recipe, data_root=tmp_path).ok


@pytest.mark.llava
def test_tbx11ks_xml_is_in_another_resolution_than_its_images(tmp_path: Path) -> None:
    boxes = write_tbx11k(tmp_path)
    text = Path(load_recipe("tbx11k").path).read_text()
    start, end = text.index("annotations:"), text.index("classes:")
    xml = "annotations: {reader: voc, convention: half_open, files: 'annotations/xml/*.xml', image_root: imgs}\n"
    (tmp_path / "xml.yaml").write_text(text[:start] + xml + text[end:])
    faults = check_recipe(load_recipe(tmp_path / "xml.yaml"), data_root=tmp_path).faults
    assert all("is 2048x2560, but the file is 512x512" in fault for fault in faults)
    assert "If only the size differs: image: {other_size: stretch}" in faults[0]
    (tmp_path / "xml.yaml").write_text(text[:start] + xml + "image: {other_size: scale}\n" + text[end:])
    faults = check_recipe(load_recipe(tmp_path / "xml.yaml"), data_root=tmp_path).faults
    assert all("The ratio of the sides differs" in fault for fault in faults)
    assert faults
    (tmp_path / "xml.yaml").write_text(text[:start] + xml + "image: {other_size: stretch}\n" + text[end:])
    records = build_records(load_recipe(tmp_path / "xml.yaml"), out_dir=tmp_path / "out", data_root=tmp_path)
    by_name = {record["provenance"]["original"]: record for record in records}
    for name, expected in boxes.items():
        if expected:
            record = by_name[f"imgs/{name}"]
            in_order = sorted((box for _, box in expected), key=lambda box: box[1])
            np.testing.assert_allclose(true_boxes(record), in_order, atol=0.25)


@pytest.mark.llava
def test_kidney_stones(tmp_path: Path) -> None:
    write_kidney_stones(tmp_path)
    found = read_annotations(load_recipe("kidney_stone"), tmp_path)
    assert found.faults.messages == []
    slices: dict[str, set[str]] = {}
    for item in found.items:
        slices.setdefault(item.patient, set()).add(item.split)
    assert set(slices) == {f"1-3-46-670589-33-1-{stem:03}_png" for stem in range(60)}
    assert all(len(splits) == 1 for splits in slices.values())
    per_split = {split: [item.patient for item in found.items if item.split == split] for split in ("train", "test")}
    assert len(per_split["train"]) == 3 * len(set(per_split["train"]))
    assert len(per_split["test"]) == len(set(per_split["test"])) > 0
    check = check_recipe(load_recipe("kidney_stone"), data_root=tmp_path)
    assert check.ok
    sides = np.array(check.classes["kidney stone"].sides)
    np.testing.assert_allclose(sides, np.broadcast_to([11, 9], sides.shape), atol=1e-3)
    assert sum(check.negatives.values()) == 0
    for item in found.items[:10]:
        x1, y1, x2, y2 = (np.array(item.boxes[0]) * [391, 320, 391, 320]).round().astype(int)
        shown = np.asarray(Image.open(item.image))[:, :, 0]
        assert shown[y1:y2, x1:x2].min() > 200
        assert shown[y1 - 6 : y1 - 3, x1 - 6 : x2 + 6].max() < 160
