"""Every annotation format holds the same two images and must give the same boxes; then what each can get wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.drawn import BOX, HEIGHT, WIDTH, scene, write_png, write_recipe

from umed_plugin.data.annotations import Annotated, AnnotationSet, read_annotations
from umed_plugin.data.recipes.readers import READERS
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError

X1, Y1, X2, Y2 = BOX
SECOND = (60, 30, 70, 55)
CSV = "{reader: csv, files: a.csv, columns: {file: file, box: [x1, y1, x2, y2], lesion: lesion}%s}"


def read(folder: Path, annotations: str, split: str = "{by: patient}", extra: str = "") -> AnnotationSet:
    return read_annotations(load_recipe(write_recipe(folder, annotations, split, extra)))


def by_name(found: AnnotationSet) -> dict[str, Annotated]:
    assert found.faults.messages == []
    return {item.image.name: item for item in found.items}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """pos.png with two lesions, neg.png without."""
    write_png(tmp_path / "pos.png", scene())
    write_png(tmp_path / "neg.png", scene() * 0.3)
    return tmp_path


def write_coco(folder: Path, **changes: Any) -> None:
    content = {
        "images": [
            {"id": 5, "file_name": "pos.png", "width": WIDTH, "height": HEIGHT},
            {"id": 6, "file_name": "neg.png", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": 1, "name": "nod"}, {"id": 2, "name": "cy"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 1, "bbox": [X1, Y1, X2 - X1, Y2 - Y1]},
            {"id": 2, "image_id": 5, "category_id": 2, "bbox": [60, 30, 10, 25]},
        ],
    }
    (folder / "a.json").write_text(json.dumps({**content, **changes}))


def coco(folder: Path) -> str:
    write_coco(folder)
    return "{reader: coco, files: a.json}"


def voc(folder: Path) -> str:
    """Pascal VOC counts from 1 and includes the last pixel."""
    (folder / "xml").mkdir()
    for name, boxes in (("pos", [("nod", BOX), ("cy", SECOND)]), ("neg", [])):
        objects = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax>"
            f"<ymax>{y2}</ymax></bndbox></object>"
            for label, (x1, y1, x2, y2) in boxes
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        (folder / "xml" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.png</filename>{size}{objects}</annotation>"
        )
    return "{reader: voc, files: 'xml/*.xml'}"


def yolo(folder: Path) -> str:
    (folder / "labels").mkdir()
    (folder / "data.yaml").write_text("names: [cy, nod]\n")
    lines = [
        f"1 {(X1 + X2) / 2 / WIDTH} {(Y1 + Y2) / 2 / HEIGHT} {(X2 - X1) / WIDTH} {(Y2 - Y1) / HEIGHT}",
        # A polygon, as the segmentation variant of YOLO writes it.
        f"0 {60 / WIDTH} {30 / HEIGHT} {70 / WIDTH} {40 / HEIGHT} {65 / WIDTH} {55 / HEIGHT}",
    ]
    (folder / "labels" / "pos.txt").write_text("\n".join(lines))
    return "{reader: yolo, files: labels, image_root: '.', names: data.yaml}"


def csv_xyxy(folder: Path) -> str:
    (folder / "a.csv").write_text(
        f"file,x1,y1,x2,y2,lesion\npos.png,{X1},{Y1},{X2},{Y2},nod\nneg.png,,,,,\npos.png,60,30,70,55,cy\n"
    )
    return CSV % ""


def csv_xywh_by_number(folder: Path) -> str:
    """NIH's header names one column for four."""
    (folder / "a.csv").write_text(
        f'Image,Label,"Bbox [x,y,w,h]",,,\npos.png,nod,{X1},{Y1},{X2 - X1},{Y2 - Y1}\npos.png,cy,60,30,10,25\nneg.png,,,,,\n'
    )
    return "{reader: csv, files: a.csv, convention: xywh, columns: {file: 0, box: [2, 3, 4, 5], lesion: 1}}"


def csv_cxcywh_normalised_in_one_column(folder: Path) -> str:
    rows = [
        f"{(x1 + x2) / 2 / WIDTH}, {(y1 + y2) / 2 / HEIGHT}, {(x2 - x1) / WIDTH}, {(y2 - y1) / HEIGHT}"
        for x1, y1, x2, y2 in (BOX, SECOND)
    ]
    # With Excel's byte-order mark and semicolons.
    text = f'\ufefffile;box;lesion\npos;"{rows[0]}";nod\npos;"{rows[1]}";cy\nneg;;\n'
    (folder / "a.csv").write_text(text, encoding="utf-8")
    return (
        "{reader: csv, files: a.csv, convention: cxcywh, normalised: true, delimiter: ';', "
        "rename: ['^(\\w+)$', '\\1.png'], columns: {file: file, box: box, lesion: lesion}}"
    )


def json_by_image(folder: Path) -> str:
    """Kvasir-SEG's form: an object of image name -> entry."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    boxes = [{"label": label, **dict(zip(keys, box))} for label, box in (("nod", BOX), ("cy", SECOND))]
    entries = {name: {"height": HEIGHT, "width": WIDTH, "bbox": found} for name, found in (("pos", boxes), ("neg", []))}
    (folder / "a.json").write_text(json.dumps(entries))
    return (
        "{reader: json, files: 'a*.json', image: '{key}.png', boxes: bbox, box: [xmin, ymin, xmax, ymax], lesion: label, "
        "size: [width, height]}"
    )


def json_list_xywh(folder: Path) -> str:
    boxes = [{"at": [X1, Y1, X2 - X1, Y2 - Y1], "what": "nod"}, {"at": [60, 30, 10, 25], "what": "cy"}]
    (folder / "a.json").write_text(
        json.dumps([{"name": "pos", "of": 7, "found": boxes}, {"name": "neg", "of": 8, "found": []}])
    )
    return (
        "{reader: json, files: a.json, image: '{name}.png', boxes: found, box: at, lesion: what, convention: xywh, "
        "patient: of}"
    )


def mask(folder: Path) -> str:
    (folder / "masks").mkdir()
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[Y1:Y2, X1:X2] = 1
    labels[30:55, 60:70] = 2
    Image.fromarray(labels).save(folder / "masks" / "pos_mask.png")
    Image.fromarray(labels * 0).save(folder / "masks" / "neg_mask.png")
    return "{reader: mask, files: '*.png', masks: 'masks/{stem}_mask.png', values: {1: nod, 2: cy}}"


FORMATS = [coco, voc, yolo, csv_xyxy, csv_xywh_by_number, csv_cxcywh_normalised_in_one_column, mask]
FORMATS += [json_by_image, json_list_xywh]


@pytest.mark.parametrize("written", FORMATS)
def test_all_formats_agree(folder: Path, written: Any) -> None:
    items = by_name(read(folder, written(folder)))
    assert set(items) == {"pos.png", "neg.png"}
    positive, negative = items["pos.png"], items["neg.png"]
    scale = np.array([WIDTH, HEIGHT] * 2 if positive.normalised else [1] * 4)
    np.testing.assert_allclose(np.array(positive.boxes) * scale, [BOX, SECOND], atol=1e-6)
    assert positive.classes == ["nodule", "cyst"]
    assert negative.boxes == negative.classes == []
    assert positive.size in (None, (WIDTH, HEIGHT))
    assert positive.modality == "CT"
    assert positive.image == folder / "pos.png"


@pytest.mark.parametrize(("convention", "shift"), [("inclusive", (1, 1, 1, 1)), ("half_open", (1, 1, 0, 0))])
def test_voc_conventions(folder: Path, convention: str, shift: tuple[int, ...]) -> None:
    annotations = voc(folder).replace("}", f", convention: {convention}}}")
    expected = [value + add for value, add in zip(BOX, shift)]
    assert list(by_name(read(folder, annotations))["pos.png"].boxes[0]) == expected


def test_voc_split_lists_leave_the_unlisted_out(folder: Path) -> None:
    (folder / "val.txt").write_text("pos\n")
    annotations = voc(folder).replace("}", ", split_lists: {val: val.txt}}")
    items = by_name(read(folder, annotations, "{by: file}"))
    assert {name: item.split for name, item in items.items()} == {"pos.png": "val"}


def test_mask_regions_slivers_and_jpeg_noise(folder: Path) -> None:
    """Grey values around 0 and 255 are JPEG's; touching corners are one region; 3 pixels are a sliver."""
    values = np.full((HEIGHT, WIDTH), 20, np.uint8)
    values[5:10, 5:10] = 240
    values[10:15, 10:12] = 200
    values[40, 50:53] = 255
    values[30:36, 80:85] = 250
    Image.fromarray(values).save(folder / "pos_m.png")
    Image.fromarray(values * 0).save(folder / "neg_m.png")
    annotations = "{reader: mask, files: '???.png', masks: '{stem}_m.png', only_class: nod, min_area: 4}"
    items = by_name(read(folder, annotations))
    assert items["pos.png"].boxes == [(5, 5, 12, 15), (80, 30, 85, 36)]
    assert items["neg.png"].boxes == []


def test_one_bit_masks(folder: Path) -> None:
    values = np.zeros((HEIGHT, WIDTH), bool)
    values[5:10, 5:11] = True
    for name in ("pos", "neg"):
        Image.fromarray(values if name == "pos" else ~values & False).save(folder / f"{name}_m.png")
    found = by_name(read(folder, "{reader: mask, files: '???.png', masks: '{stem}_m.png', only_class: nod}"))
    assert found["pos.png"].boxes == [(5, 5, 11, 10)]


def test_csv_slices_patients_splits_and_windows(folder: Path) -> None:
    (folder / "a.csv").write_text(
        "file,x1,y1,x2,y2,lesion,who,set,mod,slice,win,keep\n"
        'v.nii.gz,1,2,3,4,nod,p1,1,MR,3,"-175, 275",yes\n'
        "v.nii.gz,5,6,7,8,nod,p1,1,MR,3,,yes\n"
        "v.nii.gz,1,2,3,4,nod,p1,1,MR,4.0,,yes\n"
        "v.nii.gz,1,2,3,4,nod,p1,1,MR,5,,no\n"
        "pos.png,,,,,,p2,2,,,,yes\n"
    )
    (folder / "v.nii.gz").write_bytes(b"")
    further = "patient: who, split: set, modality: mod, slice: slice, window: win"
    rules = "split_values: {1: train, 2: test}, only_rows: {keep: ['yes']}"
    annotations = CSV.replace("lesion: lesion", f"lesion: lesion, {further}") % f", {rules}"
    found = read(folder, annotations, "{by: column}")
    assert found.faults.messages == []
    told = [(i.image.name, i.slice, len(i.boxes), i.patient, i.split, i.modality, i.window) for i in found.items]
    assert told == [
        ("v.nii.gz", 3, 2, "p1", "train", "MR", (-175.0, 275.0)),
        ("v.nii.gz", 4, 1, "p1", "train", "MR", None),
        ("pos.png", None, 0, "p2", "test", "CT", None),
    ]


def test_csv_without_the_optional_slice_column(folder: Path) -> None:
    csv_xyxy(folder)
    items = by_name(read(folder, CSV.replace("lesion: lesion", "lesion: lesion, slice: slice") % ""))
    assert items["pos.png"].slice is None


def test_csv_faults_are_told_by_line_all_at_once(folder: Path) -> None:
    (folder / "a.csv").write_text(
        "file,x1,y1,x2,y2,lesion,split,slice\n"
        "pos.png,1,2,3,4,,train,\n"
        "neg.png,,,,,nod,train,\n"
        "a.png,1,two,3,4,nod,train,\n"
        "b.png,1,,3,4,nod,train,\n"
        ",1,2,3,4,nod,train,\n"
        "c.png,1,2,3,4,nod,tarin,\n"
        "d.png,1,2,3,4,nod,train,x\n"
        "e.png,1,2,3,4,nod,train,\n"
        "e.png,,,,,,train,\n"
        "f.png,1,2,3,4,nod,train,\n"
        "f.png,1,2,3,4,nod,val,\n"
        "g.png,1,2,3,4,noddule,train,\n"
    )
    annotations = CSV.replace("lesion: lesion", "lesion: lesion, split: split, slice: slice") % ""
    messages = read(folder, annotations, "{by: column}").faults.messages
    expected = {
        2: "has a box, but column 'lesion' is empty",
        3: "names 'nod', but has no box",
        4: "box is ['1', 'two', '3', '4']; needed: 4 numbers",
        5: "box is ['1', '', '3', '4']; needed: 4 numbers",
        6: "column 'file' is empty",
        7: "split is 'tarin'. Did you mean 'train'? Allowed: train, val, test",
        8: "slice is 'x'; needed: a whole number from 0",
        10: f"gives e.png no box, and {folder}/a.csv:9 gives it a box. A row with no box says that the image has no lesion",
        12: "patient or split of f.png differs",
        13: "class 'noddule' (1 boxes) is not in the recipe. Did you mean 'nod'? Allowed: nod, cy",
    }
    assert len(messages) == len(expected)
    for line, words in expected.items():
        assert any(f"a.csv:{line}: " in message and words in message for message in messages), (line, messages)


def test_csv_windows_of_one_image_must_agree(folder: Path) -> None:
    (folder / "a.csv").write_text(
        "file,x1,y1,x2,y2,lesion,win\n"
        "pos.png,1,2,3,4,nod,\n"
        'pos.png,1,2,3,5,nod,"-10, 20"\n'
        'pos.png,1,2,3,6,nod,"-10,20"\n'
        'pos.png,1,2,3,7,nod,"-10, 30"\n'
    )
    found = read(folder, CSV.replace("lesion: lesion", "lesion: lesion, window: win") % "")
    (message,) = found.faults.messages
    assert f"a.csv:5: window of pos.png is (-10.0, 30.0), but (-10.0, 20.0) in {folder}/a.csv:2. An image" in message


def test_a_csv_that_is_not_utf8(folder: Path) -> None:
    text = "file,x1,y1,x2,y2,lesion\npos.png,1,2,3,4,nod\nl\xe4sion.png,1,2,3,4,nod\n"
    (folder / "a.csv").write_bytes(text.encode("latin-1"))
    (message,) = read(folder, CSV % "").faults.messages
    assert f"{folder}/a.csv:3: byte 0xe4 is not UTF-8. Save the file as UTF-8" in message
    assert "iconv -f LATIN1 -t UTF-8 a.csv" in message


def test_csv_missing_columns(folder: Path) -> None:
    (folder / "a.csv").write_text("file,x1,y1,x2,y_2,lesions\n")
    messages = read(folder, CSV % "").faults.messages
    assert len(messages) == 2
    assert "has no column 'y2' (annotations.columns.box). Did you mean 'y_2'? It has: file, x1" in messages[0]
    assert "has no column 'lesion' (annotations.columns.lesion). Did you mean 'lesions'?" in messages[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"annotations": [{"id": 9, "image_id": 77, "category_id": 1, "bbox": [1, 1, 2, 2]}]},
            "annotation 9: image_id 77",
        ),
        (
            {"annotations": [{"id": 9, "image_id": 5, "category_id": 4, "bbox": [1, 1, 2, 2]}]},
            "category_id 4 is not among",
        ),
        (
            {"annotations": [{"id": 9, "image_id": 5, "category_id": 1, "bbox": [1, 1]}]},
            "needed: [x, y, width, height]",
        ),
        (
            {"annotations": [{"id": 9, "image_id": 5, "category_id": 1, "bbox": [1, None, 2, 2]}]},
            "a.json annotation 9: bbox is [1, None, 2, 2]; needed: [x, y, width, height], numbers",
        ),
        (
            {"annotations": [{"id": 9, "image_id": 5, "category_id": 1, "bbox": None}]},
            "a.json annotations[0]: bbox is None; needed: list",
        ),
        (
            {"annotations": [{"image_id": [5], "category_id": 1, "bbox": []}]},
            "annotations[0]: image_id is [5]; needed: int",
        ),
        ({"annotations": [7]}, "a.json annotations[0]: is 7; needed: an object with image_id, category_id, bbox"),
        (
            {"images": [{"id": 5, "file_name": "pos.png", "height": 3}]},
            "images[0]: width is 'missing'; needed: int or float",
        ),
        ({"images": [{"id": 5, "width": 3, "height": 3}]}, "a.json images[0]: file_name is 'missing'; needed: str"),
        ({"categories": [{"name": "nod"}]}, "a.json categories[0]: id is 'missing'; needed: int or str"),
        ({"images": None}, "a.json: has no images; it holds images, categories, annotations"),
    ],
)
def test_coco_faults(folder: Path, changes: dict[str, Any], words: str) -> None:
    write_coco(folder, **changes)
    (message,) = read(folder, "{reader: coco, files: a.json}").faults.messages
    assert words in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("{}", "has no images, annotations, categories"),
        ("[1]", "a.json: holds a list; needed: an object with lists images, annotations, categories"),
    ],
)
def test_coco_files_that_are_none(folder: Path, text: str, words: str) -> None:
    (folder / "a.json").write_text(text)
    assert words in read(folder, "{reader: coco, files: a.json}").faults.messages[0]


def test_yolo_faults(folder: Path) -> None:
    annotations = yolo(folder)
    (folder / "labels" / "pos.txt").write_text("7 0.5 0.5 0.1 0.1\n0 0.5 0.5\n0 a b c d\n")
    (folder / "labels" / "ghost.txt").write_text("")
    messages = read(folder, annotations).faults.messages
    places = [message.split(": ")[0].rsplit("/", 1)[1] for message in messages]
    assert places == ["ghost.txt", "pos.txt:1", "pos.txt:2", "pos.txt:3"]
    assert "class 7 has no name" in messages[1]


def test_voc_faults(folder: Path) -> None:
    annotations = voc(folder)
    (folder / "xml" / "neg.xml").write_text("<annotation>")
    text = (folder / "xml" / "pos.xml").read_text()
    (folder / "xml" / "pos.xml").write_text(text.replace("<ymin>8</ymin>", ""))
    messages = read(folder, annotations).faults.messages
    assert "neg.xml: not XML" in messages[0]
    assert "pos.xml object 0: bndbox is ['12', None, '42', '19']" in messages[1]


@pytest.mark.parametrize(
    ("width", "size"), [(f"{WIDTH}.0", (WIDTH, HEIGHT)), (f" {WIDTH} ", (WIDTH, HEIGHT)), ("0", None), ("", None)]
)
def test_voc_sizes_are_read_leniently(folder: Path, width: str, size: Any) -> None:
    annotations = voc(folder)
    for path in (folder / "xml").iterdir():
        path.write_text(path.read_text().replace(f"<width>{WIDTH}<", f"<width>{width}<"))
    assert by_name(read(folder, annotations))["pos.png"].size == size


@pytest.mark.parametrize("width", ["wide", "5.5", "-5", "nan"])
def test_voc_sizes_that_are_none_are_faults(folder: Path, width: str) -> None:
    annotations = voc(folder)
    path = folder / "xml" / "pos.xml"
    path.write_text(path.read_text().replace(f"<width>{WIDTH}<", f"<width>{width}<"))
    (message,) = read(folder, annotations).faults.messages
    assert f"pos.xml: size is ['{width}', '{HEIGHT}']; needed: whole numbers" in message


def test_mask_faults(folder: Path) -> None:
    annotations = mask(folder)
    Image.fromarray(np.full((HEIGHT, WIDTH), 9, np.uint8)).save(folder / "masks" / "pos_mask.png")
    (folder / "masks" / "neg_mask.png").unlink()
    messages = read(folder, annotations).faults.messages
    assert "neg_mask.png: no such mask" in messages[0]
    assert "pos_mask.png: holds the values [9]. Allowed: 0 (nothing)" in messages[1]


@pytest.mark.parametrize(
    "annotations",
    [
        "{reader: coco, files: nothing}",
        "{reader: voc, files: nothing}",
        "{reader: yolo, files: nothing, names: [a]}",
        "{reader: mask, files: nothing, masks: nothing, only_class: nod}",
        CSV.replace("a.csv", "nothing") % "",
    ],
)
def test_missing_annotation_files(tmp_path: Path, annotations: str) -> None:
    (message,) = read(tmp_path, annotations).faults.messages
    assert message.startswith(f"{tmp_path}/nothing: no ")


def test_ignored_classes_leave_the_image_out(folder: Path) -> None:
    recipe = write_recipe(folder, coco(folder), extra="ignore_classes: [cy]\n")
    recipe.write_text(recipe.read_text().replace("  cy: {name: cyst}\n", ""))
    found = read_annotations(load_recipe(recipe))
    assert list(by_name(found)) == ["neg.png"]
    assert found.left_out == {"holds an ignored class": 1}


def test_negatives_can_be_dropped(folder: Path) -> None:
    found = read(folder, coco(folder), extra="negatives: drop\n")
    assert list(by_name(found)) == ["pos.png"]
    assert found.left_out == {"negative": 1}


def test_missing_images_are_set_aside(folder: Path) -> None:
    (folder / "neg.png").unlink()
    found = read(folder, coco(folder))
    assert [item.image.name for item in found.missing] == ["neg.png"]
    assert list(by_name(found)) == ["pos.png"]


def write_patients(folder: Path, names: list[str]) -> str:
    (folder / "a.csv").write_text("file,x1,y1,x2,y2,lesion\n" + "".join(f"{name},,,,,\n" for name in names))
    for name in names:
        (folder / name).write_bytes(b"")
    return CSV % ""


def test_patients_are_dealt_out_whole_and_the_same_every_time(tmp_path: Path) -> None:
    names = [f"{patient:03}_{image}.png" for patient in range(500) for image in range(2)]
    rule = "{by: patient, seed: SEED, patient_pattern: '^(\\d+)_', fractions: {train: 0.7, val: 0.1, test: 0.2}}"

    def splits(order: list[str], seed: int) -> dict[str, str]:
        found = read(tmp_path, write_patients(tmp_path, order), rule.replace("SEED", str(seed)))
        return {item.image.name: item.split for item in found.items}

    first = splits(names, 0)
    counts = {split: list(first.values()).count(split) / len(names) for split in ("train", "val", "test")}
    # Three standard deviations of 500 patients.
    assert counts == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.06)
    assert all(len({first[f"{patient:03}_{image}.png"] for image in range(2)}) == 1 for patient in range(500))
    assert splits(names[::-1], 0) == first
    assert splits(names, 1) != first
    # Who has fewer of the images, as of an archive that is not downloaded yet, has them in the same splits.
    assert splits(names[300:340], 0) == {name: first[name] for name in names[300:340]}


def test_a_split_of_no_share_stays_empty(tmp_path: Path) -> None:
    names = [f"{patient:03}_0.png" for patient in range(300)]
    found = read(
        tmp_path, write_patients(tmp_path, names), "{by: patient, fractions: {train: 0.6, val: 0.0, test: 0.4}}"
    )
    assert {item.split for item in found.items} == {"train", "test"}


def test_copies_are_of_one_patient_and_one_of_them_is_held_out(tmp_path: Path) -> None:
    names = [f"{stem:02}_jpg.rf.{copy}.png" for stem in range(40) for copy in "abc"]
    found = read(tmp_path, write_patients(tmp_path, names), "{by: patient, copy_pattern: '^(.+)\\.rf\\.'}")
    by_split: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for item in found.items:
        by_split[item.split].append(item.image.name)
        assert item.patient == item.copy_of == item.image.name[:6]
    assert all(name.endswith(".rf.a.png") for split in ("val", "test") for name in by_split[split])
    assert len({name[:2] for name in by_split["train"]}) * 3 == len(by_split["train"])
    held_out = len(by_split["val"]) + len(by_split["test"])
    assert held_out > 0
    assert found.left_out == {"augmented copy in val or test": 2 * held_out}


def test_the_patient_is_the_file_name_without_ending_when_nothing_says_it(tmp_path: Path) -> None:
    found = read(tmp_path, write_patients(tmp_path, ["a.nii.gz", "b.rf.12.png"]))
    assert [item.patient for item in found.items] == ["a", "b.rf.12"]


def test_a_users_own_reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "my_reader.py").write_text(
        "from umed_plugin.data.annotations import Annotated\n"
        "def read(options, root, faults):\n"
        "    return [Annotated(root / 'pos.png', [(1, 2, 3, 4)], [options.label], 'here')]\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    items = by_name(read(folder, "{reader: 'my_reader:read', files: x, label: cy}"))
    assert items["pos.png"].classes == ["cyst"]


OWN_READER = """
from pydantic import Field

from umed_plugin.data.annotations import Annotated, ReaderOptions, register_reader


class SpotOptions(ReaderOptions):
    yaml_example_ = "annotations: {reader: spots, files: a.txt, label: nod}"

    label: str = Field(description="Class of every spot.")
    side: int = Field(2, gt=0, description="Side of the box around a spot, in pixels.")


@register_reader("spots", SpotOptions)
def read_spots(options, root, faults):
    return [Annotated(root / "pos.png", [(1, 2, 1 + options.side, 2 + options.side)], [options.label], "here")]
"""


def test_a_users_own_reader_with_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(READERS)
    monkeypatch.setattr(READERS, "_entries", dict(READERS._entries))
    (folder / "spot_reader.py").write_text(OWN_READER)
    monkeypatch.syspath_prepend(str(folder))
    by_path = "{reader: 'spot_reader:read_spots', files: x, label: cy, side: 3}"
    assert by_name(read(folder, by_path))["pos.png"].boxes == [(1, 2, 4, 5)]
    # Imported by now, so that its name will do.
    assert by_name(read(folder, "{reader: spots, files: x, label: nod}"))["pos.png"].boxes == [(1, 2, 3, 4)]
    with pytest.raises(UmedError) as caught:
        read(folder, by_path.replace("side: 3", "sied: 0"))
    assert "annotations.sied: unknown key 'sied'. Did you mean 'side'? Allowed: files, image_root" in str(caught.value)
    with pytest.raises(UmedError, match=r"annotations.label: missing. Class of every spot."):
        read(folder, "{reader: spots, files: x}")


@pytest.mark.filterwarnings("error:Field name .* shadows an attribute:UserWarning")
def test_a_users_own_reader_may_take_any_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that the models use for themselves are none that a recipe would use."""
    list(READERS)
    monkeypatch.setattr(READERS, "_entries", dict(READERS._entries))
    keys = "    example: str = Field(description='An example.')\n    filled_in: str = Field('cy', description='A class.')\n\n"
    text = OWN_READER.replace("    label: str", f"{keys}    label: str").replace(
        "[options.label]", "[options.filled_in]"
    )
    (folder / "key_reader.py").write_text(text.replace("spots", "spots_of_keys"))
    monkeypatch.syspath_prepend(str(folder))
    keys = "{reader: 'key_reader:read_spots_of_keys', files: x, label: nod, example: a"
    assert by_name(read(folder, f"{keys}}}"))["pos.png"].classes == ["cyst"]
    assert by_name(read(folder, f"{keys}, filled_in: nod}}"))["pos.png"].classes == ["nodule"]
    with pytest.raises(UmedError, match=r"unknown key 'exampel'. Did you mean 'example'\? Allowed: .*filled_in"):
        read(folder, f"{keys}, exampel: b}}")
    with pytest.raises(UmedError, match=r"annotations.example: missing. An example\."):
        read(folder, keys.replace(", example: a", "}"))


@pytest.mark.parametrize("module", ["data.annotations", "data.recipes.readers"])
def test_the_name_of_a_shipped_reader_is_refused_at_the_users_line(folder: Path, module: str) -> None:
    """In a fresh process, in which the shipped reader has not been imported by then."""
    (folder / "clash.py").write_text(
        f"from umed_plugin.{module} import register_reader\n\n@register_reader('mask')\n"
        "def read(options, root, faults):\n    return []\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}
    run = subprocess.run([sys.executable, "-c", "import clash"], env=environment, capture_output=True, text=True)
    assert "ValueError: annotation reader 'mask' is registered already, as <function read_mask" in run.stderr
    assert 'clash.py", line 3, in <module>' in run.stderr


def test_an_own_reader_that_does_not_exist(folder: Path) -> None:
    with pytest.raises(UmedError, match=r"annotations.reader: annotation reader 'no_reader:read': there is no module"):
        read(folder, "{reader: 'no_reader:read', files: x}")


def test_a_new_format_is_one_new_file(folder: Path) -> None:
    """A module beside the shipped readers is enough: nothing else names it."""
    (folder / "formats").mkdir()
    (folder / "formats" / "spots.py").write_text(OWN_READER)
    recipe = write_recipe(folder, "{reader: spots, files: x, label: cy}")
    code = f"""
from umed_plugin.data import annotations
annotations.__path__.append({str(folder / "formats")!r})
from umed_plugin.data.recipes.readers import READERS
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError
from umed_plugin.data.recipes.reference import recipe_reference
(item,) = annotations.read_annotations(load_recipe({str(recipe)!r})).items
print(item.boxes, item.classes, "| `side` | whole number, above 0 | `2` |" in recipe_reference())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "[(1, 2, 3, 4)] ['cyst'] True\n", run.stderr


def test_images_are_looked_for_in_several_folders(folder: Path) -> None:
    """NIH's images lie in twelve folders, DeepLesion's in one of a series' name or under their own."""
    for name in ("part_1/images", "part_2/images", "flat"):
        (folder / name).mkdir(parents=True)
    (folder / "pos.png").rename(folder / "part_2" / "images" / "pos.png")
    (folder / "neg.png").rename(folder / "flat" / "a_neg.png")
    (folder / "a.csv").write_text("file,x1,y1,x2,y2,lesion\np_pos.png,1,2,3,4,nod\na_neg.png,,,,,\nc_d.png,,,,,\n")
    roots = "rename: ['^._', ''], image_root: ['part_*/images', flat]"
    found = read(folder, CSV % f", {roots}")
    assert [item.image for item in found.items] == [folder / "part_2/images/pos.png", folder / "flat/a_neg.png"]
    assert [item.image for item in found.missing] == [folder / "part_1/images/d.png"]


def test_image_folders_per_split(folder: Path) -> None:
    """Roboflow calls its folder `valid`."""
    for name in ("train", "valid"):
        (folder / name / "images").mkdir(parents=True)
        (folder / name / "labels").mkdir()
    (folder / "pos.png").rename(folder / "train/images/pos.png")
    (folder / "neg.png").rename(folder / "valid/images/neg.png")
    (folder / "train/labels/pos.txt").write_text("1 0.5 0.5 0.2 0.2\n")
    files = "files: {train: train/labels, val: valid/labels}, names: [cy, nod]"
    roots = "image_root: {train: '{split}/images', val: valid/images}"
    items = by_name(read(folder, f"{{reader: yolo, {files}, {roots}}}", "{by: file}"))
    assert {name: (item.split, item.classes) for name, item in items.items()} == {
        "pos.png": ("train", ["nodule"]),
        "neg.png": ("val", []),
    }


def test_a_pattern_stands_for_one_annotation_file(folder: Path) -> None:
    csv_xyxy(folder)
    assert set(by_name(read(folder, (CSV % "").replace("a.csv", "a*.csv")))) == {"pos.png", "neg.png"}
    (folder / "a2.csv").write_text("")
    (message,) = read(folder, (CSV % "").replace("a.csv", "'a*.csv'")).faults.messages
    assert "a*.csv: matches a.csv, a2.csv; needed: one" in message


def test_an_image_with_a_row_to_be_left_out_is_left_out_whole(folder: Path) -> None:
    (folder / "a.csv").write_text(
        "file,x1,y1,x2,y2,lesion,noisy\npos.png,1,2,3,4,nod,0\npos.png,5,6,7,8,nod,1\nneg.png,1,2,3,4,cy,0\n"
    )
    found = read(folder, CSV % ", leave_out_images: {noisy: ['1']}")
    assert list(by_name(found)) == ["neg.png"]
    assert found.left_out == {"noisy is 1": 1}
    (message,) = read(folder, CSV % ", leave_out_images: {nosy: ['1']}").faults.messages
    assert "has no column 'nosy' (annotations.leave_out_images). Did you mean 'noisy'?" in message


def write_listed(folder: Path) -> str:
    """4 images with a lesion, 3 with one by the list alone, 6 listed without, one of them not on disk and one annotated."""
    names = [f"{letter}.png" for letter in "abcdefghij"]
    for name in names:
        (folder / name).write_bytes(b"")
    (folder / "a.csv").write_text("file,x1,y1,x2,y2,lesion\n" + "".join(f"{name},1,2,3,4,nod\n" for name in names[:4]))
    listed = [(name, "none") for name in [*names[3:8], "z.png"]] + [(name, "cy") for name in names[8:]]
    (folder / "list_v2.csv").write_text("Image,Labels\n" + "".join(f"{name},{label}\n" for name, label in listed))
    return "negatives: {listed: {files: 'list*.csv', file: Image, only_rows: {Labels: [none]}}}\n"


def test_negatives_from_a_list(tmp_path: Path) -> None:
    found = read(tmp_path, CSV % "", extra=write_listed(tmp_path))
    assert {name: len(item.boxes) for name, item in by_name(found).items()} == {
        **{f"{letter}.png": 1 for letter in "abcd"},
        **{f"{letter}.png": 0 for letter in "efgh"},
    }
    assert found.missing == []
    assert found.left_out == {"listed as negative, but annotated": 1, "listed as negative, not on disk": 1}


def test_an_image_of_an_ignored_class_does_not_come_back_as_a_negative(tmp_path: Path) -> None:
    extra = write_listed(tmp_path) + "ignore_classes: [odd]\n"
    (tmp_path / "a.csv").write_text("file,x1,y1,x2,y2,lesion\ne.png,1,2,3,4,odd\n")
    assert list(by_name(read(tmp_path, CSV % "", extra=extra))) == ["d.png", "f.png", "g.png", "h.png"]


def test_which_and_how_many_negatives(tmp_path: Path) -> None:
    extra = write_listed(tmp_path)
    only = extra.replace("negatives: {", "negatives: {only: '^[ef]', ")
    found = read(tmp_path, CSV % "", extra=only)
    assert [item.image.name for item in found.items if not item.boxes] == ["e.png", "f.png"]
    assert found.left_out["listed as negative, but not one of negatives.only"] == 2
    rule = "{by: patient, seed: SEED, fractions: {train: 1.0, val: 0.0, test: 0.0}}"

    def chosen(seed: int) -> list[str]:
        half = extra.replace("negatives: {", "negatives: {per_positive: 0.5, ")
        found = read(tmp_path, CSV % "", rule.replace("SEED", str(seed)), extra=half)
        assert found.left_out["negative above negatives.per_positive"] == 2
        return [item.image.name for item in found.items if not item.boxes]

    picked = [chosen(seed) for seed in range(6)]
    assert {len(names) for names in picked} == {2}
    assert picked == [chosen(seed) for seed in range(6)]
    assert len({tuple(names) for names in picked}) > 1


def test_an_image_without_a_lesion_that_may_show_one_is_left_out(folder: Path) -> None:
    """TBX11K has a TB image without a box; only those of its healthy folder are known to be without."""
    found = read(folder, csv_xyxy(folder), extra="negatives: {only: ^health/}\n")
    assert list(by_name(found)) == ["pos.png"]
    assert found.left_out == {"without a lesion, but not one of negatives.only": 1}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"bbox": 3}, "entry pos: has no list 'bbox' (annotations.boxes); it holds bbox"),
        (7, "entry pos: has no list 'bbox' (annotations.boxes); it holds 7"),
        (
            {"bbox": [{"label": "nod", "xmin": 1}], "width": 5, "height": 5},
            "entry pos box 0: is {'label': 'nod', 'xmin': 1}",
        ),
        ({"bbox": [{"xmin": 1, "ymin": 1, "xmax": 2, "ymax": 2}], "width": 5, "height": 5}, "box 0: has no 'label'"),
        ({"bbox": [], "width": "5", "height": 5}, "width and height are ['5', 5]; needed: whole numbers of pixels"),
    ],
)
def test_json_faults(folder: Path, entry: Any, words: str) -> None:
    annotations = json_by_image(folder)
    (folder / "a.json").write_text(json.dumps({"pos": entry}))
    assert any(words in message for message in read(folder, annotations).faults.messages)


@pytest.mark.parametrize(
    ("text", "words"), [("{", "a.json: not JSON"), ("3", "a.json: holds a int; needed: an object of")]
)
def test_json_files_that_are_none(folder: Path, text: str, words: str) -> None:
    annotations = json_by_image(folder)
    (folder / "a.json").write_text(text)
    assert words in read(folder, annotations).faults.messages[0]


def test_a_json_image_path_from_a_field_that_is_missing(folder: Path) -> None:
    annotations = json_by_image(folder).replace("{key}", "{name}")
    assert "entry pos: has no field 'name' (annotations.image)" in read(folder, annotations).faults.messages[0]
