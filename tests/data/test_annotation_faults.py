"""What an annotation file of each format can get wrong, and the words that name the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.annotation_formats import CSV, by_name, json_by_image, mask, read, two_images, voc, write_coco, yolo
from support.drawn import HEIGHT, WIDTH


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_images(tmp_path)


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
        *(
            (
                {"images": [{"id": 5, "file_name": "pos.png", "width": width, "height": 3}]},
                f"a.json image 5: width and height are [{width}, 3]; needed: whole numbers of pixels",
            )
            for width in (float("nan"), float("inf"), 100.5, -1)
        ),
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
