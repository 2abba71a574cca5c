"""Real mistakes of annotation files, each with what must come out: the right record, a fault, or a remark with a number.

Most are from public reports on COCO, VOC, YOLO, CSV and masks. No test here shows an image, so none needs torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from PIL import Image
from support.drawn import write_dicom, write_recipe

from umed_plugin.data.annotations import AnnotationSet, read_annotations
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError

ALL_IN_TRAIN = "{by: patient, fractions: {train: 1}}"
CSV = "{reader: csv, files: a.csv, columns: {file: f, box: [x1, y1, x2, y2], lesion: c}%s}"
COCO = "{reader: coco, files: a.json%s}"
JSON = "{reader: json, files: a.json, image: '{key}', boxes: b, box: at, only_class: nod%s}"
VOC = "{reader: voc, files: 'xml/*.xml', image_root: img%s}"
YOLO = "{reader: yolo, files: labels, image_root: images, names: [nod, cy]%s}"
MASK = "{reader: mask, files: 'i/*.png', masks: 'm/{stem}.png', only_class: nod%s}"
HEAD = "f,x1,y1,x2,y2,c\n"
BOX = (10.0, 20.0, 30.0, 40.0)
OTHER = (50.0, 50.0, 70.0, 70.0)


def put(path: Path, content: Any = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else str(content).encode())


def read(folder: Path, annotations: str, split: str = ALL_IN_TRAIN, extra: str = "") -> AnnotationSet:
    return read_annotations(load_recipe(write_recipe(folder, annotations, split, extra)))


def boxes(found: AnnotationSet) -> dict[str, list[tuple[float, ...]]]:
    """Name of the image below the data root -> its boxes; no fault may have been found."""
    assert found.faults.messages == []
    return {os.path.relpath(item.image, found.root): item.boxes for item in found.items}


def coco(folder: Path, images: list[Any], annotations: list[Any], **more: Any) -> None:
    """Images are (id, file), annotations (image, bbox, further fields)."""
    content = {
        "images": [{"id": i, "file_name": name, "width": 100, "height": 80} for i, name in images],
        "annotations": [
            {"id": i, "image_id": image, "category_id": 1, "bbox": box, **fields}
            for i, (image, box, fields) in enumerate(annotations)
        ],
        "categories": [{"id": 1, "name": "nod"}],
    }
    put(folder / "a.json", json.dumps({**content, **more}))


def xml(name: str, *objects: str, size: str = "") -> str:
    return f"<annotation><filename>{name}</filename>{size}{''.join(objects)}</annotation>"


def an_object(box: tuple[int, ...] = (11, 21, 30, 40), more: str = "") -> str:
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>nod</name>{more}<bndbox>{corners}</bndbox></object>"


# One image of several entries, or one entry of several images


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


# What was annotated never becomes a negative


def two_regions(first: int, second: int) -> np.ndarray:
    values = np.zeros((80, 100), np.uint8)
    values[10:30, 10:30], values[50:70, 50:70] = first, second
    return values


@pytest.mark.parametrize(
    ("values", "more", "words"),
    [
        (two_regions(1, 2), "", "has 2 painted regions below annotations.threshold 128; it holds the values 1, 2"),
        (two_regions(100, 100), "", "2 painted regions below annotations.threshold 128; it holds the values 100"),
        (two_regions(100, 255), "", "1 painted regions below annotations.threshold 128; it holds the values 100, 255"),
        (two_regions(1, 2), ", threshold: 1", ""),
        (two_regions(255, 255), "", ""),
        (two_regions(1, 1), "", ""),
    ],
)
def test_masks_below_the_threshold(tmp_path: Path, values: np.ndarray, more: str, words: str) -> None:
    put(tmp_path / "i" / "a.png", values)
    put(tmp_path / "m" / "a.png", values)
    found = read(tmp_path, MASK % more)
    if words:
        (message,) = found.faults.messages
        assert words in message
    else:
        assert boxes(found) == {"i/a.png": [(10, 10, 30, 30), (50, 50, 70, 70)]}


def test_a_mask_in_the_alpha_channel_is_a_fault(tmp_path: Path) -> None:
    values = np.zeros((80, 100, 4), np.uint8)
    values[10:30, 10:30, 3] = 255
    put(tmp_path / "i" / "a.png")
    put(tmp_path / "m" / "a.png", values)
    (message,) = read(tmp_path, MASK % "").faults.messages
    assert "its shape in the alpha channel" in message


def test_values_of_one_class_stay_apart_and_a_mask_of_specks_is_left_out(tmp_path: Path) -> None:
    touching = np.zeros((80, 100), np.uint8)
    touching[10:20, 10:20], touching[20:30, 10:20] = 1, 2
    put(tmp_path / "i" / "a.png")
    put(tmp_path / "m" / "a.png", touching)
    annotations = (MASK % "").replace("only_class: nod", "values: {1: nod, 2: nod, 3: cy}")
    found = read(tmp_path, annotations)
    assert boxes(found) == {"i/a.png": [(10, 10, 20, 20), (10, 20, 20, 30)]}
    assert any("annotations.values: nothing in the data is '3'" in line for line in found.faults.remarks)
    found = read(tmp_path, annotations.replace("}}", "}, min_area: 500}"))
    assert found.items == []
    assert found.left_out == {"all of its boxes are left out": 1}


@pytest.mark.parametrize("first", [0, 255])
def test_a_mask_of_several_pages_is_a_fault(tmp_path: Path, first: int) -> None:
    """With the lesions on a later page, the image would become a negative."""
    pages = [Image.fromarray(np.full((80, 100), value, np.uint8)) for value in (first, 255)]
    put(tmp_path / "i" / "a.png")
    (tmp_path / "m").mkdir()
    pages[0].save(tmp_path / "m" / "a.tif", save_all=True, append_images=pages[1:])
    found = read(tmp_path, (MASK % "").replace(".png'", ".tif'").replace("i/*.tif", "i/*.png"))
    assert ["has 2 pages" in message for message in found.faults.messages] == [True]


def test_inverted_masks_are_told(tmp_path: Path) -> None:
    painted = np.zeros((80, 100), np.uint8)
    painted[20:40, 10:30] = 255
    for name, values in (("a", 255 - painted), ("b", painted)):
        put(tmp_path / "i" / f"{name}.png")
        put(tmp_path / "m" / f"{name}.png", values)
    found = read(tmp_path, MASK % "")
    assert sum("in 1 of 2 masks" in remark and "inverted" in remark for remark in found.faults.remarks) == 1


def test_yolo_images_of_every_format_that_is_read_are_negatives_without_a_label(tmp_path: Path) -> None:
    for name in ("a.png", "b.webp", "c.GIF"):
        put(tmp_path / "images" / name)
    put(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.2 0.2")
    assert sorted(boxes(read(tmp_path, YOLO % ""))) == ["images/a.png", "images/b.webp", "images/c.GIF"]


def test_masks_of_no_image_are_counted(tmp_path: Path) -> None:
    put(tmp_path / "i" / "a.png")
    for name in ("a", "b"):
        put(tmp_path / "m" / f"{name}.png", two_regions(255, 255))
    found = read(tmp_path, MASK % "")
    assert found.faults.left_out == {("masks", "no image of annotations.files has this name"): 1}


def test_yolo_labels_in_sub_folders_and_of_another_case(tmp_path: Path) -> None:
    for name in ("s1/a", "b", "c", "other/d"):
        put(tmp_path / "images" / f"{name}.png")
    put(tmp_path / "labels" / "s1" / "a.txt", "0 0.5 0.5 0.2 0.2")
    put(tmp_path / "labels" / "b.TXT", b"\xef\xbb\xbf0 0.5 0.5 0.2 0.2")
    found = read(tmp_path, YOLO % "")
    box = pytest.approx((0.4, 0.4, 0.6, 0.6))
    assert boxes(found) == {"images/b.png": [box], "images/c.png": [], "images/s1/a.png": [box]}
    assert any("1 images are in sub folders of which" in line for line in found.faults.remarks)
    put(tmp_path / "labels" / "s2" / "lost.TXT", "0 0.5 0.5 0.2 0.2")
    (message,) = read(tmp_path, YOLO % "").faults.messages
    assert "s2/lost.TXT: there is no image s2/lost.*" in message


def test_a_row_that_ends_early_is_no_negative(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "a.csv", HEAD + "a.png\n")
    (message,) = read(tmp_path, CSV % "").faults.messages
    assert "a.csv:2: has 1 cells, and the header has 6" in message


@pytest.mark.parametrize(("more", "expected"), [("", [BOX]), (", crowd: keep", [(0.0, 0.0, 90.0, 70.0), BOX])])
def test_crowds_are_left_out_and_counted(tmp_path: Path, more: str, expected: list[Any]) -> None:
    for name in ("a.png", "only.png"):
        put(tmp_path / name)
    crowd = ([0, 0, 90, 70], {"iscrowd": 1})
    annotations = [(1, *crowd), (1, [10, 20, 20, 20], {"iscrowd": 0}), (2, *crowd)]
    coco(tmp_path, [(1, "a.png"), (2, "only.png")], annotations)
    found = read(tmp_path, COCO % more)
    assert boxes(found)["a.png"] == expected
    assert ("only.png" in boxes(found)) == bool(more)
    assert found.faults.left_out == ({} if more else {("boxes", "iscrowd or ignore; annotations.crowd"): 2})


@pytest.mark.parametrize(("more", "count"), [("", 2), (", difficult: drop", 1)])
def test_difficult_objects(tmp_path: Path, more: str, count: int) -> None:
    put(tmp_path / "img" / "a.png")
    difficult = an_object((51, 51, 70, 70), "<difficult>1</difficult>")
    put(tmp_path / "xml" / "a.xml", xml("a.png", an_object(), difficult))
    found = read(tmp_path, VOC % more)
    assert len(boxes(found)["img/a.png"]) == count
    assert any("1 boxes are marked difficult" in line for line in found.faults.remarks) == (count == 2)
    assert sum(found.faults.left_out.values()) == 2 - count


def test_a_voc_box_without_area_stays_without(tmp_path: Path) -> None:
    put(tmp_path / "img" / "a.png")
    put(tmp_path / "xml" / "a.xml", xml("a.png", an_object((7, 8, 7, 8))))
    assert boxes(read(tmp_path, VOC % "")) == {"img/a.png": [(7, 8, 7, 8)]}


def test_bbox_and_segmentation_must_agree(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    outline = {"segmentation": [[50, 50, 70, 50, 70, 70, 50, 70]]}
    # The box holds corners: x1, y1, x2, y2.
    coco(tmp_path, [(1, "a.png")], [(1, [50, 50, 70, 70], outline)])
    (message,) = read(tmp_path, COCO % "").faults.messages
    assert "bbox and segmentation disagree (IoU below 0.5), as in 1 of 1 annotations" in message
    coco(tmp_path, [(1, "a.png")], [(1, [50, 50, 20, 20], outline)])
    assert boxes(read(tmp_path, COCO % "")) == {"a.png": [OTHER]}


POSE = "0 0.5 0.5 0.2 0.2 0.9 0.9 0.1 0.1\n"
TURNED = "0 0.4 0.5 0.5 0.4 0.6 0.5 0.5 0.6\n"
INNER = pytest.approx((0.4, 0.4, 0.6, 0.6))


@pytest.mark.parametrize(
    ("label", "more", "names", "expected"),
    [
        (POSE, "", None, "every row has 8 numbers after its class, which may be a polygon, or a box and keypoints"),
        (POSE, ", rows: boxes", None, INNER),
        (POSE, ", rows: polygons", None, pytest.approx((0.1, 0.1, 0.9, 0.9))),
        (POSE, "", "names: [nod]\nkpt_shape: [2, 2]\n", INNER),
        ("0 0.5 0.5 0.2 0.2 0.9\n", "", None, "has 5 numbers after its class; needed: cx cy w h"),
        ("0 0.5 0.5 0.2 0.2 0.9\n", ", rows: boxes", None, INNER),
        (TURNED, "", None, INNER),
    ],
)
def test_yolo_rows_of_more_than_a_box(
    tmp_path: Path, label: str, more: str, names: Optional[str], expected: Any
) -> None:
    put(tmp_path / "images" / "a.png")
    put(tmp_path / "labels" / "a.txt", label)
    annotations = YOLO % more
    if names is not None:
        put(tmp_path / "data.yaml", b"\xef\xbb\xbf" + names.encode())
        annotations = annotations.replace("[nod, cy]", "data.yaml")
    found = read(tmp_path, annotations)
    if isinstance(expected, str):
        assert expected in found.faults.messages[0]
    else:
        assert boxes(found) == {"images/a.png": [expected]}


# Units, duplicates


@pytest.mark.parametrize("form", ["csv", "coco", "json"])
@pytest.mark.parametrize(
    ("box", "unit", "expected"),
    [
        ((0.1, 0.2, 0.3, 0.4), "", "Are these fractions? Then: normalised: true"),
        ((0.1, 0.2, 0.3, 0.4), ", normalised: true", (0.1, 0.2, 0.3, 0.4)),
        ((10.0, 20.0, 30.0, 40.0), ", normalised: percent", (0.1, 0.2, 0.3, 0.4)),
        ((10.0, 20.0, 30.0, 40.0), ", normalised: true", "is far outside of its image, like 1 of 1 boxes"),
        ((10.0, 20.0, 30.0, 40.0), "", BOX),
    ],
)
def test_units(tmp_path: Path, form: str, box: tuple[float, ...], unit: str, expected: Any) -> None:
    put(tmp_path / "a.png")
    if form == "csv":
        put(tmp_path / "a.csv", HEAD + f"a.png,{','.join(map(str, box))},nod\n")
    elif form == "json":
        put(tmp_path / "a.json", json.dumps({"a.png": {"b": [{"at": box}]}}))
    else:
        x1, y1, x2, y2 = box
        coco(tmp_path, [(1, "a.png")], [(1, [x1, y1, x2 - x1, y2 - y1], {})])
    found = read(tmp_path, {"csv": CSV, "json": JSON, "coco": COCO}[form] % unit)
    if isinstance(expected, str):
        (message,) = found.faults.messages
        assert expected in message
    else:
        assert boxes(found) == {"a.png": [pytest.approx(expected)]}


def test_label_studios_boxes_are_in_percent(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    entry = {"image": "a.png", "label": [{"x": 10, "y": 20, "width": 20, "height": 20, "original_width": 512}]}
    put(tmp_path / "a.json", json.dumps([entry]))
    annotations = "{reader: json, files: a.json, image: '{image}', boxes: label, only_class: nod, convention: xywh, "
    annotations += "box: [x, y, width, height]%s}"
    (message,) = read(tmp_path, annotations % "").faults.messages
    assert "has original_width, as Label Studio writes it, whose boxes are in percent" in message
    found = read(tmp_path, annotations % ", normalised: percent")
    assert boxes(found) == {"a.png": [pytest.approx((0.1, 0.2, 0.3, 0.4))]}


def test_boxes_outside_of_the_stated_size_are_found_without_the_image(tmp_path: Path) -> None:
    coco(tmp_path, [(1, "gone.png")], [(1, [80, 70, 30, 5], {})])
    (message,) = read(tmp_path, COCO % "").faults.messages
    assert "box [80.0, 70.0, 110.0, 75.0] leaves the size 100x80" in message
    assert "gone.png, by 10.0 px. Allowed: 1 (box_tolerance)" in message


def same_box_in_coco(folder: Path) -> str:
    put(folder / "a.png")
    coco(folder, [(1, "a.png")], [(1, [10, 20, 20, 20], {})] * 2)
    return COCO % ""


def same_box_in_csv(folder: Path) -> str:
    put(folder / "a.png")
    put(folder / "a.csv", HEAD + "a.png,10,20,30,40,nod\n" * 2)
    return CSV % ""


def same_box_in_voc(folder: Path) -> str:
    put(folder / "img" / "a.png")
    put(folder / "xml" / "a.xml", xml("a.png", an_object(), an_object()))
    return VOC % ""


def same_box_in_yolo(folder: Path) -> str:
    put(folder / "images" / "a.png")
    put(folder / "labels" / "a.txt", "0 0.5 0.5 0.2 0.2\n" * 2)
    return YOLO % ""


@pytest.mark.parametrize("write", [same_box_in_coco, same_box_in_csv, same_box_in_voc, same_box_in_yolo])
def test_the_same_box_twice_is_one_box(tmp_path: Path, write: Callable[[Path], str]) -> None:
    found = read(tmp_path, write(tmp_path))
    assert [len(item.boxes) for item in found.items] == [1]
    assert found.faults.left_out == {("boxes", "the same box of the same class twice"): 1}


def test_boxes_of_several_readers_are_counted(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    rows = "".join(f"a.png,{10 + r},{20 + r},{30 + r},{40 + r},nod\n" for r in range(3)) + "a.png,10,20,30,40,cy\n"
    put(tmp_path / "a.csv", HEAD + rows)
    found = read(tmp_path, CSV % "")
    assert len(boxes(found)["a.png"]) == 4
    assert any("2 boxes overlap another of their class by IoU > 0.5" in line for line in found.faults.remarks)


# Files that are named in another way


def test_a_voc_file_name_without_its_ending(tmp_path: Path) -> None:
    put(tmp_path / "img" / "a.png")
    text = '<?xml version="1.0" encoding="GB2312"?>' + xml("a", an_object())
    put(tmp_path / "xml" / "a.xml", text)
    assert boxes(read(tmp_path, VOC % "")) == {"img/a.png": [BOX]}
    assert boxes(read(tmp_path, (VOC % "").replace("xml/*", f"{tmp_path}/xml/*"))) == {"img/a.png": [BOX]}


def test_split_lists_in_the_forms_that_there_are(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "unlisted"):
        put(tmp_path / "img" / f"{name}.png")
        put(tmp_path / "xml" / f"{name}.xml", xml(f"{name}.png", an_object()))
    put(tmp_path / "train.txt", b"\xef\xbb\xbfa.png\nJPEGImages/b.jpg\nlost\n")
    put(tmp_path / "val.txt", "c -1\n")
    found = read(tmp_path, VOC % ", split_lists: {train: train.txt, val: val.txt}", "{by: file}")
    assert {item.image.name: item.split for item in found.items} == {"a.png": "train", "b.png": "train", "c.png": "val"}
    assert found.left_out == {"its XML is in none of split_lists": 1}
    assert found.faults.left_out == {("names in train.txt", "no XML has this name"): 1}


@pytest.mark.parametrize(
    "written", [r"sub\A.png", "sub/%41.png", "sub/a.PNG", "SUB/A.png", "sub/A.jpg", "sub/B_lesoin.png"]
)
def test_the_name_that_was_probably_meant(tmp_path: Path, written: str) -> None:
    from umed_plugin.data.annotations.finding import did_you_mean_file

    for name in ("A.png", "B_lesion.png"):
        put(tmp_path / "sub" / name)
    expected = "sub/B_lesion.png" if "les" in written else "sub/A.png"
    assert did_you_mean_file(tmp_path / written, tmp_path) == f" Did you mean {expected!r}?"
    assert did_you_mean_file(tmp_path / "sub" / "image_12.png", tmp_path) == ""


def test_links_to_folders_are_followed_and_files_that_a_pattern_misses_are_told(tmp_path: Path) -> None:
    put(tmp_path / "real" / "a.xml", xml("a.png", an_object()))
    put(tmp_path / "img" / "a.png")
    (tmp_path / "xml").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    put(tmp_path / "real" / "B.XML", xml("b.png"))
    put(tmp_path / "real" / "s" / "c.xml", xml("c.png"))
    found = read(tmp_path, (VOC % "").replace("xml/*", "x*/a"))
    assert boxes(found) == {"img/a.png": [BOX]}
    remarks = read(tmp_path, VOC % "").faults.remarks
    assert any(
        "1 further files are not read, since they differ from the pattern only in case" in line for line in remarks
    )
    assert any(
        "1 further files are not read, since they are in sub folders; xml/**/*.xml reads" in line for line in remarks
    )


# Rules that apply to nothing


@pytest.mark.parametrize(
    ("more", "split", "extra", "words"),
    [
        (", rename: ['^x_', '']", ALL_IN_TRAIN, "", "annotations.rename matches 0 of 2 names; not 'a.png'"),
        (
            ", only_rows: {c: [nod, nodd, '']}",
            ALL_IN_TRAIN,
            "",
            "only_rows.c: nothing in the data is 'nodd', so that has no",
        ),
        (", leave_out_images: {c: ['no']}", ALL_IN_TRAIN, "", "leave_out_images.c: nothing in the data is 'no'"),
        ("", ALL_IN_TRAIN, "ignore_classes: [odd]", "ignore_classes: no annotation names 'odd' (1 of 1)"),
        ("", ALL_IN_TRAIN, "", "classes: no annotation names 'cy' (1 of 2)"),
        (
            "",
            "{by: patient, copy_pattern: '^(.+)_copy', fractions: {train: 1}}",
            "",
            "copy_pattern: matches 0 of 2 names",
        ),
        (
            "",
            ALL_IN_TRAIN,
            "image: {slice_axis: 1}",
            "image.slice_axis: has no effect, since it concerns NIfTI volumes",
        ),
        (
            "",
            ALL_IN_TRAIN,
            "image: {slices: montage}",
            "image.slices: has no effect, since it concerns DICOM and NIfTI",
        ),
        (", image_root: nowhere", ALL_IN_TRAIN, "", "annotations.image_root: there is no folder"),
        (
            "",
            ALL_IN_TRAIN,
            "negatives: {listed: {files: a.csv, file: f, only_rows: {c: [x]}}}",
            "lists no image without a",
        ),
    ],
)
def test_rules_without_effect_are_told(tmp_path: Path, more: str, split: str, extra: str, words: str) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    put(tmp_path / "a.csv", HEAD + "a.png,10,20,30,40,nod\nb.png,,,,,\n")
    found = read(tmp_path, CSV % more, split, extra + "\n")
    assert found.faults.messages == []
    assert any(words in line for line in found.faults.remarks), found.faults.remarks


def test_rename_holds_for_listed_negatives_and_a_row_with_a_finding_counts(tmp_path: Path) -> None:
    for name in ("p1", "p2", "p3"):
        put(tmp_path / f"{name}.x.dicom")
    put(tmp_path / "a.csv", HEAD + "p1,10,20,30,40,nod\np2,,,,,No finding\np3,,,,,No finding\np3,,,,,odd\n")
    listed = "negatives: {listed: {files: a.csv, file: f, only_rows: {c: [No finding]}}}\n"
    found = read(tmp_path, CSV % r", rename: ['^(\w+)$', '\1.x.dicom'], only_rows: {c: [nod]}", extra=listed)
    assert boxes(found) == {"p1.x.dicom": [BOX], "p2.x.dicom": []}
    assert found.left_out == {"listed as negative, but not in all of its rows": 1}
    assert found.faults.left_out == {("rows of the CSV", "annotations.only_rows"): 3}


@pytest.mark.parametrize(
    ("annotations", "split", "extra", "words"),
    [
        (CSV % ", image_root: {train: a}", ALL_IN_TRAIN, "", "annotations.image_root: is given per split"),
        (CSV % ", image_root: '{stem}'", ALL_IN_TRAIN, "", "unknown name in braces 'stem'. Allowed: split"),
        (CSV % ", rename: [a, '\\2']", ALL_IN_TRAIN, "", "annotations.rename: the replacement"),
        (
            CSV % ", split_values: {1: train, '1': test}",
            ALL_IN_TRAIN,
            "",
            "annotations.split_values: the key '1' is there as number and as text",
        ),
        ((MASK % "").replace("{stem}", "{name}"), ALL_IN_TRAIN, "", "unknown name in braces 'name'"),
        (JSON.replace("{key}", "{key") % "", ALL_IN_TRAIN, "", "annotations.image: expected '}'"),
        (
            (CSV % "").replace("c}", "c, split: s}"),
            "{by: column}",
            "negatives: {listed: {files: a, file: f}}",
            "negatives.listed.split: missing",
        ),
    ],
)
def test_mistakes_of_a_recipe(tmp_path: Path, annotations: str, split: str, extra: str, words: str) -> None:
    with pytest.raises(UmedError) as caught:
        read(tmp_path, annotations, split, extra)
    assert words in str(caught.value)


# Images outside of the data root


def outside_by_dots(folder: Path, secret: Path) -> str:
    return "../secret/x.png"


def outside_by_an_absolute_path(folder: Path, secret: Path) -> str:
    return str(secret / "x.png")


def outside_by_a_link(folder: Path, secret: Path) -> str:
    (folder / "l.png").symlink_to(secret / "x.png")
    return "l.png"


def outside_by_a_linked_folder(folder: Path, secret: Path) -> str:
    (folder / "d").symlink_to(secret)
    return "d/x.png"


def outside_in_a_series(folder: Path, secret: Path) -> str:
    put(folder / "ser" / "1.dcm")
    (folder / "ser" / "2.dcm").symlink_to(secret / "x.png")
    return "ser"


OUTSIDE = [
    outside_by_dots,
    outside_by_an_absolute_path,
    outside_by_a_link,
    outside_by_a_linked_folder,
    outside_in_a_series,
]


@pytest.mark.parametrize("form", ["csv", "coco", "json", "listed"])
@pytest.mark.parametrize("place", OUTSIDE)
def test_images_outside_of_the_data_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, place: Callable[[Path, Path], str]
) -> None:
    folder, secret = tmp_path / "data", tmp_path / "secret"
    put(secret / "x.png")
    put(folder / "a.png")
    name, extra = place(folder, secret), ""
    if form == "coco":
        coco(folder, [(1, name)], [(1, [10, 20, 20, 20], {})])
    elif form == "json":
        put(folder / "a.json", json.dumps({name: {"b": [{"at": BOX}]}}))
    else:
        row = f"{name},10,20,30,40,nod\n"
        put(folder / "a.csv", HEAD + (row if form == "csv" else "a.png,10,20,30,40,nod\n"))
        put(folder / "none.csv", f"f\n{name}\n")
        extra = "negatives: {listed: {files: none.csv, file: f}}\n" if form == "listed" else ""
    annotations = {"csv": CSV, "listed": CSV, "coco": COCO, "json": JSON}[form] % ""
    (message,) = read(folder, annotations, extra=extra).faults.messages
    assert "is not in the data root" in message
    assert "name its folder in linked_roots of the recipe" in message
    assert read(folder, annotations, extra=f"{extra}linked_roots: ['{secret}']\n").faults.messages == []
    monkeypatch.setenv("UMED_LINKED_ROOTS", f"/nowhere{os.pathsep}{secret}")
    assert read(folder, annotations, extra=extra).faults.messages == []


def test_what_the_recipe_itself_names_may_be_anywhere(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "x.png")
    put(tmp_path / "real" / "a.csv", HEAD + "x.png,10,20,30,40,nod\n")
    (tmp_path / "data").symlink_to(tmp_path / "real")
    for root in ("../elsewhere", str(tmp_path / "elsewhere"), "../else*"):
        assert len(boxes(read(tmp_path / "data", CSV % f", image_root: '{root}'"))) == 1


@pytest.mark.parametrize("reader", ["yolo", "mask"])
def test_links_among_the_images_of_a_folder(tmp_path: Path, reader: str) -> None:
    put(tmp_path / "secret" / "x.png")
    folder = tmp_path / "data"
    for name in ("images", "labels", "i"):
        (folder / name).mkdir(parents=True)
    put(folder / "m" / "x.png", two_regions(255, 255))
    (folder / ("images" if reader == "yolo" else "i") / "x.png").symlink_to(tmp_path / "secret" / "x.png")
    (message,) = read(folder, (YOLO if reader == "yolo" else MASK) % "").faults.messages
    assert "leads to" in message
    assert "is not in the data root" in message


# Values that are none


@pytest.mark.parametrize("name", ["a\0.png", "a" * 300 + ".png", "\ud800.png"])
@pytest.mark.parametrize("form", ["coco", "json"])
def test_names_that_no_file_can_have(tmp_path: Path, form: str, name: str) -> None:
    if form == "coco":
        coco(tmp_path, [(1, name)], [(1, [10, 20, 20, 20], {})])
    else:
        put(tmp_path / "a.json", json.dumps({name: {"b": []}}))
    (message,) = read(tmp_path, (COCO if form == "coco" else JSON) % "").faults.messages
    assert "cannot be the path of a file" in message


@pytest.mark.parametrize(
    ("images", "annotations", "words"),
    [
        (
            [{"id": 1, "file_name": "a.png", "width": float("nan"), "height": 80}],
            [],
            "width and height are [nan, 80]",
        ),
        pytest.param(
            [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}],
            [{"image_id": 1, "category_id": 1, "bbox": [10**4000, 1, 2, 3]}],
            "needed: [x, y, width, height], numbers",
            id="huge",
        ),
    ],
)
def test_numbers_that_are_none(tmp_path: Path, images: list[Any], annotations: list[Any], words: str) -> None:
    put(tmp_path / "a.png")
    categories = [{"id": 1, "name": "nod"}]
    put(tmp_path / "a.json", json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    (message,) = read(tmp_path, COCO % "").faults.messages
    assert words in message
    assert len(message) < 2000


def test_a_class_in_superscript_is_a_fault(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.png")
    put(tmp_path / "labels" / "a.txt", "\u00b2 0.5 0.5 0.2 0.2")
    (message,) = read(tmp_path, YOLO % "").faults.messages
    assert "a.txt:1: class '\u00b2' has no name" in message


def test_lists_of_images_that_are_never_sent_have_no_mark(tmp_path: Path) -> None:
    from umed_plugin.data.writing.burnt_in import read_list

    put(tmp_path / "never.txt", b"\xef\xbb\xbfdrawn/a.png\ndrawn/b.png\n")
    assert read_list(tmp_path / "never.txt") == {"drawn/a.png", "drawn/b.png"}


def test_voc_objects_in_another_element_are_not_taken_for_none(tmp_path: Path) -> None:
    put(tmp_path / "img" / "a.png")
    put(tmp_path / "xml" / "a.xml", xml("a.png", f"<objects>{an_object()}</objects>"))
    (message,) = read(tmp_path, VOC % "").faults.messages
    assert "has 1 <object> that are not directly in <annotation>" in message


@pytest.mark.parametrize("form", ["csv", "coco", "json"])
def test_folders_of_classes_in_place_of_a_file_name_the_reader_for_them(tmp_path: Path, form: str) -> None:
    put(tmp_path / "classes" / "nod" / "a.png")
    annotations = (
        ({"csv": CSV, "coco": COCO, "json": JSON}[form] % "").replace("a.csv", "classes").replace("a.json", "classes")
    )
    (message,) = read(tmp_path, annotations).faults.messages
    assert (
        "classes: is a folder; needed: the annotation file. Folders named by a class say what images show and not where: "
        "the reader folders reads them" in message
    )
    put(tmp_path / "a.png")
    put(tmp_path / "a.csv", "f,x1,y1,x2,y2,c\na.png,,,,,normal\n")
    (message,) = read(tmp_path, CSV % "").faults.messages
    assert "A value that means no lesion belongs in annotations.no_finding" in message
    assert boxes(read(tmp_path, CSV % ", no_finding: [normal]"))["a.png"] == []
