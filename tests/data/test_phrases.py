"""Phrases: which boxes belong to which sentence of which image, in each form of file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from umed_plugin import cli
from umed_plugin.data.annotations import read_annotations
from umed_plugin.data.build import build_records
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.records import record_faults
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.one_stack
HEAD = """
name: sentences
description: Two drawn images with sentences.
terms: {licence: CC0, url: "https://example.org"}
classes: {effusion: {name: pleural effusion}, heart: {name: cardiomegaly}}
split: {by: patient, fractions: {train: 1}}
"""
FORMS = {
    "coco": "annotations: {reader: coco, files: a.json, phrase: label_text, file_field: path}",
    "csv": "annotations: {reader: csv, files: a.csv, phrase: label_text, convention: xywh, "
    "columns: {file: path, box: [x, y, w, h], lesion: category}}",
    "json": "annotations: {reader: json, files: b.json, image: '{key}', boxes: boxes, box: xywh, convention: xywh, lesion: "
    "category, phrase: label_text}",
}
# image, class, box as x, y, width, height, sentence
ROWS = [
    ("a.png", "effusion", [10, 20, 30, 40], "Small left  effusion."),
    ("a.png", "effusion", [60, 20, 30, 40], "Small left effusion."),
    ("a.png", "heart", [40, 40, 20, 20], "Large heart"),
    ("b.png", "effusion", [0, 50, 20, 20], "Small left effusion."),
]


def write(folder: Path, form: str, rows: list = ROWS, empty: str = "") -> Path:
    images = sorted({row[0] for row in rows} | ({empty} if empty else set()))
    for name in images:
        Image.new("L", (200, 100)).save(folder / name)
    names = ["effusion", "heart"]
    coco = {
        "images": [{"id": n, "path": name, "width": 200, "height": 100} for n, name in enumerate(images)],
        "annotations": [
            {"id": n, "image_id": images.index(i), "category_id": names.index(c), "bbox": box, "label_text": text}
            for n, (i, c, box, text) in enumerate(rows)
        ],
        "categories": [{"id": n, "name": name} for n, name in enumerate(names)],
    }
    (folder / "a.json").write_text(json.dumps(coco))
    lines = [f'{i},{c},{",".join(map(str, box))},"{text}"' for i, c, box, text in rows]
    lines += [f"{empty},,,,,,"] if empty else []
    (folder / "a.csv").write_text("\n".join(["path,category,x,y,w,h,label_text", *lines]))
    boxes = {name: {"boxes": []} for name in images}
    for i, c, box, text in rows:
        boxes[i]["boxes"].append({"xywh": box, "category": c, "label_text": text})
    (folder / "b.json").write_text(json.dumps(boxes))
    (folder / "r.yaml").write_text(HEAD + FORMS[form])
    return folder / "r.yaml"


def built(folder: Path, recipe: Path) -> list[dict]:
    return build_records(load_recipe(recipe), out_dir=folder / "out", data_root=folder)


@pytest.mark.llava
@pytest.mark.parametrize("form", FORMS)
def test_an_image_and_a_sentence_are_a_record_with_all_of_its_boxes(form, tmp_path, capsys):
    records = built(tmp_path, write(tmp_path, form, empty="none.png"))
    found = {record["id"]: record["objects"]["bbox"] for record in records}
    assert found == {
        "sentences/a.png: Small left effusion.": [[10, 20, 40, 60], [60, 20, 90, 60]],
        "sentences/a.png: Large heart": [[40, 40, 60, 60]],
        "sentences/b.png: Small left effusion.": [[0, 50, 20, 70]],
    }
    first = records[0]
    assert (first["answer_type"], first["phrase"]) == ("phrase", "Small left effusion.")
    assert first["objects"]["ref"] == ["pleural effusion"] * 2
    question, answer = (turn["value"] for turn in first["conversations"])
    assert "Small left effusion" in question and answer == "[0.05, 0.35, 0.20, 0.55], [0.30, 0.35, 0.45, 0.55]"
    assert not any(record_faults(record) for record in records)
    said = capsys.readouterr().err
    assert "1 of 2 phrases are said of several images, such as 'Small left effusion.' of 2" in said
    assert "1 images left out (no phrase is about it; annotations.phrase)" in said


@pytest.mark.llava
@pytest.mark.parametrize("form", FORMS)
def test_a_box_without_a_sentence_is_named_with_its_row(form, tmp_path):
    rows = [ROWS[0], ("a.png", "heart", [40, 40, 20, 20], " ")]
    where = {"coco": "annotation 1", "csv": r"a\.csv:3", "json": "box 1"}[form]
    with pytest.raises(UmedError, match=f"{where}: 'label_text' is .*annotations.phrase.*the sentence"):
        built(tmp_path, write(tmp_path, form, rows))


@pytest.mark.llava
def test_a_missing_column_and_a_sentence_without_a_box_are_named(tmp_path):
    recipe = write(tmp_path, "csv")
    text = recipe.read_text()
    recipe.write_text(text.replace("phrase: label_text", "phrase: labeltext"))
    with pytest.raises(UmedError, match=r"no column 'labeltext' \(annotations.phrase\).*Did you mean 'label_text'"):
        built(tmp_path, recipe)
    recipe.write_text(text)
    with (tmp_path / "a.csv").open("a") as file:
        file.write("\nb.png,,,,,,clear lungs")
    with pytest.raises(UmedError, match="has the phrase 'clear lungs' and no box"):
        built(tmp_path, recipe)


@pytest.mark.llava
def test_a_box_that_two_classes_share_is_one_box_of_its_sentence(tmp_path, capsys):
    rows = [ROWS[0], ("a.png", "heart", *ROWS[0][2:])]
    (record,) = built(tmp_path, write(tmp_path, "csv", rows))
    assert record["objects"]["bbox"] == [[10, 20, 40, 60]]
    assert "1 boxes left out (the same box of the same phrase twice)" in capsys.readouterr().err


def test_listed_negatives_have_no_phrase(tmp_path):
    recipe = write(tmp_path, "csv")
    recipe.write_text(recipe.read_text() + "\nnegatives: {listed: {files: n.csv, file: file}}\n")
    with pytest.raises(UmedError, match="negatives.listed: has no effect together with annotations.phrase"):
        load_recipe(recipe)


@pytest.mark.llava
def test_ms_cxr_is_read_in_its_published_form(tmp_path):
    """Keys as in the public JSON: the path beside a bare file name, sentences as label_text; the patient is in the path."""
    path = "files/p10/p10000032/s50414267/02aa804e-bde0afdd-112c0b34-7bc16630-4e384014.jpg"
    (tmp_path / path).parent.mkdir(parents=True)
    Image.new("L", (1000, 800)).save(tmp_path / path)
    content = {
        "info": {"version": "1.1.0"},
        "images": [{"id": 3, "file_name": Path(path).name, "path": path, "width": 1000, "height": 800}],
        "annotations": [
            {
                "id": 7,
                "image_id": 3,
                "category_id": 2,
                "bbox": [612, 410, 300, 260],
                "label_text": "small left effusion",
            }
        ],
        "categories": [{"id": 2, "name": "Pleural Effusion"}],
    }
    (tmp_path / "MS_CXR_Local_Alignment_v1.1.0.json").write_text(json.dumps(content))
    (record,) = build_records(load_recipe("ms_cxr"), out_dir=tmp_path / "out", data_root=tmp_path)
    assert record["patient"] == "p10000032" and record["objects"]["bbox"] == [[612, 410, 912, 670]]


@pytest.mark.llava
def test_check_shows_phrases_as_images_with_boxes(tmp_path, capsys):
    recipe = write(tmp_path, "csv")
    page = tmp_path / "page"
    assert cli.main(["recipe", "check", str(recipe), "--data-root", str(tmp_path), "--report", str(page)]) == 0
    assert any(page.rglob("*.html"))
    assert "3" in capsys.readouterr().out


def test_an_image_of_which_one_phrase_is_ignored_is_left_out_with_all_of_them(tmp_path):
    recipe = write(tmp_path, "csv")
    text = recipe.read_text().replace(", heart: {name: cardiomegaly}}", "}\nignore_classes: [heart]")
    recipe.write_text(text)
    found = read_annotations(load_recipe(recipe), tmp_path)
    assert [item.image.name for item in found.items] == ["b.png"]
    assert found.left_out == {"holds an ignored class": 1}


def test_an_image_of_which_one_phrase_is_held_out_is_in_the_test_alone(tmp_path):
    rows = [*ROWS, ("c.png", "heart", [40, 40, 20, 20], "Large heart"), ("c.png", "effusion", [1, 1, 9, 9], "Effusion")]
    recipe = write(tmp_path, "csv", rows)
    lines = (tmp_path / "a.csv").read_text().splitlines()
    splits = ["split", *("test" if line.startswith("c.png") else "train" for line in lines[1:])]
    (tmp_path / "a.csv").write_text("\n".join(f"{line},{split}" for line, split in zip(lines, splits)))
    text = recipe.read_text().replace("lesion: category}", "lesion: category, split: split}")
    text = text.replace("split: {by: patient, fractions: {train: 1}}", "split: {by: column}")
    recipe.write_text(f"{text}\nhold_out: {{classes: [cardiomegaly]}}\n")
    found = read_annotations(load_recipe(recipe), tmp_path)
    assert [(item.image.name, item.split, item.held_out) for item in found.items] == [
        ("b.png", "train", False),
        ("c.png", "test", True),
        ("c.png", "test", True),
    ]
    assert found.left_out == {"held out of train: cardiomegaly": 1}


def test_a_phrase_that_names_a_held_out_class_takes_its_image_out_of_training(tmp_path):
    heart = [
        ("a.png", "heart", [40, 40, 20, 20], "Large heart beside a pleural effusion"),
        ("b.png", "heart", [0, 50, 20, 20], "Large heart"),
    ]
    write(tmp_path, "coco", heart)
    (tmp_path / "a.json").rename(tmp_path / "train.json")
    recipe = write(tmp_path, "coco", [("c.png", "effusion", [0, 50, 20, 20], "Small effusion")])
    text = recipe.read_text().replace("files: a.json", "files: {train: train.json, test: a.json}")
    text = text.replace("split: {by: patient, fractions: {train: 1}}", "split: {by: file}")
    recipe.write_text(text + "\nhold_out: {classes: [pleural effusion]}\n")
    found = read_annotations(load_recipe(recipe), tmp_path)
    assert [(item.image.name, item.held_out) for item in found.items] == [("b.png", False), ("c.png", True)]
    assert not found.faults.messages
