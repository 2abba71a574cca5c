"""Mistakes of a box's numbers: units, shapes, duplicates, and values that are no numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from support.annotation_files import (
    ALL_IN_TRAIN,
    BOX,
    COCO,
    CSV,
    HEAD,
    JSON,
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
from support.drawn import write_recipe

from umed_plugin.data.checking.check import check_recipe
from umed_plugin.data.recipes.recipe import load_recipe


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


def rotation(value: str) -> str:
    """An object's attributes as CVAT writes them to Pascal VOC."""
    return f"<attributes><attribute><name>rotation</name><value>{value}</value></attribute></attributes>"


@pytest.mark.parametrize(
    ("written", "more", "expected"),
    [
        (([30, 35, 40, 10], {"segmentation": []}), "", (45, 20, 55, 60)),
        # Of an outline the bbox is the extent already.
        (([45, 20, 10, 40], {"segmentation": [[45, 20, 55, 20, 55, 60, 45, 60]]}), "", (45, 20, 55, 60)),
        (([0.3, 0.4375, 0.4, 0.125], {}), ", normalised: true", (0.45, 0.25, 0.55, 0.75)),
    ],
)
def test_cvats_rotation_in_coco(tmp_path: Path, written: Any, more: str, expected: tuple[float, ...]) -> None:
    put(tmp_path / "a.png")
    box, fields = written
    coco(tmp_path, [(1, "a.png")], [(1, box, {**fields, "attributes": {"occluded": False, "rotation": 90.0}})])
    assert boxes(read(tmp_path, COCO % more)) == {"a.png": [pytest.approx(expected)]}


@pytest.mark.parametrize(("convention", "expected"), [("half_open", (45, 20, 55, 60)), ("one_based", (44, 19, 55, 60))])
def test_cvats_rotation_in_voc(tmp_path: Path, convention: str, expected: tuple[float, ...]) -> None:
    put(tmp_path / "img" / "a.png")
    put(tmp_path / "xml" / "a.xml", xml("a.png", an_object((30, 35, 70, 45), rotation("90.0"))))
    assert boxes(read(tmp_path, VOC % f", convention: {convention}")) == {"img/a.png": [expected]}


def test_a_rotation_that_is_no_number(tmp_path: Path) -> None:
    put(tmp_path / "img" / "a.png")
    put(tmp_path / "xml" / "a.xml", xml("a.png", an_object(more=rotation("left"))))
    assert "attribute 'rotation' that is no number" in read(tmp_path, VOC % "").faults.messages[0]
    put(tmp_path / "a.png")
    coco(tmp_path, [(1, "a.png")], [(1, [10, 20, 20, 20], {"attributes": {"rotation": "left"}})])
    assert "attributes.rotation is 'left'; needed: degrees" in read(tmp_path, COCO % "").faults.messages[0]


def test_a_voc_object_of_two_boxes_is_a_fault(tmp_path: Path) -> None:
    put(tmp_path / "img" / "a.png")
    second = "<bndbox><xmin>50</xmin><ymin>50</ymin><xmax>69</xmax><ymax>69</ymax></bndbox>"
    put(tmp_path / "xml" / "a.xml", xml("a.png", an_object(more=second)))
    (message,) = read(tmp_path, VOC % "").faults.messages
    assert "a.xml object 0: has 2 <bndbox>; needed: one" in message


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


@pytest.mark.parametrize("form", ["csv", "coco", "json"])
@pytest.mark.parametrize(
    ("box", "unit", "expected"),
    [
        ((0.1, 0.2, 0.3, 0.4), "", "Are these fractions? Then: normalised: true"),
        ((0.1, 0.2, 0.3, 0.4), ", normalised: true", (0.1, 0.2, 0.3, 0.4)),
        ((10.0, 20.0, 30.0, 40.0), ", normalised: percent", (0.1, 0.2, 0.3, 0.4)),
        ((0.1, 0.1, 0.5, 0.6), ", normalised: percent", "Are these fractions? Then: normalised: true"),
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


@pytest.mark.parametrize(
    ("form", "side", "told"), [("csv", 500, 1), ("json", 500, 1), ("coco", 500, 1), ("csv", 300, 0)]
)
def test_percent_read_as_pixels_is_told_whoever_knows_the_size(tmp_path: Path, form: str, side: int, told: int) -> None:
    put(tmp_path / "a.png", np.zeros((side, side), np.uint8))
    corners = [(10 + i, 20, 30 + i, 40 + i) for i in range(25)]
    if form == "csv":
        put(tmp_path / "a.csv", HEAD + "".join(f"a.png,{','.join(map(str, box))},nod\n" for box in corners))
    elif form == "json":
        put(tmp_path / "a.json", json.dumps({"a.png": {"b": [{"at": box} for box in corners]}}))
    else:
        sized = [(1, [x1, y1, x2 - x1, y2 - y1], {}) for x1, y1, x2, y2 in corners]
        coco(tmp_path, [(1, "a.png")], sized)
        content = json.loads((tmp_path / "a.json").read_text())
        content["images"][0] |= {"width": side, "height": side}
        put(tmp_path / "a.json", json.dumps(content))
    annotations = {"csv": CSV, "json": JSON, "coco": COCO}[form] % ""
    recipe = load_recipe(write_recipe(tmp_path, annotations, "{by: patient, fractions: {train: 1}}"))
    remarks = [line for line in check_recipe(recipe).annotations.told() if "Are these percent?" in line]
    assert len(remarks) == told


SQUARES, OBLONGS = [(1700, 1700), (1800, 1800)], [(1650, 2000), (1900, 1600)]


@pytest.mark.parametrize("form", ["csv", "coco"])
@pytest.mark.parametrize(
    ("sizes", "furthest", "told"),
    [
        (SQUARES, (970, 995), True),
        (OBLONGS, (970, 995), True),
        (OBLONGS, (940, 995), False),
        (OBLONGS, (970, 940), False),
        (OBLONGS, (970, 1100), False),
        (SQUARES, (1100, 995), False),
        ([(1650, 2000)] * 2, (970, 995), False),
        ([(1700, 1100), (1100, 1700)], (970, 995), False),
    ],
)
def test_thousandths_read_as_pixels(
    tmp_path: Path, form: str, sizes: list[tuple[int, int]], furthest: tuple[int, int], told: bool
) -> None:
    """Told where images of several sizes reach well beyond 1000 and no box does, whoever knows the size."""
    names, corners = ["a.png", "b.png"], [(10 + 9 * i, 20, 30 + 9 * i, 40 + i) for i in range(12)]
    corners[3] = (500, 600, *furthest)
    for name, (width, height) in zip(names, sizes):
        put(tmp_path / name, np.zeros((height, width), np.uint8))
    if form == "csv":
        rows = [f"{name},{','.join(map(str, box))},nod\n" for name in names for box in corners]
        put(tmp_path / "a.csv", HEAD + "".join(rows))
    else:
        sized = [(i, [x1, y1, x2 - x1, y2 - y1], {}) for i in (1, 2) for x1, y1, x2, y2 in corners]
        coco(tmp_path, list(enumerate(names, start=1)), sized)
        content = json.loads((tmp_path / "a.json").read_text())
        for image, (width, height) in zip(content["images"], sizes):
            image |= {"width": width, "height": height}
        put(tmp_path / "a.json", json.dumps(content))
    recipe = load_recipe(write_recipe(tmp_path, {"csv": CSV, "coco": COCO}[form] % "", ALL_IN_TRAIN))
    annotations = check_recipe(recipe).annotations
    assert annotations.faults.messages == []
    remarks = [line for line in annotations.told() if "Are these thousandths" in line]
    assert len(remarks) == told
    assert all("Then divide them by 1000, and write normalised: true" in line for line in remarks)


@pytest.mark.parametrize("convention", ["one_based", "inclusive", "half_open"])
def test_fractions_in_voc(tmp_path: Path, convention: str) -> None:
    put(tmp_path / "img" / "a.png")
    fractions = an_object((0.1, 0.2, 0.4, 0.6))  # type: ignore[arg-type]
    put(tmp_path / "xml" / "a.xml", xml("a.png", fractions))
    (message,) = read(tmp_path, VOC % f", convention: {convention}").faults.messages
    assert "box [0.1, 0.2, 0.4, 0.6] lies within the first pixel, like 1 of 1 boxes. Are these fractions?" in message
    assert message.endswith("The reader voc takes pixels alone")


def test_fractions_in_label_studio(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    size = {"original_width": 512, "original_height": 512}
    value = {"x": 0.1, "y": 0.1, "width": 0.4, "height": 0.5, "rotation": 0, "rectanglelabels": ["nod"]}
    task = {"data": {"image": "a.png"}, "annotations": [{"result": [{**size, "to_name": "image", "value": value}]}]}
    put(tmp_path / "a.json", json.dumps([task]))
    (message,) = read(tmp_path, "{reader: label_studio, files: a.json}").faults.messages
    assert "box [0.1, 0.1, 0.5, 0.6] lies within the first percent of its image, like 1 of 1 boxes" in message
    assert message.endswith("The reader label_studio takes percent alone")


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
