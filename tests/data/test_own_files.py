"""Files that umed has written below the data root are no data: a second run finds there what the first has written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from support.annotation_files import ALL_IN_TRAIN, CSV, HEAD, MASK, boxes, put, read
from support.drawn import BOX, scene, write_png16, write_recipe

from umed_plugin.commands.upgrade.settings import Settings, write_settings
from umed_plugin.data.annotations.finding import matching_files
from umed_plugin.data.build import build_records
from umed_plugin.data.leaks import evaluation_pictures
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError
from umed_plugin.faults import Faults

pytestmark = pytest.mark.one_stack
FOLDERS = "{reader: folders, files: .}"
PSEUDO = "pseudo_boxes: {normal: negatives}\n"
PIXELS = np.rint(scene() * 255).astype(np.uint8)
LESION = np.where(PIXELS > 200, 255, 0).astype(np.uint8)
WRITTEN = "written by umed itself, in "


def write_run(folder: Path) -> None:
    """Some of what an upgrade writes."""
    folder.mkdir()
    write_settings(Settings(checkpoint="model", recipe="recipe.yaml"), folder / "run.yaml")
    put(folder / "data" / "images" / "drawn" / "a.png", PIXELS)
    put(folder / "checkpoint" / "merges.txt", "0 1 2 3 4")


def test_pictures_that_a_build_has_rendered(tmp_path: Path) -> None:
    """A 16-bit picture is rendered into the folder where the reader looks for pictures; others there are data."""
    put(tmp_path / "m" / "a.png", LESION)
    picture = tmp_path / "images" / "a.png"
    picture.parent.mkdir()
    write_png16(picture, scene())
    os.utime(picture, (1e9, 1e9))  # a build notes nothing of files that may still be written
    annotations = MASK.replace("i/*.png", "images/**/*.png") % ""
    recipe = load_recipe(write_recipe(tmp_path, annotations, ALL_IN_TRAIN))
    for _ in range(2):
        (record,) = build_records(recipe, out_dir=tmp_path)
        assert record["image"] == "images/drawn/images/a.png.png"
    found = read(tmp_path, annotations)
    assert boxes(found) == {"images/a.png": [BOX]}
    assert found.faults.left_out["files", WRITTEN + "."] == 1
    rendered = read(tmp_path, annotations.replace("images/**/*.png", "images/drawn/images/*.png"))
    assert "m/a.png.png: no such mask" in rendered.faults.messages[0], "what is named by its folder is read"
    put(tmp_path / "images" / "drawn" / "b.png", PIXELS)
    assert "m/b.png: no such mask" in read(tmp_path, annotations).faults.messages[0]


def test_a_folder_of_builds_is_no_class(tmp_path: Path) -> None:
    for name in ("nod/a.png", "train.pseudo_boxes.png", "built/val.pseudo_boxes.png", "page/sheet_drawn.png"):
        put(tmp_path / name, PIXELS)
    for name in (".umed_checked.jsonl", "built/.umed_checked.jsonl", "built/val.json", "page/check.html"):
        put(tmp_path / name)
    found = read(tmp_path, FOLDERS, extra=PSEUDO)
    assert [item.image.name for item in found.items] == ["a.png"] and found.faults.messages == []
    counted = {why: count for (_, why), count in found.faults.left_out.items() if why.startswith(WRITTEN)}
    assert counted == {f"{WRITTEN}{folder}": 1 for folder in (".", "built", "page")}


def test_a_sheet_beside_named_images_is_no_normal_image(tmp_path: Path) -> None:
    put(tmp_path / "a.csv", HEAD + "a.png,10,20,30,40,nod\n")
    for name in ("a.png", "train.pseudo_boxes.png", ".umed_checked.jsonl"):
        put(tmp_path / name)
    assert not any("named by no entry" in remark for remark in read(tmp_path, CSV % "").faults.remarks)


def test_such_names_alone_are_data(tmp_path: Path) -> None:
    """Without the files that umed writes beside them."""
    for name in ("nod/images/drawn/a.png", "nod/b.pseudo_boxes.png", "nod/sheet_drawn.png"):
        put(tmp_path / name, PIXELS)
    put(tmp_path / "nod" / "run.yaml", "learning_rate: 0.1\n")
    assert len(read(tmp_path, FOLDERS, extra=PSEUDO).items) == 3


@pytest.mark.parametrize(
    ("annotations", "extra"),
    [
        (FOLDERS, PSEUDO),
        ("{reader: yolo, files: ., image_root: ., names: [nod]}", ""),
        (MASK.replace("i/*.png", "**/a.png").replace("m/{stem}.png", ".m/a.png"), ""),
    ],
    ids=["folders", "yolo", "mask"],
)
def test_an_upgrade_inside_the_data_root(tmp_path: Path, annotations: str, extra: str) -> None:
    annotations = annotations.replace("%s", "")
    put(tmp_path / "nod" / "a.png", PIXELS)
    put(tmp_path / "nod" / "a.txt", "0 0.5 0.5 0.2 0.2")
    put(tmp_path / ".m" / "a.png", LESION)
    write_run(tmp_path / "nod" / "run")
    found = read(tmp_path, annotations, extra=extra)
    assert [os.path.relpath(item.image, tmp_path) for item in found.items] == ["nod/a.png"]
    assert found.faults.messages == []
    assert sum(count for (_, why), count in found.faults.left_out.items() if why.startswith(WRITTEN)) >= 1


def test_a_demo_inside_the_data_root(tmp_path: Path) -> None:
    for name in ("nod/a.png", "demo/data/studies/b.png", "demo/before_after.png"):
        put(tmp_path / name, PIXELS)
    put(tmp_path / "demo" / "data" / "studies" / "annotations.csv", HEAD)
    for name in ("runs", "logs"):
        (tmp_path / "demo" / name).mkdir()
    found = read(tmp_path, FOLDERS, extra=PSEUDO)
    assert [item.image.name for item in found.items] == ["a.png"] and found.faults.messages == []
    assert found.faults.left_out["files", WRITTEN + "demo"] == 3


def test_what_a_recipe_names_inside_a_run_is_read(tmp_path: Path) -> None:
    put(tmp_path / "m" / "a.png", LESION)
    write_run(tmp_path / "run")
    annotations = MASK.replace("i/*.png", "run/data/**/*.png") % ""
    assert boxes(read(tmp_path, annotations)) == {"run/data/images/drawn/a.png": [BOX]}
    (message,) = read(tmp_path, MASK.replace("i/*.png", "*/data/**/*.png") % "").faults.messages
    assert "no file matches but 1 that umed has written itself" in message


def test_pictures_of_a_run_are_not_compared_with_as_an_evaluation_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are those that were trained on. Somebody's own in the run's folder are compared."""
    write_run(tmp_path / "run")
    with pytest.raises(UmedError, match="not a folder with images"):
        evaluation_pictures([tmp_path])
    own = [tmp_path / "b.png", tmp_path / "run" / "JPEGImages" / "c.png"]
    for path in own:
        put(path, PIXELS)
    assert evaluation_pictures([tmp_path]).names == [str(path) for path in own]
    assert "1 images of runs of umed are not compared" in capsys.readouterr().err


def built_set(folder: Path) -> Path:
    """Build a picture of 16 bits; returns the folder with the rendered one."""
    data = folder / "data"
    put(data / "m" / "a.png", LESION)
    (data / "i").mkdir()
    write_png16(data / "i" / "a.png", scene())
    os.utime(data / "i" / "a.png", (1e9, 1e9))
    built = folder / "sets" / "built"
    build_records(load_recipe(write_recipe(data, MASK % "", ALL_IN_TRAIN)), out_dir=built)
    return built


def test_a_built_evaluation_set_is_compared_with(tmp_path: Path) -> None:
    """Also where another picture lies beside it."""
    built = built_set(tmp_path)
    put(tmp_path / "sets" / "other.png", PIXELS)
    for folder in (built, built / "images"):
        assert evaluation_pictures([folder]).names == [str(built / "images" / "drawn" / "i" / "a.png.png")]
    assert len(evaluation_pictures([tmp_path / "sets"]).names) == 2


def test_rendered_pictures_that_somebody_has_annotated(tmp_path: Path) -> None:
    """In YOLO's layout, whose folder of pictures is umed's; nothing else lies there."""
    built = built_set(tmp_path)
    put(built / "labels" / "drawn" / "i" / "a.png.txt", "0 0.5 0.5 0.2 0.2")
    found = read(built, "{reader: yolo, files: labels, image_root: images, names: [nod]}")
    assert found.faults.messages == []
    assert [os.path.relpath(item.image, built) for item in found.items] == ["images/drawn/i/a.png.png"]


def test_own_files_in_the_folder_of_a_run_are_read(tmp_path: Path) -> None:
    """A data set to whose folder a run was written, and a project that has a demo's folder names."""
    write_run(tmp_path / "site_a")
    for name in ("site_a/nod/a.png", "site_a/data/images/drawn/x.png", "project/data/studies/nod/b.png"):
        put(tmp_path / name, PIXELS)
    for name in ("runs", "logs"):
        (tmp_path / "project" / name).mkdir()
    annotations = MASK.replace("i/*.png", "*/**/*.png").replace("m/{stem}.png", ".m/{stem}.png") % ""
    for stem in "ab":
        put(tmp_path / ".m" / f"{stem}.png", LESION)
    assert set(boxes(read(tmp_path, annotations))) == {"site_a/nod/a.png", "project/data/studies/nod/b.png"}


@pytest.mark.parametrize("written", ["drawn/b.png.png", "train.pseudo_boxes.png", "demo/data/studies/c.png"])
def test_class_folders_below_a_folder_named_images(tmp_path: Path, written: str) -> None:
    """What umed wrote there is none of them: rendered pictures, a sheet and a demo."""
    images = tmp_path / "images"
    for name in ("nod/a.png", written):
        put(images / name, PIXELS)
    put(images / ".umed_checked.jsonl")
    put(tmp_path / ".umed_checked.jsonl", '1 {"seen": ["images/drawn/b.png.png"]}\n')
    if written.startswith("demo"):
        put(images / "demo" / "data" / "studies" / "annotations.csv", HEAD)
        for name in ("runs", "logs"):
            (images / "demo" / name).mkdir()
    found = read(tmp_path, "{reader: folders, files: images}", extra=PSEUDO)
    assert [item.image.name for item in found.items] == ["a.png"] and found.faults.messages == []


def test_a_runs_own_folder_is_no_folder_of_images(tmp_path: Path) -> None:
    """Its picture has no label file, and would be a study without a lesion."""
    put(tmp_path / "a" / "x.png", PIXELS)
    put(tmp_path / "labels" / "x.txt", "0 0.5 0.5 0.2 0.2")
    put(tmp_path / "demo" / "before_after.png", PIXELS)
    put(tmp_path / "demo" / "data" / "studies" / "annotations.csv", HEAD)
    for name in ("runs", "logs"):
        (tmp_path / "demo" / name).mkdir()
    found = read(tmp_path, "{reader: yolo, files: labels, image_root: '*', names: [nod]}")
    assert [os.path.relpath(item.image, tmp_path) for item in found.items] == ["a/x.png"]


def test_what_a_trial_wrote_is_no_annotation(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    put(tmp_path / "run" / "trial" / "decision.json", "{}")
    put(tmp_path / "a.json", "{}")
    assert matching_files(tmp_path, "**/*.json", Faults()) == [tmp_path / "a.json"]
