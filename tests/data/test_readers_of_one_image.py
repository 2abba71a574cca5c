"""Images that several people read: one reader's boxes or weighted box fusion, negatives by the same rule, and what is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.drawn import write_recipe

from umed_plugin.data.annotations import AnnotationSet, read_annotations
from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.annotations.consensus import clusters_of, one_reading
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError
from umed_plugin.faults import Faults

# The columns of VinDr-CXR's train.csv, with made-up rows: three readers an image, 'No finding' without a box.
HEAD = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\n"
ROWS = """both,nod,8,R1,10,10,30,30
both,nod,8,R2,12,10,32,30
both,nod,8,R3,70,70,90,90
both,cy,9,R3,12,10,32,30
none,No finding,14,R1,,,,
none,No finding,14,R2,,,,
none,No finding,14,R3,,,,
mixed,nod,8,R1,10,10,30,30
mixed,No finding,14,R2,,,,
mixed,No finding,14,R3,,,,
split,nod,8,R1,10,10,30,30
split,nod,8,R2,50,50,70,70
split,No finding,14,R3,,,,
once,nod,8,R1,10,10,30,30
"""
CSV = (
    "{reader: csv, files: a.csv, rename: ['$', '.png'], no_finding: [No finding], "
    "columns: {file: image_id, box: [x_min, y_min, x_max, y_max], lesion: class_name%s}%s}"
)
READER = ", reader: rad_id"


def read(folder: Path, annotations: str, extra: str = "") -> AnnotationSet:
    return read_annotations(
        load_recipe(write_recipe(folder, annotations, "{by: patient, fractions: {train: 1}}", extra))
    )


def vindr(folder: Path, rule: str, rows: str = ROWS) -> AnnotationSet:
    for name in {line.split(",")[0] for line in rows.splitlines()}:
        (folder / f"{name}.png").touch()
    (folder / "a.csv").write_text(HEAD + rows)
    return read(folder, CSV % (READER, rule))


def boxes(found: AnnotationSet) -> dict[str, list[tuple[float, ...]]]:
    assert found.faults.messages == []
    return {item.image.stem: item.boxes for item in found.items}


def test_without_a_rule_nobody_knows_whose_boxes_count(tmp_path: Path) -> None:
    (message,) = vindr(tmp_path, "").faults.messages
    assert "4 of 5 images are read by several readers (R1, R2, R3). Say whose boxes count" in message


def test_one_reader(tmp_path: Path) -> None:
    found = vindr(tmp_path, ", readers: {use: R1}")
    box = (10.0, 10.0, 30.0, 30.0)
    assert boxes(found) == {"both": [box], "none": [], "mixed": [box], "split": [box], "once": [box]}
    assert found.faults.left_out == {("boxes", "not by the reader 'R1'; annotations.readers"): 4}
    assert any("4 images are read by several readers. They agree in 2 whether" in line for line in found.told())
    found = vindr(tmp_path, ", readers: {use: R2}")
    assert "once" not in boxes(found)
    assert found.left_out == {"not read by 'R2'; annotations.readers": 1}
    (message,) = vindr(tmp_path, ", readers: {use: R22}").faults.messages
    assert "unknown reader 'R22'. Did you mean 'R2'" in message


def test_consensus_and_negatives_by_the_same_rule(tmp_path: Path) -> None:
    found = vindr(tmp_path, ", readers: {consensus: wbf, at_least: 2}")
    assert boxes(found) == {"both": [(11.0, 10.0, 31.0, 30.0)], "none": [], "mixed": []}
    assert found.left_out == {
        "read by fewer than 2 readers; annotations.readers": 1,
        "neither 2 readers agree on a lesion, nor 2 on none; annotations.readers": 1,
    }
    assert found.faults.left_out == {
        ("boxes", "marked by fewer than 2 readers; annotations.readers"): 6,
        ("boxes", "of the same lesion by another reader, fused into one; annotations.readers"): 1,
    }
    (line,) = [line for line in found.told() if line.startswith("agreement")]
    assert "in 2 some marked one and others none. 2 of 7 boxes are marked by another reader too" in line
    one = boxes(vindr(tmp_path, ", readers: {consensus: wbf, at_least: 1}"))
    assert {name: len(found) for name, found in one.items()} == {
        "both": 3,
        "none": 0,
        "mixed": 1,
        "split": 2,
        "once": 1,
    }
    far = vindr(tmp_path, ", readers: {consensus: wbf, iou: 0.9}")
    assert "both" not in boxes(far)


def test_readers_who_write_two_names_of_one_class_agree(tmp_path: Path) -> None:
    rows = "one,nod,8,R1,10,10,30,30\none,mass,8,R2,12,10,32,30\none,No finding,14,R3,,,,\none,No finding,14,R4,,,,\n"
    (tmp_path / "one.png").touch()
    (tmp_path / "a.csv").write_text(HEAD + rows)
    path = write_recipe(tmp_path, CSV % (READER, ", readers: {consensus: wbf}"), "{by: patient, fractions: {train: 1}}")
    path.write_text(path.read_text().replace("  nod:", "  mass: {name: nodule}\n  nod:"))
    found = read_annotations(load_recipe(path))
    assert boxes(found) == {"one": [(11.0, 10.0, 31.0, 30.0)]} and found.items[0].classes == ["nodule"]
    told = " ".join(found.told())
    assert "2 of 2 boxes are marked by another reader too" in told
    assert "classes: no annotation names 'cy' (1 of 3)" in told


def test_a_name_that_only_one_reader_writes_is_known_too(tmp_path: Path) -> None:
    rows = "one,nod,8,R1,10,10,30,30\none,nodd,8,R2,10,10,30,30\none,No finding,14,R3,,,,\none,No finding,14,R4,,,,\n"
    (message,) = vindr(tmp_path, ", readers: {consensus: wbf}", rows).faults.messages
    assert "class 'nodd' (1 boxes) is not in the recipe. Did you mean 'nod'?" in message
    assert vindr(tmp_path, ", readers: {use: R1}", rows).faults.messages == []


@pytest.mark.parametrize("keys", ["readers: {use: R2}, columns: {reader: r, ", "phrase: r, columns: {"])
def test_an_image_that_is_left_out_is_so_for_all_readers_and_phrases(tmp_path: Path, keys: str) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "a.csv").write_text("f,x,y,u,v,c,r,q\na.png,10,10,30,30,nod,R1,bad\na.png,11,10,31,30,nod,R2,ok\n")
    found = read(
        tmp_path,
        f"{{reader: csv, files: a.csv, leave_out_images: {{q: [bad]}}, {keys}file: f, box: [x, y, u, v], lesion: c}}}}",
    )
    assert boxes(found) == {} and set(found.left_out) == {"q is bad"}


def test_the_order_of_rows_and_the_names_change_nothing(tmp_path: Path) -> None:
    rule = ", readers: {consensus: wbf}"
    first = vindr(tmp_path, rule)
    turned = "".join(line + "\n" for line in reversed(ROWS.replace("R1", "Z9").splitlines()))
    assert sorted(boxes(vindr(tmp_path, rule, turned)).items()) == sorted(boxes(first).items())


def test_a_reader_who_marks_a_lesion_twice_weighs_once() -> None:
    marks = [("n", "A", (0.0, 0.0, 10.0, 10.0)), ("n", "A", (2.0, 0.0, 12.0, 10.0)), ("n", "B", (0.0, 0.0, 10.0, 12.0))]
    (cluster,) = clusters_of(marks, 0.5)
    assert cluster.fused == pytest.approx((0.5, 0.0, 10.5, 11.0))
    assert clusters_of([("n", "A", (0, 0, 9, 9)), ("m", "B", (0, 0, 9, 9))], 0.5)[0].readers == {"B"}


@pytest.mark.parametrize(
    ("columns", "rule", "words"),
    [
        ("", ", readers: {use: R1}", "readers needs columns.reader"),
        (READER, ", readers: {}", "give either use (the name of a reader) or consensus (wbf)"),
        (READER, ", readers: {use: R1, at_least: 3}", "at_least would have no effect together with use"),
        (READER, ", readers: {consensus: wbff}", "Did you mean 'wbf'?"),
    ],
)
def test_rules_that_cannot_be(tmp_path: Path, columns: str, rule: str, words: str) -> None:
    with pytest.raises(UmedError) as error:
        read(tmp_path, CSV % (columns, rule))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a,nod,8,,1,2,30,40\n", "column 'rad_id' is empty; needed: who read the image"),
        ("a,No finding,14,R1,1,2,30,40\n", "says 'No finding' (annotations.no_finding), but has a box"),
        ("a,nod,8,R1,1,2,30,40\na,No finding,14,R1,,,,\n", "gives a.png no box, and"),
    ],
)
def test_rows_that_contradict_themselves(tmp_path: Path, row: str, words: str) -> None:
    messages = vindr(tmp_path, ", readers: {consensus: wbf}", row).faults.messages
    assert words in messages[0]


@pytest.mark.parametrize("form", ["coco", "boxes", "entries"])
def test_coco_and_json_name_readers_too(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.png").touch()
    marks = [("R1", [10, 10, 30, 30]), ("R2", [12, 10, 32, 30]), ("R2", [70, 70, 90, 90])]
    if form == "coco":
        annotations = [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": [x, y, a - x, b - y], "by": name}
            for i, (name, (x, y, a, b)) in enumerate(marks)
        ]
        images = [{"id": 1, "file_name": "a.png", "width": 100, "height": 100}]
        content: object = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "nod"}]}
        reader = "{reader: coco, files: a.json, reader_field: by%s}"
    else:
        reader = "{reader: json, files: a.json, image: '{n}', boxes: b, box: at, only_class: nod, reader_field: by%s}"
        if form == "boxes":
            content = [{"n": "a.png", "b": [{"at": box, "by": name} for name, box in marks]}]
        else:
            of = {name: [{"at": box} for by, box in marks if by == name] for name in ("R1", "R2")}
            content = [{"n": "a.png", "by": name, "b": found} for name, found in of.items()]
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert boxes(read(tmp_path, reader % ", readers: {consensus: wbf}")) == {"a": [(11.0, 10.0, 31.0, 30.0)]}
    assert len(read(tmp_path, reader % ", readers: {use: R2}").items[0].boxes) == 2
    assert "read by several readers" in read(tmp_path, reader % "").faults.messages[0]
    assert "readers needs reader_field" in _refused(
        tmp_path, (reader % ", readers: {use: R2}").replace(", reader_field: by", "")
    )


def _refused(folder: Path, annotations: str) -> str:
    with pytest.raises(UmedError) as error:
        read(folder, annotations)
    return str(error.value)


def test_a_rule_without_readers_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "a.json").write_text(json.dumps([{"n": "a.png", "b": []}]))
    reader = "{reader: json, files: a.json, image: '{n}', boxes: b, box: at, only_class: nod, reader_field: by%s}"
    found = read(tmp_path, reader % ", readers: {use: A}")
    assert any("annotations.readers: has no effect" in line for line in found.faults.remarks)
    assert os.path.basename(found.items[0].image) == "a.png"


@pytest.mark.parametrize("first", [0, 1])
def test_the_size_that_one_reader_states_is_kept(tmp_path: Path, first: int) -> None:
    box, size = (100.0, 100.0, 190.0, 150.0), (200, 160)
    for image, words in (("", ""), ("image: {other_size: scale}", "only some readers state the size of a.png")):
        rule = CSV % (READER, ", readers: {consensus: wbf, at_least: 1}")
        recipe = load_recipe(write_recipe(tmp_path, rule, "{by: patient, fractions: {train: 1}}", image))
        marks = [
            Annotated(tmp_path / "a.png", [box], ["nod"], name, stated, reader=name)
            for name, stated in (("R1", None), ("R2", size))
        ]
        faults = Faults()
        (item,) = one_reading([marks[first], marks[1 - first]], recipe, faults)
        assert [words in message for message in faults.messages] == ([True] if words else [])
        assert words or item.size == size
