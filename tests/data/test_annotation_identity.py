"""Mistakes about whose a box is: an image of several entries, an entry of several images, and the patient of an image."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.annotation_files import (
    ALL_IN_TRAIN,
    BOX,
    COCO,
    CSV,
    HEAD,
    JSON,
    MASK,
    OTHER,
    VOC,
    YOLO,
    an_object,
    boxes,
    coco,
    put,
    read,
    xml,
)
from support.drawn import write_dicom, write_nifti, write_recipe

from umed_plugin.data.annotations import read_annotations
from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.annotations.merging import without_repeated_images
from umed_plugin.data.build import build_records
from umed_plugin.data.checking.check import check_recipe
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError
from umed_plugin.faults import Faults


def twice_in_coco(folder: Path) -> str:
    coco(folder, [(1, "a.png"), (2, "a.png")], [(1, [10, 20, 20, 20], {}), (2, [50, 50, 20, 20], {})])
    return COCO % ""


def twice_in_csv_by_another_path(folder: Path) -> str:
    put(folder / "s" / "x")
    put(folder / "a.csv", HEAD + "a.png,10,20,30,40,nod\ns/../a.png,50,50,70,70,nod\n")
    return CSV % ""


def twice_in_csv_by_a_link(folder: Path) -> str:
    (folder / "b.png").symlink_to(folder / "a.png")
    put(folder / "a.csv", HEAD + "a.png,10,20,30,40,nod\nb.png,50,50,70,70,nod\n")
    return CSV % ""


def twice_in_a_json_list(folder: Path) -> str:
    put(folder / "a.json", json.dumps([{"n": "a.png", "b": [{"at": BOX}]}, {"n": "a.png", "b": [{"at": OTHER}]}]))
    return (JSON % "").replace("{key}", "{n}")


def twice_in_voc(folder: Path) -> str:
    (folder / "img").symlink_to(folder)
    put(folder / "xml" / "1.xml", xml("a.png", an_object()))
    put(folder / "xml" / "2.xml", xml("a.png", an_object((51, 51, 70, 70))))
    return VOC % ""


@pytest.mark.parametrize(
    "write",
    [twice_in_coco, twice_in_csv_by_another_path, twice_in_csv_by_a_link, twice_in_a_json_list, twice_in_voc],
)
def test_entries_of_one_image_are_one_record(tmp_path: Path, write: Callable[[Path], str]) -> None:
    put(tmp_path / "a.png")
    found = read(tmp_path, write(tmp_path))
    assert list(boxes(found).values()) == [[BOX, OTHER]]
    assert sum("1 entries are about an image that has one" in remark for remark in found.faults.remarks) == 1


@pytest.mark.llava
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("", "says that a.png is 200x160, but the file is 100x80"),
        (
            "image: {other_size: scale}",
            "but only one of the two states a size ((200, 160)), and image.other_size scales",
        ),
    ],
)
def test_a_size_that_one_of_two_entries_states_is_kept(tmp_path: Path, first: int, image: str, words: str) -> None:
    put(tmp_path / "a.png", np.zeros((80, 100), np.uint8))
    entries = [{"id": 1, "width": 0, "height": 0}, {"id": 2, "width": 200, "height": 160}]
    entries = [{**entry, "file_name": "a.png"} for entry in (entries[first], entries[1 - first])]
    coco(tmp_path, [], [(1, [1, 1, 8, 8], {}), (2, [100, 100, 90, 50], {})])
    content = json.loads((tmp_path / "a.json").read_text())
    put(tmp_path / "a.json", json.dumps({**content, "images": entries}))
    recipe = load_recipe(write_recipe(tmp_path, COCO % "", ALL_IN_TRAIN, image))
    with pytest.raises(UmedError) as caught:
        build_records(recipe, out_dir=tmp_path / "out", workers=1)
    assert words in str(caught.value)


def test_a_patient_that_one_of_two_entries_names_is_kept(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    items = [
        Annotated(tmp_path / "a.png", [box], ["nod"], "x", patient=name) for box, name in ((BOX, ""), (OTHER, "p7"))
    ]
    put(tmp_path / "a.csv", HEAD + "a.png,10,20,30,40,nod\n")
    recipe = load_recipe(write_recipe(tmp_path, CSV % "", ALL_IN_TRAIN))
    (item,) = without_repeated_images(items, recipe, Faults())
    assert (item.boxes, item.patient) == ([BOX, OTHER], "p7")


@pytest.mark.llava
@pytest.mark.parametrize("name", ["a.png", "v.nii.gz"])
def test_a_file_with_one_slice_named_with_and_without_it_is_one_record(tmp_path: Path, name: str) -> None:
    values = np.arange(8000, dtype=np.uint8).reshape(80, 100)
    put(tmp_path / "a.png", values)
    write_nifti(tmp_path / "v.nii.gz", values.T[:, :, None] / 255, np.diag([-1.0, -1, 1, 1]))
    put(tmp_path / "a.csv", f"f,x1,y1,x2,y2,c,s\n{name},10,20,30,40,nod,\n{name},50,50,70,70,nod,0\n")
    annotations = CSV.replace("lesion: c", "lesion: c, slice: s") % ""
    recipe = load_recipe(write_recipe(tmp_path, annotations, ALL_IN_TRAIN))
    (record,) = build_records(recipe, out_dir=tmp_path / "out", workers=1)
    assert record["id"] == f"drawn/{name}"
    assert record["objects"]["bbox"] == [list(BOX), list(OTHER)]


def test_slice_0_of_several_is_not_the_whole_file(tmp_path: Path) -> None:
    first, second = (Image.fromarray(np.zeros((80, 100), np.uint8)) for _ in range(2))
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    put(tmp_path / "a.csv", "f,x1,y1,x2,y2,c,s\na.tif,10,20,30,40,nod,\na.tif,50,50,70,70,nod,0\n")
    found = read(tmp_path, CSV.replace("lesion: c", "lesion: c, slice: s") % "")
    assert [item.slice for item in found.items] == [None, 0]


def test_an_image_listed_as_negative_under_two_names_is_one(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        put(tmp_path / f"{name}.png")
    (tmp_path / "link.png").symlink_to("b.png")
    put(tmp_path / "a.csv", HEAD + "a.png,10,20,30,40,nod\n")
    put(tmp_path / "n.csv", "f,s\nb.png,train\n./b.png,train\nlink.png,train\nc.png,train\n./c.png,train\n")
    listed = "negatives: {listed: {files: n.csv, file: f}}\n"
    assert sorted(boxes(read(tmp_path, CSV % "", extra=listed))) == ["a.png", "b.png", "c.png"]
    rows = "negatives: {listed: {files: n.csv, file: f, only_rows: {s: [normal]}}}\n"
    put(tmp_path / "n.csv", "f,s\nb.png,normal\n./b.png,nodule\nc.png,normal\n")
    found = read(tmp_path, CSV % "", extra=rows)
    assert sorted(boxes(found)) == ["a.png", "c.png"]
    assert found.left_out == {"listed as negative, but not in all of its rows": 1}


@pytest.mark.llava
def test_two_records_of_one_id_are_refused(tmp_path: Path) -> None:
    for number, name in enumerate(("a.png", "disk/a.png")):
        put(tmp_path / name, np.full((80, 100), number, np.uint8))
    (tmp_path / "disk" / "sub").mkdir()
    (tmp_path / "sub").symlink_to(tmp_path / "disk" / "sub")
    put(tmp_path / "a.csv", HEAD + "a.png,10,20,30,40,nod\nsub/../a.png,10,20,30,40,nod\n")
    recipe = load_recipe(write_recipe(tmp_path, CSV % "", ALL_IN_TRAIN))
    with pytest.raises(
        UmedError, match=r"1 records have the id of another one. The first: 'drawn/a.png', of .*/a.png and"
    ):
        build_records(recipe, out_dir=tmp_path / "out", workers=1)
    (said,) = check_recipe(recipe).faults
    assert "drawn/a.png: is the id of 2 records" in said


def one_coco_id_for_two_files(folder: Path) -> str:
    coco(folder, [(1, "a.png"), (1, "b.png")], [(1, [10, 10, 20, 20], {})])
    return COCO % ""


def one_coco_category_for_two_names(folder: Path) -> str:
    coco(folder, [(1, "a.png")], [], categories=[{"id": 1, "name": "nod"}, {"id": 1, "name": "cy"}])
    return COCO % ""


def one_json_key_for_two_entries(folder: Path) -> str:
    put(folder / "a.json", '{"a.png": {"b": []}, "a.png": {"b": []}}')
    return JSON % ""


def one_label_file_for_two_images(folder: Path) -> str:
    for name in ("images/a.png", "images/a.jpg"):
        put(folder / name)
    put(folder / "labels" / "a.txt", "0 0.5 0.5 0.2 0.2")
    return YOLO % ""


def one_mask_for_two_images(folder: Path) -> str:
    for name in ("i/a.png", "i/a.jpg"):
        put(folder / name)
    put(folder / "m" / "a.png", np.zeros((8, 9), np.uint8))
    return (MASK % "").replace("i/*.png", "i/a.*")


def one_name_in_two_folders(folder: Path) -> str:
    for name in ("p1/images/1.png", "p2/images/1.png"):
        put(folder / name)
    put(folder / "a.csv", HEAD + "1.png,1,2,30,40,nod\n")
    return CSV % ", image_root: 'p*/images'"


def one_title_for_two_columns(folder: Path) -> str:
    put(folder / "a.csv", "f,x1,y1,x2,y2,c,x1\na.png,1,2,30,40,nod,5\n")
    return CSV % ""


def with_and_without_a_box(folder: Path) -> str:
    coco(folder, [(1, "a.png"), (2, "./a.png")], [(1, [10, 10, 20, 20], {})])
    return COCO % ""


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (one_coco_id_for_two_files, "image 1: is 'a.png' and 'b.png'. Nothing says whose the boxes are"),
        (one_coco_category_for_two_names, "category 1: is named 'nod' and 'cy'"),
        (one_json_key_for_two_entries, "the key 'a.png' appears twice in one object"),
        (one_label_file_for_two_images, "labels/a.txt: fits "),
        (one_mask_for_two_images, "m/a.png: is the mask of "),
        (one_name_in_two_folders, "p1/images/1.png: is in "),
        (one_title_for_two_columns, "a.csv: has 2 columns 'x1' (annotations.columns.box)"),
        (with_and_without_a_box, "but only one of the two has a box"),
    ],
)
def test_what_identifies_an_image_must_be_unique(tmp_path: Path, write: Callable[[Path], str], words: str) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    (message,) = read(tmp_path, write(tmp_path)).faults.messages
    assert words in message


def test_an_image_in_two_splits_is_a_fault(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    for name in ("train.csv", "val.csv"):
        put(tmp_path / name, HEAD + "a.png,10,20,30,40,nod\n")
    files = (CSV % "").replace("a.csv", "{train: train.csv, val: val.csv}")
    (message,) = read(tmp_path, files, "{by: file}").faults.messages
    assert "but in split val, and there in train" in message
    assert boxes(read(tmp_path, files)) == {"a.png": [BOX]}


def test_an_image_in_two_sources_of_a_mixture_is_a_fault(tmp_path: Path) -> None:
    for name in ("one", "two"):
        text = write_recipe(tmp_path, CSV % "", ALL_IN_TRAIN).read_text()
        put(tmp_path / f"{name}.yaml", text.replace("name: drawn", f"name: {name}", 1))
    put(tmp_path / "d" / "a.png")
    put(tmp_path / "d" / "a.csv", HEAD + "a.png,10,20,30,40,nod\n")
    mixture = "name: m\ndescription: d\nsources: {one.yaml: {folder: d}, two.yaml: {folder: d}}\nsize: 2\n"
    put(tmp_path / "m.yaml", mixture)
    (message,) = read_annotations(load_recipe(tmp_path / "m.yaml"), tmp_path).faults.messages
    assert "one and two both describe" in message
    put(tmp_path / "two.yaml", (tmp_path / "one.yaml").read_text())
    with pytest.raises(UmedError, match=r"sources\.two\.yaml: has the name 'one', like one\.yaml"):
        load_recipe(tmp_path / "m.yaml")


# Patients


def test_a_folder_named_by_its_uid_has_no_ending(tmp_path: Path) -> None:
    names = [f"1.2.826.0.1.3680043.8.498.{1000 + i}" for i in range(12)]
    for name in names:
        put(tmp_path / name / "1.dcm")
    put(tmp_path / "a.csv", HEAD + "".join(f"{name},10,20,30,40,nod\n" for name in names))
    found = read(tmp_path, CSV % "", "{by: patient}")
    assert sorted(item.patient for item in found.items) == names
    assert all(item.patient_is_file for item in found.items), "nothing names the patient"


@pytest.mark.parametrize(
    ("letter", "pattern", "fault", "remark"),
    [
        ("p09", r"^(p\d+)_", "matches 0 of 40 names that need it; not 'p00-00.png'", ""),
        ("q", r"^(p\d+)-", "", "matches 36 of 40 names that need it; not 'q-0.png'"),
        ("p09", r"^(p\d+)-", "", ""),
    ],
)
def test_a_patient_pattern_says_what_it_does_not_match(
    tmp_path: Path, letter: str, pattern: str, fault: str, remark: str
) -> None:
    names = [f"p{i // 4:02}-{i:02}.png" for i in range(36)] + [f"{letter}-{i}.png" for i in range(4)]
    for name in names:
        put(tmp_path / name)
    put(tmp_path / "a.csv", HEAD + "".join(f"{name},10,20,30,40,nod\n" for name in names))
    faults = read(tmp_path, CSV % "", f"{{by: patient, patient_pattern: '{pattern}'}}").faults
    told = [line for line in faults.remarks if "patient_pattern" in line]
    assert len(faults.messages) == bool(fault)
    assert all(fault in message for message in faults.messages)
    assert len(told) == bool(remark)
    assert all(remark in line for line in told)


def test_a_pattern_with_a_slash_is_matched_with_the_path(tmp_path: Path) -> None:
    for name in ("LIDC-1/a/1.png", "LIDC-1/b/1.png", "LIDC-2/a/1.png"):
        put(tmp_path / name)
    put(
        tmp_path / "a.csv",
        HEAD + "".join(f"LIDC-{n},10,20,30,40,nod\n" for n in ("1/a/1.png", "1/b/1.png", "2/a/1.png")),
    )
    found = read(tmp_path, CSV % "", "{by: patient, patient_pattern: '^([^/]+)/'}")
    assert [item.patient for item in found.items] == ["LIDC-1", "LIDC-1", "LIDC-2"]
    assert not any(item.patient_is_file for item in found.items)


@pytest.mark.llava  # writing DICOM needs pydicom 3
def test_patients_by_the_header_of_dicom_files(tmp_path: Path) -> None:
    for i in range(20):
        write_dicom(tmp_path / f"{i}.dcm", np.zeros((4, 4)), PatientID=f"secret-{i // 4}")
    put(tmp_path / "a.csv", HEAD + "".join(f"{i}.dcm,0,0,3,3,nod\n" for i in range(20)))
    by_name = read(tmp_path, CSV % "", "{by: patient}")
    (remark,) = [line for line in by_name.faults.remarks if "PatientID" in line]
    assert "patients are in more than one split by the PatientID of their DICOM headers" in remark
    assert "secret" not in remark
    by_header = read(tmp_path, CSV % "", "{by: patient, patient: header}")
    groups = {item.patient for item in by_header.items}
    assert len(groups) == 5
    assert not any("secret" in patient for patient in groups)
    assert not [line for line in by_header.faults.remarks if "PatientID" in line]
    assert all(len({item.split for item in by_header.items if item.patient == group}) == 1 for group in groups)


def test_empty_splits_and_a_patient_with_most_images_are_told(tmp_path: Path) -> None:
    for i in range(12):
        put(tmp_path / f"p-{i}.png")
    put(tmp_path / "a.csv", HEAD + "".join(f"p-{i}.png,10,20,30,40,nod\n" for i in range(12)))
    remarks = read(tmp_path, CSV % "", "{by: patient, patient_pattern: '^(p)-'}").faults.remarks
    assert any("patient 'p' has 12 of 12 images" in line for line in remarks)
    assert sum("is empty: 10% of 1 patients was asked for" in line for line in remarks) == 2
