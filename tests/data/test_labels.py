"""Images that have a label and no box: folders, CSV and JSON, with what is refused and what is counted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.drawn import write_recipe

from umed_plugin.cli import main
from umed_plugin.data.annotations import AnnotationSet, read_annotations
from umed_plugin.data.build import build_records
from umed_plugin.data.recipes.readers import READERS
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.one_stack
ALL_IN_TRAIN = "{by: patient, fractions: {train: 1}}"
PSEUDO = "pseudo_boxes: {normal: negatives}\n"
FOLDERS = "{reader: folders, files: .%s}"
CSV = "{reader: csv, files: a.csv, columns: {file: f, lesion: c}%s}"
JSON = "{reader: json, files: a.json, image: '{key}', lesion: label%s}"


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 30), 90, np.uint8)).save(path)


def read(folder: Path, annotations: str, extra: str = PSEUDO) -> AnnotationSet:
    return read_annotations(load_recipe(write_recipe(folder, annotations, ALL_IN_TRAIN, extra)))


def labels(found: AnnotationSet) -> dict[str, list[str]]:
    assert found.faults.messages == []
    assert all(item.boxes == [] for item in found.items)
    return {os.path.relpath(item.image, found.root): item.labels for item in found.items}


def test_a_folder_names_the_class_of_its_images(tmp_path: Path) -> None:
    for name in ("nod/a.png", "nod/deeper/b.png", "cy/c.PNG", "healthy/d.png", "nod/.hidden.png"):
        image(tmp_path / name)
    (tmp_path / "nod" / "Thumbs.db").write_bytes(b"")
    found = read(tmp_path, FOLDERS % ", no_finding: [healthy]")
    assert labels(found) == {
        "cy/c.PNG": ["cyst"],
        "healthy/d.png": [],
        "nod/a.png": ["nodule"],
        "nod/deeper/b.png": ["nodule"],
    }
    assert found.faults.left_out == {("files", ".db, which is not one of annotations.endings"): 1}
    assert [item.image.name for item in found.normals] == ["d.png"]


def test_links_to_folders_in_a_class_folder_are_followed(tmp_path: Path) -> None:
    for name in ("data/nod/a.png", "disk/sub/b.png", "data/healthy/d.png"):
        image(tmp_path / name)
    (tmp_path / "disk" / "sub" / "c.dicom").write_bytes(b"")
    (tmp_path / "data" / "nod" / "more").symlink_to(tmp_path / "disk" / "sub")
    (tmp_path / "disk" / "sub" / "loop").symlink_to(tmp_path / "data" / "nod")
    found = read(tmp_path, (FOLDERS % ", no_finding: [healthy]").replace("files: .", "files: data"))
    images = ["data/nod/a.png", "data/nod/more/b.png", "data/nod/more/c.dicom"]
    assert sorted(labels(found)) == ["data/healthy/d.png", *images]


def test_mistakes_of_folders_are_told(tmp_path: Path) -> None:
    image(tmp_path / "nod" / "a.png")
    image(tmp_path / "beside.png")
    image(tmp_path / "nodd" / "b.png")
    (tmp_path / "cy").mkdir()
    found = read(tmp_path, FOLDERS % "")
    messages = "\n".join(found.faults.messages)
    assert "1 images lie beside the class folders and have no label, the first: beside.png" in messages
    assert "class 'nodd' (1 images) is not in the recipe. Did you mean 'nod'?" in messages
    assert any("cy: holds no image" in remark for remark in found.faults.remarks)
    (message,) = read(tmp_path, "{reader: folders, files: other}").faults.messages
    assert "other: no such folder (annotations.files)" in message
    (tmp_path / "empty").mkdir()
    (message,) = read(tmp_path, "{reader: folders, files: empty}").faults.messages
    assert "holds no folder. Needed: one folder per class" in message
    for keys, words in ((", image_root: x", "image_root has no effect"), (", endings: [png]", "write '.png'")):
        with pytest.raises(UmedError, match=words):
            read(tmp_path, FOLDERS % keys)


def write_csv(folder: Path, *rows: str) -> None:
    (folder / "a.csv").write_text("\n".join(["f,c", *rows]) + "\n")


def test_a_csv_without_box_columns_holds_labels(tmp_path: Path) -> None:
    for name in "abcd":
        image(tmp_path / f"{name}.png")
    write_csv(tmp_path, "a.png,nod", "b.png,nod|cy", "c.png,None", "d.png,cy", "d.png,nod", "d.png,cy")
    found = read(tmp_path, CSV % ", label_separator: '|', no_finding: [None]".replace("None", '"None"'))
    assert labels(found) == {
        "a.png": ["nodule"],
        "b.png": ["nodule", "cyst"],
        "c.png": [],
        "d.png": ["cyst", "nodule"],
    }


def test_mistakes_of_labels_are_told_by_line(tmp_path: Path) -> None:
    for name in "abcd":
        image(tmp_path / f"{name}.png")
    write_csv(tmp_path, "a.png,", "b.png,none|nod", "c.png,nod", "c.png,none", "d.png,nodd")
    found = read(tmp_path, CSV % ", label_separator: '|', no_finding: [none]")
    expected = {
        2: "has no label. Name what the image shows",
        3: "says 'none' (annotations.no_finding) and names 'nod'",
        5: f"gives c.png no lesion, and {tmp_path}/a.csv:4 gives it a label",
        6: "class 'nodd' (1 images) is not in the recipe. Did you mean 'nod'?",
    }
    assert len(found.faults.messages) == len(expected)
    for line, words in expected.items():
        assert any(f"a.csv:{line}: " in message and words in message for message in found.faults.messages), words
    write_csv(tmp_path, "a.png,nod", "b.png,")
    assert labels(read(tmp_path, CSV % ', no_finding: [""]')) == {"a.png": ["nodule"], "b.png": []}


def test_a_list_of_other_images_is_left_out(tmp_path: Path) -> None:
    for name in "ab":
        image(tmp_path / f"{name}.png")
    write_csv(tmp_path, "a.png,nod", "b.png,nod")
    (tmp_path / "boxed.csv").write_text("Image,x\nsub/b.png,1\nz.png,1\n")
    keys = ", leave_out_listed: {files: boxed.csv, file: %s}"
    found = read(tmp_path, CSV % (keys % "Image"))
    assert labels(found) == {"a.png": ["nodule"]}
    assert found.left_out == {"listed in boxed.csv (annotations.leave_out_listed)": 1}
    assert "has no column 'Imag'" in read(tmp_path, CSV % (keys % "Imag")).faults.messages[0]
    write_csv(tmp_path, "a.png,nod")
    found = read(tmp_path, CSV % (keys % "Image"))
    assert any("lists no image of the data" in remark for remark in found.faults.remarks)


def test_a_json_without_boxes_holds_labels(tmp_path: Path) -> None:
    for name in "abc":
        image(tmp_path / f"{name}.png")
    entries: dict[str, Any] = {"a.png": {"label": "nod"}, "b.png": {"label": ["cy", "nod"]}, "c.png": {"label": []}}
    (tmp_path / "a.json").write_text(json.dumps(entries))
    found = read(tmp_path, JSON % ', no_finding: [""]')
    assert labels(found) == {"a.png": ["nodule"], "b.png": ["cyst", "nodule"], "c.png": []}
    (tmp_path / "a.json").write_text(json.dumps({"a.png": {"label": {"x": 1}}, "b.png": {}}))
    messages = read(tmp_path, JSON % "").faults.messages
    assert "'label' (annotations.lesion) holds {'x': 1}; needed: a label, or a list of labels" in messages[0]
    assert "entry b.png: has no label" in messages[1]


@pytest.mark.parametrize(
    ("annotations", "extra", "words"),
    [
        (CSV % "", "", "have a label and no box (nodule: 1). They say what an image shows and not where"),
        ("{reader: csv, files: a.csv, columns: {file: f, lesion: c, box: b}}", PSEUDO, "Which of the two?"),
        (CSV % ", convention: xywh", PSEUDO, "convention would have no effect without columns.box"),
        (CSV % ", readers: {use: R1}", PSEUDO, "readers needs columns.reader"),
        (CSV % "", PSEUDO + "box_tolerance: 3\n", "box_tolerance: is about boxes, and these annotations have none"),
        (CSV % "", PSEUDO + "negatives: drop\n", "learns from images without a lesion what is normal"),
        (CSV % "", PSEUDO + "image: {slices: montage}\n", "a label does not say which slice shows the lesion"),
        (CSV % "", "pseudo_boxes: {shots: 3}\n", "pseudo_boxes.shots: found 3"),
        (CSV % "", "pseudo_boxes: {normal: '('}\n", "is not a regular expression"),
        (JSON % ", boxes: b", PSEUDO, "give boxes and box, or neither of them"),
        (JSON % ", normalised: true", PSEUDO, "normalised would have no effect without boxes"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, annotations: str, extra: str, words: str) -> None:
    image(tmp_path / "a.png")
    write_csv(tmp_path, "a.png,nod")
    try:
        told = "\n".join(read(tmp_path, annotations, extra).faults.messages)
    except UmedError as error:
        told = str(error)
    assert words in told


def test_a_reader_of_ones_own_may_give_both_and_is_asked_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "mine.py").write_text(
        "from umed_plugin.data.annotations import Annotated, register_reader\n"
        "@register_reader('mine_both')\n"
        "def read(options, root, faults):\n"
        "    return [Annotated(root / 'a.png', [(1.0, 2.0, 9.0, 9.0)], ['nod'], 'line 1')]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    list(READERS)
    monkeypatch.setattr(READERS, "_entries", dict(READERS._entries))
    (message,) = read(tmp_path, "{reader: 'mine:read', files: x}").faults.messages
    assert "line 1: 1 images have boxes, and the recipe has pseudo_boxes. Which of the two?" in message


def test_an_image_in_a_normal_and_in_a_class_folder_contradicts_itself(tmp_path: Path) -> None:
    image(tmp_path / "nod" / "a.png")
    (tmp_path / "healthy").mkdir()
    (tmp_path / "healthy" / "a.png").symlink_to(tmp_path / "nod" / "a.png")
    (message,) = read(tmp_path, FOLDERS % ", no_finding: [healthy]").faults.messages
    assert "only one of the two has a label" in message


def test_pseudo_boxes_need_a_tower_and_only_they_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image(tmp_path / "nod" / "a.png")
    recipe = write_recipe(tmp_path, FOLDERS % "", ALL_IN_TRAIN, PSEUDO)
    with pytest.raises(UmedError, match="has pseudo_boxes, which need a vision tower. Build the records first"):
        build_records(load_recipe(recipe), out_dir=tmp_path / "out")
    build = ["recipe", "build", str(recipe), "--out", str(tmp_path / "out" / "r.json")]
    assert main(build) != 0
    assert "Give --tower CKPT" in capsys.readouterr().err
    plain = write_recipe(
        tmp_path, "{reader: csv, files: a.csv, columns: {file: f, lesion: c, box: b}}", ALL_IN_TRAIN, ""
    )
    assert main(["recipe", "build", str(plain), "--tower", "x", *build[3:]]) != 0
    assert "has no effect" in capsys.readouterr().err


@pytest.mark.llava
def test_check_counts_labels_as_neither_lesions_nor_negatives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("nod/a.png", "nod/b.png", *(f"healthy/{n}.png" for n in "cdef")):
        image(tmp_path / name)
    recipe = write_recipe(tmp_path, FOLDERS % ", no_finding: [healthy]", ALL_IN_TRAIN, PSEUDO)
    assert main(["recipe", "check", str(recipe), "--report", str(tmp_path / "report"), "--quiet"]) == 0
    told = capsys.readouterr().out
    row = next(line for line in told.splitlines() if "train" in line)
    assert [word for word in row.split() if word.isdigit()] == ["6", "4", "6", "0", "2"]
    assert "label, no box" in told
