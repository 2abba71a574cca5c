"""Label Studio, labelme and CVAT: files in the form that the tools write, with made-up content, and mistakes in them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from support.drawn import write_recipe

from umed_plugin.data.annotations import AnnotationSet, read_annotations
from umed_plugin.data.annotations.brush import decode_brush
from umed_plugin.data.annotations.shapes import ellipse, number, numbers, points_of, turned_rectangle
from umed_plugin.data.recipes.recipe import load_recipe

STUDIO = "{reader: label_studio, files: a.json%s}"
LABELME = "{reader: labelme, files: 'ann/*.json'%s}"
CVAT = "{reader: cvat, files: a.xml%s}"


def read(folder: Path, annotations: str) -> AnnotationSet:
    return read_annotations(load_recipe(write_recipe(folder, annotations, "{by: patient, fractions: {train: 1}}")))


def boxes(found: AnnotationSet) -> dict[str, list[Any]]:
    assert found.faults.messages == []
    return {os.path.relpath(item.image, found.root): [pytest.approx(box) for box in item.boxes] for item in found.items}


def fault(found: AnnotationSet) -> str:
    (message,) = found.faults.messages
    return message


# Label Studio


def region(value: dict[str, Any], kind: str = "rectanglelabels", **more: Any) -> dict[str, Any]:
    """A result on an image of 200 x 100 pixels."""
    value = {kind: ["nod"], **value}
    fields = {"original_width": 200, "original_height": 100, "image_rotation": 0, "id": f"r{abs(hash(str(value)))}"}
    return {**fields, "from_name": "label", "to_name": "image", "type": kind, "value": value, **more}


def rectangle(x: float, y: float, width: float, height: float, rotation: float = 0, **more: Any) -> dict[str, Any]:
    return region({"x": x, "y": y, "width": width, "height": height, "rotation": rotation}, **more)


def task(image: str, *annotations: Any, **more: Any) -> dict[str, Any]:
    return {"id": 7, "data": {"image": image}, "annotations": list(annotations), "predictions": [], **more}


def annotation(*results: Any, by: Any = 1, **more: Any) -> dict[str, Any]:
    return {
        "id": 70,
        "completed_by": by,
        "was_cancelled": False,
        "ground_truth": False,
        "result": list(results),
        **more,
    }


def studio(folder: Path, content: Any, more: str = "", images: tuple[str, ...] = ("a.png",)) -> AnnotationSet:
    for name in images:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    return read(folder, STUDIO % more)


def packed(mask: np.ndarray) -> list[int]:
    """rle-pack's code of a mask as RGBA: one repeated run, or one run of single values, for each stretch."""
    values = np.repeat(mask.ravel().astype(int) * 255, 4)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    starts = [0, *(np.flatnonzero(np.diff(values)) + 1), len(values)]
    for begin, end in zip(starts, starts[1:]):
        if end - begin == 4:  # values as they are
            bits += f"0{1:02b}{end - begin - 1:04b}" + "".join(f"{value:08b}" for value in values[begin:end])
        else:
            bits += f"1{3:02b}{end - begin - 1:016b}{values[begin]:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[place : place + 8], 2) for place in range(0, len(bits), 8)]


def painted() -> np.ndarray:
    mask = np.zeros((100, 200), bool)
    mask[10:20, 20:40] = True
    mask[50, 60] = True
    return mask


SHAPES = [
    (rectangle(10, 20, 20, 30), [(0.1, 0.2, 0.3, 0.5)]),
    # A quarter turn clockwise about the corner at x 100, y 20: 40 px wide and 30 px high becomes 30 wide and 40 high.
    (rectangle(50, 20, 20, 30, 90), [(70 / 200, 0.2, 0.5, 0.6)]),
    (region({"points": [[10, 20], [30, 20], [20, 60]]}, "polygonlabels"), [(0.1, 0.2, 0.3, 0.6)]),
    (region({"x": 50, "y": 50, "radiusX": 10, "radiusY": 20, "rotation": 0}, "ellipselabels"), [(0.4, 0.3, 0.6, 0.7)]),
    (region({"format": "rle", "rle": packed(painted())}, "brushlabels"), [(0.1, 0.1, 61 / 200, 0.51)]),
]


@pytest.mark.parametrize(("result", "expected"), SHAPES)
@pytest.mark.parametrize("form", ["json", "min"])
def test_label_studios_shapes(tmp_path: Path, form: str, result: dict[str, Any], expected: list[Any]) -> None:
    if form == "json":
        found = studio(tmp_path, [task("a.png", annotation(result))])
    else:
        of_region = {**result["value"], "original_width": 200, "original_height": 100}
        entry = {"image": "a.png", "id": 7, "label": [of_region], "annotator": 1, "annotation_id": 70}
        found = studio(tmp_path, [entry])
    assert boxes(found) == {"a.png": expected}
    (item,) = found.items
    assert (item.size, item.normalised, item.classes) == ((200, 100), True, ["nodule"])


def test_a_brush_in_parts(tmp_path: Path) -> None:
    content = [task("a.png", annotation(region({"format": "rle", "rle": packed(painted())}, "brushlabels")))]
    assert any("1 brush regions have several parts" in line for line in studio(tmp_path, content).told())
    found = studio(tmp_path, content, ", brush: parts")
    assert boxes(found) == {"a.png": [(0.1, 0.1, 0.2, 0.2), (0.3, 0.5, 61 / 200, 0.51)]}
    assert (decode_brush(packed(painted()), 200, 100) == painted()).all()
    for code, words in (
        ([], "list of bytes"),
        ([255] * 3, "ends early"),
        (packed(painted()[:50]), "values; needed: 4"),
    ):
        with pytest.raises(ValueError, match=words):
            decode_brush(code, 200, 100)


@pytest.mark.parametrize(
    ("written", "file"),
    [
        ("/data/upload/1/0a1b2c3d-scan%201.png", "scan 1.png"),
        ("/data/upload/1/0a1b2c3d-scan.png", "0a1b2c3d-scan.png"),
        ("/data/local-files/?d=set/a.png", "set/a.png"),
        ("s3://bucket/set/a.png", "set/a.png"),
        ("https://example.org/x/a.png?token=1", "a.png"),
        ("C:\\scans\\a.png", "a.png"),
    ],
)
def test_where_label_studio_says_the_image_is(tmp_path: Path, written: str, file: str) -> None:
    assert list(boxes(studio(tmp_path, [task(written, annotation())], images=(file,)))) == [file]


def test_what_is_no_annotation_is_counted(tmp_path: Path) -> None:
    guess = {"model_version": "m", "result": [rectangle(1, 2, 30, 40)]}
    content = [
        task("a.png", annotation(), predictions=[guess, guess]),
        task("b.png", annotation(rectangle(1, 2, 30, 40), was_cancelled=True), drafts=[{}]),
        task("c.png", predictions=[guess]),
    ]
    found = studio(tmp_path, content, images=("a.png", "b.png", "c.png"))
    assert boxes(found) == {"a.png": []}
    assert found.faults.left_out == {
        ("predictions", "of a model, no annotations"): 3,
        ("drafts", "not submitted"): 1,
        ("annotations", "was_cancelled"): 1,
        ("tasks", "without a submitted annotation"): 2,
    }
    (without,) = studio(tmp_path, [{"image": "a.png", "id": 1}]).faults.left_out
    assert without == ("tasks", "without a submitted annotation")


@pytest.mark.parametrize("form", ["json", "min"])
def test_choices_without_a_region(tmp_path: Path, form: str) -> None:
    said = {"id": "x", "type": "choices", "value": {"choices": ["normal"]}}
    entry = {"image": "a.png", "id": 1, "annotator": 1, "annotation_id": 3, "quality": {"choices": ["normal"]}}
    content = [task("a.png", annotation(said))] if form == "json" else [entry]
    found = studio(tmp_path, content)
    assert found.left_out == {"has choices or texts, but no region; annotations.no_finding": 1}
    assert boxes(studio(tmp_path, content, ", no_finding: [normal]")) == {"a.png": []}


@pytest.mark.parametrize("form", ["json", "min"])
@pytest.mark.parametrize(
    ("said", "left_out"),
    [
        ("Suspicious", {"has choices or texts, but no region; annotations.no_finding": 1}),
        (None, {"has no region, and none of annotations.no_finding": 1}),
    ],
)
def test_an_image_that_is_not_called_normal_is_no_negative(
    tmp_path: Path, form: str, said: Optional[str], left_out: dict[str, int]
) -> None:
    content = []
    for index, (name, choice) in enumerate({"a.png": "Normal", "b.png": said}.items()):
        if form == "json":
            chosen = {"id": "x", "type": "choices", "value": {"choices": [choice]}}
            content.append(task(name, annotation(*([chosen] if choice else []))))
        else:
            entry = {"image": name, "id": index, "annotator": 1, "annotation_id": index, "site": "North"}
            content.append({**entry, **({"diagnosis": choice} if choice else {})})
    found = studio(tmp_path, content, ", no_finding: [Normal]", images=("a.png", "b.png"))
    assert boxes(found) == {"a.png": []} and found.left_out == left_out


def test_several_annotators(tmp_path: Path) -> None:
    content = [
        task("a.png", annotation(rectangle(10, 20, 20, 30)), annotation(rectangle(12, 20, 20, 30), by={"email": "b@x"}))
    ]
    assert "read by several readers (1, b@x)" in fault(studio(tmp_path, content))
    assert boxes(studio(tmp_path, content, ", readers: {use: 1}")) == {"a.png": [(0.1, 0.2, 0.3, 0.5)]}
    assert boxes(studio(tmp_path, content, ", readers: {consensus: wbf}")) == {"a.png": [(0.11, 0.2, 0.31, 0.5)]}


def test_a_label_beside_its_rectangle(tmp_path: Path) -> None:
    plain = rectangle(10, 20, 20, 30, id="one")
    del plain["value"]["rectanglelabels"]
    label = region({"x": 10, "y": 20, "width": 20, "height": 30, "labels": ["cy"]}, "labels", id="one")
    found = studio(tmp_path, [task("a.png", annotation(plain, label))])
    assert boxes(found) == {"a.png": [(0.1, 0.2, 0.3, 0.5)]}
    assert found.items[0].classes == ["cyst"]
    assert "has no label" in fault(studio(tmp_path, [task("a.png", annotation(plain))]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": 1}, "holds a dict; needed: a list of tasks"),
        ([task("../secret.png", annotation())], "is not in the data root"),
        ([{"id": 1, "data": {"img": "a.png"}, "annotations": [annotation()]}], "'image' (annotations.image) is None"),
        ([task("data:image/png;base64,AAAA", annotation())], "is an image inside the JSON"),
        ([task("a.png", annotation(rectangle(1, 2, 3, 4, original_width=None)))], "has no original_width"),
        ([task("a.png", annotation(rectangle(1, 2, 3, 4, image_rotation=90)))], "drawn on a turned image"),
        ([task("a.png", annotation(rectangle("x", 2, 3, 4)))], "needs numbers x, y, width, height in percent"),  # type: ignore[arg-type]
        ([task("a.png", annotation(rectangle(100, 200, 900, 400)))], "far outside of its image"),
        ([task("s3://b/x/a.png", annotation()), task("s3://b/y/a.png", annotation())], "both lead to"),
        ([task("a.png", annotation(region({"rle": [1, 2]}, "brushlabels")))], "brush: ends early"),
        ([["a.png"]], "is a list; needed: an object"),
    ],
)
def test_mistakes_in_label_studios_files(tmp_path: Path, content: Any, words: str) -> None:
    assert words in fault(studio(tmp_path, content))


def test_keypoints_do_not_become_a_negative(tmp_path: Path) -> None:
    point = region({"x": 10, "y": 20, "width": 0.3}, "keypointlabels")
    found = studio(tmp_path, [task("a.png", annotation(point))])
    assert found.items == []
    assert found.left_out == {"all of its boxes are left out": 1}


@pytest.mark.parametrize("form", ["json", "min"])
def test_a_region_of_an_unread_kind_is_counted_and_makes_no_negative(tmp_path: Path, form: str) -> None:
    bitmask = region({"imageDataURL": "data:image/png;base64,AAAA"}, "bitmasklabels")
    if form == "json":
        content = [task("a.png", annotation(rectangle(10, 20, 20, 30), bitmask)), task("b.png", annotation(bitmask))]
    else:
        of_region, of_mask = (
            {**one["value"], "original_width": 200, "original_height": 100}
            for one in (rectangle(10, 20, 20, 30), bitmask)
        )
        entry = {"id": 7, "annotator": 1, "annotation_id": 70, "mask": [of_mask]}
        content = [{**entry, "image": "a.png", "label": [of_region]}, {**entry, "image": "b.png"}]
    found = studio(tmp_path, content, images=("a.png", "b.png"))
    assert boxes(found) == {"a.png": [(0.1, 0.2, 0.3, 0.5)]}
    assert found.left_out == {"all of its boxes are left out": 1}
    assert found.faults.left_out == {("boxes", "bitmasklabels, whose shape is not read"): 2}


def test_a_text_of_json_min_may_be_a_choice(tmp_path: Path) -> None:
    entry = {"id": 1, "annotator": 1, "annotation_id": 3, "mask": []}
    content = [{**entry, "image": "a.png", "kind": "Tumor"}, {**entry, "image": "b.png", "second": "b2.png"}]
    found = studio(tmp_path, content, images=("a.png", "b.png"))
    assert boxes(found) == {"b.png": []}
    assert found.left_out == {
        "has no region, and 'kind' may be a choice; annotations.no_finding, or the export JSON": 1
    }


def test_a_field_of_json_min_beside_regions_is_no_choice(tmp_path: Path) -> None:
    entry = {"id": 1, "annotator": 1, "annotation_id": 3, "site": "hospital A"}
    drawn = {**rectangle(10, 20, 20, 30)["value"], "original_width": 200, "original_height": 100}
    content = [{**entry, "image": "a.png", "label": [drawn]}, {**entry, "image": "b.png"}]
    content.append({**entry, "image": "c.png", "kind": "Tumor"})
    found = studio(tmp_path, content, images=("a.png", "b.png", "c.png"))
    assert boxes(found) == {"a.png": [(0.1, 0.2, 0.3, 0.5)], "b.png": []}
    assert list(found.left_out) == [
        "has no region, and 'kind' may be a choice; annotations.no_finding, or the export JSON"
    ]
    told = "1 entries without a region are normal images, since their fields site also stand beside regions."
    assert any(told in remark for remark in found.faults.remarks)


# labelme


def shape(kind: Optional[str], points: list[Any], label: Any = "nod", group: Any = None) -> dict[str, Any]:
    return {"label": label, "points": points, "group_id": group, "shape_type": kind, "flags": {}}


def labelme(folder: Path, shapes: Any, path: str = "../a.png", more: str = "", **fields: Any) -> AnnotationSet:
    (folder / "a.png").touch()
    content = {"version": "5.2.1", "flags": {}, "shapes": shapes, "imagePath": path, "imageData": None}
    (folder / "ann").mkdir(exist_ok=True)
    text = json.dumps({**content, "imageWidth": 200, "imageHeight": 100, **fields})
    (folder / "ann" / "a.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return read(folder, LABELME % more)


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (shape("rectangle", [[30, 40], [10, 20]]), (10, 20, 30, 40)),
        (shape("rectangle", [[10, 20], [30, 20], [30, 40], [10, 40]]), (10, 20, 30, 40)),
        (shape("polygon", [[10.5, 20], [30, 25], [12, 40]]), (10.5, 20, 30, 40)),
        (shape(None, [[10, 20], [30, 25], [12, 40]]), (10, 20, 30, 40)),
        (shape("circle", [[50, 50], [53, 54]]), (45, 45, 55, 55)),
        (shape("mask", [[10, 20], [29, 39]]), (10, 20, 30, 40)),
    ],
)
def test_labelmes_shapes(tmp_path: Path, drawn: dict[str, Any], expected: tuple[float, ...]) -> None:
    found = labelme(tmp_path, [drawn])
    assert boxes(found) == {"a.png": [expected]}
    assert found.items[0].size == (200, 100)


@pytest.mark.parametrize("path", ["..\\a.png", "C:\\scans\\a.png", "/home/me/a.png", "x/a.png"])
def test_paths_of_another_machine(tmp_path: Path, path: str) -> None:
    found = labelme(tmp_path, [], path, ", image_root: .")
    assert [item.image.resolve() for item in found.items] == [(tmp_path / "a.png").resolve()]


def test_groups_and_shapes_without_area(tmp_path: Path) -> None:
    part = shape("rectangle", [[10, 20], [30, 40]], group=1)
    found = labelme(tmp_path, [part, shape("rectangle", [[50, 20], [60, 50]], group=1), shape("point", [[1, 2]])])
    assert found.items[0].boxes == [(10, 20, 60, 50)]
    assert found.faults.left_out == {
        ("shapes", "parts of one lesion by their group_id, joined into one box"): 1,
        ("boxes", "shape_type point, which has no area"): 1,
    }
    assert labelme(tmp_path, [shape("line", [[1, 2], [3, 4]])]).left_out == {"all of its boxes are left out": 1}
    assert labelme(tmp_path, []).items[0].boxes == []


def test_a_flag_without_a_shape_is_no_negative(tmp_path: Path) -> None:
    found = labelme(tmp_path, [], flags={"polyp": True})
    assert found.items == []
    assert found.left_out == {"has a flag, but no shape; annotations.no_finding": 1}
    assert boxes(labelme(tmp_path, [], flags={"polyp": False})) == {"a.png": []}
    assert boxes(labelme(tmp_path, [], more=", no_finding: [normal]", flags={"normal": True})) == {"a.png": []}
    empty = labelme(tmp_path, [], more=", no_finding: [normal]", flags={"normal": False})
    assert empty.items == [] and empty.left_out == {"has no shape, and none of annotations.no_finding": 1}
    drawn = labelme(tmp_path, [shape("rectangle", [[10, 20], [30, 40]])], flags={"polyp": True})
    assert boxes(drawn) == {"a.png": [(10, 20, 30, 40)]}


@pytest.mark.parametrize(
    ("shapes", "fields", "words"),
    [
        ([], {"flags": ["polyp"]}, "flags are ['polyp']; needed: an object of names"),
        (None, {}, "has no list 'shapes'. Is it labelme?"),
        ([shape("rectangle", [[1, 2]])], {}, "is a 'rectangle' of 1 points. Allowed"),
        ([shape("rectangle", [[1, "x"], [3, 4]])], {}, "needed: a label, and points"),
        ([shape("rectangle", [[1, 2], [3, 4]], label="")], {}, "needed: a label, and points"),
        ([], {"imagePath": ""}, "imagePath is ''"),
        ([], {"imageWidth": "x"}, "imageWidth and imageHeight are ['x', 100]"),
        ([], {"imagePath": "../../x.png"}, "is not in the data root"),
        ([shape("rectangle", [[0.1, 0.2], [0.3, 0.4]])], {}, "Are these fractions?"),
    ],
)
def test_mistakes_in_labelmes_files(tmp_path: Path, shapes: Any, fields: dict[str, Any], words: str) -> None:
    (tmp_path.parent / "x.png").touch()
    assert words in fault(labelme(tmp_path, shapes, **fields))


def test_labelme_files_of_one_image_are_merged_and_missing_images_are_told(tmp_path: Path) -> None:
    labelme(tmp_path, [shape("rectangle", [[10, 20], [30, 40]])])
    (tmp_path / "ann" / "b.json").write_text((tmp_path / "ann" / "a.json").read_text())
    found = read(tmp_path, LABELME % "")
    assert len(found.items) == 1
    assert any("1 entries are about an image that has one" in line for line in found.told())
    assert ("boxes", "the same box of the same class twice") in found.faults.left_out
    (tmp_path / "a.png").unlink()
    assert len(read(tmp_path, LABELME % "").missing) == 1


# CVAT


def cvat(folder: Path, *images: str, more: str = "", text: Optional[str] = None) -> AnnotationSet:
    for name in ("a.png", "b.png"):
        (folder / name).touch()
    content = "<version>1.1</version><meta><task><mode>annotation</mode></task></meta>" + "".join(images)
    whole = text or f"<?xml version='1.0' encoding='utf-8'?><annotations>{content}</annotations>"
    (folder / "a.xml").write_bytes(b"\xef\xbb\xbf" + whole.encode())
    return read(folder, CVAT % more)


def image(*shapes: str, name: str = "a.png", number: int = 0, more: str = "") -> str:
    return f'<image id="{number}" name="{name}" width="200" height="100" {more}>{"".join(shapes)}</image>'


def cvat_box(x1: float, y1: float, x2: float, y2: float, more: str = "", label: str = "nod") -> str:
    return (
        f'<box label="{label}" source="manual" occluded="0" xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}" z_order="0" {more}>'
        '<attribute name="grade">2</attribute></box>'
    )


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (cvat_box(10, 20, 30, 40), (10, 20, 30, 40)),
        (cvat_box(10, 20, 50, 40, 'rotation="90"'), (20, 10, 40, 50)),
        ('<polygon label="nod" occluded="1" points="10.5,20.0;30.0,25.0;12.0,40.0"/>', (10.5, 20, 30, 40)),
        ('<ellipse label="nod" cx="50" cy="50" rx="10" ry="20" rotation="90"/>', (30, 40, 70, 60)),
        ('<mask label="nod" rle="3, 5" left="10" top="20" width="20" height="20"/>', (10, 20, 30, 40)),
    ],
)
def test_cvats_shapes(tmp_path: Path, drawn: str, expected: tuple[float, ...]) -> None:
    found = cvat(tmp_path, image(drawn), image(name="b.png", number=1))
    assert boxes(found) == {"a.png": [expected], "b.png": []}
    assert found.items[0].size == (200, 100)


def test_cvat_says_what_it_does_not_read(tmp_path: Path) -> None:
    found = cvat(tmp_path, image('<polyline label="nod" points="1,2;3,4"/>', cvat_box(1, 2, 30, 40, 'outside="1"')))
    assert found.items == []
    assert sum(found.faults.left_out.values()) == 2
    found = cvat(tmp_path, image(cvat_box(1, 2, 30, 40).replace("manual", "auto")))
    assert any("1 shapes are of a model that CVAT ran" in line for line in found.told())
    tag = image('<tag label="normal" source="manual"/>')
    assert cvat(tmp_path, tag).left_out == {"has a tag, but no box; annotations.no_finding": 1}
    assert boxes(cvat(tmp_path, tag, more=", no_finding: [normal]")) == {"a.png": []}
    empty = cvat(tmp_path, image(""), more=", no_finding: [normal]")
    assert empty.items == [] and empty.left_out == {"has no shape, and none of annotations.no_finding": 1}
    assert boxes(cvat(tmp_path, image(""))) == {"a.png": []}


def test_cvats_subsets_are_folders(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").touch()
    found = cvat(tmp_path, image(more='subset="train"'), image(name="a.png", number=1, more='subset="default"'))
    assert sorted(boxes(found)) == ["a.png", "train/a.png"]


@pytest.mark.parametrize(
    ("images", "text", "words"),
    [
        (
            ["<track id='0' label='nod'><box frame='0' outside='0'/></track>"],
            None,
            "Export the task as 'CVAT for images 1.1'",
        ),
        ([], "<annotation><object/></annotation>", "has no <image> in <annotations>; its root is <annotation>"),
        ([image("<box label='nod' xtl='x' ytl='1' xbr='2' ybr='3'/>")], None, "needed: numbers in pixels"),
        ([image(cvat_box(1, 2, 3, 4, label=""))], None, "has no label"),
        ([image("<star label='nod'/>")], None, "has a <star>. Allowed: tag, box"),
        ([image(name="")], None, "has no name"),
        ([image(name="../x.png")], None, "is not in the data root"),
        ([image(cvat_box(10, 20, 30, 40)), image(number=1)], None, "but only one of the two has a box"),
        ([image(cvat_box(0.1, 0.2, 0.3, 0.4))], None, "Are these fractions?"),
    ],
)
def test_mistakes_in_cvats_files(tmp_path: Path, images: list[str], text: Optional[str], words: str) -> None:
    (tmp_path.parent / "x.png").touch()
    assert words in fault(cvat(tmp_path, *images, text=text))


def test_what_is_called_normal_has_no_box(tmp_path: Path) -> None:
    words, more = "(annotations.no_finding), but has a box. Remove one of the two", ", no_finding: [normal]"
    said = {"id": "x", "type": "choices", "value": {"choices": ["normal"]}}
    assert words in fault(studio(tmp_path, [task("a.png", annotation(rectangle(10, 20, 20, 30), said))], more))
    assert words in fault(cvat(tmp_path, image('<tag label="normal"/>', cvat_box(10, 20, 30, 40)), more=more))
    drawn = [shape("rectangle", [[10, 20], [30, 40]])]
    assert words in fault(labelme(tmp_path, drawn, more=more, flags={"normal": True}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, 10**400, "x", "", None, True, [], "1e999"])
def test_what_is_no_coordinate(value: Any) -> None:
    assert number(value) is None
    assert points_of([[1, 2], [3, value]]) is None
    assert numbers(["1.5", 2]) == [1.5, 2.0]


def test_turned_shapes() -> None:
    assert turned_rectangle((0, 0, 10, 20), 90, (0, 0)) == (-20, 0, 0, 10)
    assert turned_rectangle((0, 0, 10, 10), 45, (5, 5)) == pytest.approx((-2.071, -2.071, 12.071, 12.071), abs=1e-3)
    assert ellipse((5, 5), (3, 1), 30) == pytest.approx((2.354, 3.268, 7.646, 6.732), abs=1e-3)
