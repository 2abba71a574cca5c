"""``umed recipe check``: its numbers, and that it tells what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from support.drawn import scene, write_png, write_recipe
from support.source_files import uneven

from umed_plugin import cli
from umed_plugin.commands.recipe.check_page import write_report
from umed_plugin.data.build import build_records
from umed_plugin.data.checking.check import check_recipe
from umed_plugin.data.checking.report import print_check
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.one_stack
COLUMNS = "{file: file, box: [x1, y1, x2, y2], lesion: lesion, patient: patient, split: split}"
CSV = f"{{reader: csv, files: a.csv, columns: {COLUMNS}}}"
ROWS = """file,x1,y1,x2,y2,lesion,patient,split
1.png,30,20,50,30,nod,p1,train
1.png,0,5,12,20,nod,p1,train
2.png,70,10,95,50,cy,p2,train
3.png,,,,,,p3,train
4.png,30,20,40,40,nod,p4,val
5.png,30,20,60,40,nod,p1,test
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    for number in range(1, 6):
        write_png(tmp_path / f"{number}.png", scene())
    (tmp_path / "a.csv").write_text(ROWS)
    return write_recipe(tmp_path, CSV, "{by: column}")


def printed(recipe_file: Path) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_check(check_recipe(load_recipe(recipe_file)), console)
    return console.export_text()


@pytest.mark.llava
def test_counts(recipe_file: Path) -> None:
    check = check_recipe(load_recipe(recipe_file))
    assert check.ok
    assert check.images == {"train": 3, "val": 1, "test": 1}
    assert check.negatives["train"] == 1
    assert check.negatives["val"] == check.negatives["test"] == 0
    nodule, cyst = check.classes["nodule"], check.classes["cyst"]
    assert nodule.per_split == {"train": 2, "val": 1, "test": 1}
    assert sorted(nodule.sides) == [(10, 20), (12, 15), (20, 10), (30, 20)]
    # 97 x 61: the centre crop keeps x from 18 to 79.
    assert (nodule.lost, nodule.cut) == (1, 0)
    assert (cyst.lost, cyst.cut) == (0, 1)
    assert check.shared_patients == ["drawn p1"]


@pytest.mark.llava
def test_best_iou_per_number_of_decimals(recipe_file: Path) -> None:
    """The cyst's box in the padded square: (70, 28, 95, 68) / 97."""
    found = check_recipe(load_recipe(recipe_file)).classes["cyst"].best_iou
    edges = (70 / 97, 28 / 97, 95 / 97, 68 / 97)
    rounded = (0.72, 0.29, 0.98, 0.70)
    shared = (min(edges[2], rounded[2]) - max(edges[0], rounded[0])) * (
        min(edges[3], rounded[3]) - max(edges[1], rounded[1])
    )
    both = (edges[2] - edges[0]) * (edges[3] - edges[1]) + (0.98 - 0.72) * (0.70 - 0.29) - shared
    assert found[2] == [pytest.approx(shared / both)]
    assert found[2][0] < found[3][0] < 1


@pytest.mark.llava
def test_the_tables(recipe_file: Path) -> None:
    text = printed(recipe_file)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    lines = {name: cells for name, *cells in rows}
    assert lines["train"] == ["3", "1", "3", "3"]
    assert lines["test"] == ["1", "0", "1", "1"]
    assert lines["nodule"][:5] == ["2", "1", "1", "16 x 18", "1 / 0"]
    assert lines["cyst"][3:5] == ["25 x 40", "0 / 1"]
    assert "Terms: CC0. https://example.org/drawn" in text
    assert "1 patient is in more than one split (p1)" in text
    assert "The recipe fits the data." in text


@pytest.mark.llava
def test_missing_images_and_where_to_get_them(recipe_file: Path) -> None:
    (recipe_file.parent / "4.png").unlink()
    check = check_recipe(load_recipe(recipe_file))
    assert not check.ok
    assert check.images["val"] == 0
    text = printed(recipe_file)
    assert "1 of 5 images are missing on disk. Get them from https://example.org/drawn" in text
    assert str(recipe_file.parent / "4.png") in text
    assert "fits the data" not in text


@pytest.mark.llava
def test_faults_are_all_listed(recipe_file: Path) -> None:
    (recipe_file.parent / "3.png").write_bytes(b"\x89PNG")
    with (recipe_file.parent / "a.csv").open("a") as file:
        file.write("2.png,90,10,120,50,cy,p2,train\n2.png,9,10,12,50,wart,p2,train\n")
    check = check_recipe(load_recipe(recipe_file))
    assert len(check.faults) == 2
    text = printed(recipe_file)
    assert "class 'wart' (1 boxes) is not in the recipe" in text
    assert "3.png: cannot be read as an image" in text


@pytest.mark.llava
def test_square_brackets_in_messages_are_printed(recipe_file: Path) -> None:
    """Rich takes ``[80.0, 10.0]`` for markup unless told otherwise."""
    with (recipe_file.parent / "a.csv").open("a") as file:
        file.write("2.png,90,10,120,50,cy,p2,train\n")
    assert "box [90.0, 10.0, 120.0, 50.0] leaves 2.png (97x61) by 23.0 px" in printed(recipe_file)


@pytest.mark.llava
def test_exit_status(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "check", str(recipe_file)]) == 0
    assert "The recipe fits the data." in capsys.readouterr().out
    (recipe_file.parent / "4.png").unlink()
    assert cli.main(["recipe", "check", str(recipe_file)]) == 1
    assert cli.main(["recipe", "check", str(recipe_file), "--data-root", "/nowhere"]) == 1
    assert "there is no data folder /nowhere" in capsys.readouterr().err
    assert cli.main(["recipe", "chek"]) == 2
    assert "Did you mean 'check'" in capsys.readouterr().err


def test_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "list"]) == 0
    assert "brain_tumor_coco" in capsys.readouterr().out
    assert cli.main(["recipe", "show", "demo_studies"]) == 0
    shown = capsys.readouterr().out
    assert shown == Path(load_recipe("demo_studies").path).read_text()


@pytest.mark.llava
def test_the_page_and_its_contact_sheet(recipe_file: Path, tmp_path: Path) -> None:
    """Outlines run around the boxes, in the picture and in the closer look beside it."""
    page = write_report(check_recipe(load_recipe(recipe_file)), tmp_path / "report")
    assert "The recipe fits the data." in page.read_text()
    assert 'href="sheet_drawn.png"' in page.read_text()
    sheet = np.asarray(Image.open(tmp_path / "report" / "sheet_drawn.png")).astype(int)
    green = (sheet[:, :, 1] > 200) & (sheet[:, :, 0] < 60) & (sheet[:, :, 2] < 60)
    tile = green[:200, :200]
    rows, columns = np.nonzero(tile)
    # 1.png is 97 x 61, from row 18 of a square of 97; its boxes reach from (0, 5) to (50, 30), the first to the picture's edge.
    scale = 200 / 97
    expected = (0, (18 + 5) * scale - 2, 50 * scale + 1, (18 + 30) * scale + 1)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == pytest.approx(expected, abs=1.5)


@pytest.mark.llava
def test_pictures_in_two_splits_and_in_an_evaluation_set(tmp_path: Path) -> None:
    for number in range(1, 6):
        # 4.png, of val, is 1.png mirrored, of train.
        pixels = uneven(120, 150, 1 if number == 4 else number)
        write_png(tmp_path / f"{number}.png", (pixels[:, ::-1] if number == 4 else pixels) / 255)
    (tmp_path / "a.csv").write_text(ROWS)
    (tmp_path / "evaluated").mkdir()
    Image.open(tmp_path / "2.png").convert("RGB").resize((90, 80)).save(tmp_path / "evaluated" / "x.jpg")
    recipe = load_recipe(write_recipe(tmp_path, CSV, "{by: column}"))
    check = check_recipe(recipe, against=[tmp_path / "evaluated"])
    ((split,), (evaluated,)) = check.split_leaks, check.evaluation_leaks or []
    assert (split.name, split.other) == ("val: drawn/4.png", "train: drawn/1.png")
    assert (evaluated.name, evaluated.other) == ("train: drawn/2.png", str(tmp_path / "evaluated" / "x.jpg"))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_check(check, console)
    text = console.export_text()
    assert (
        "1 pictures are in two splits (similarity of at least 0.9). The first:\n  1.000  val: drawn/4.png  =  train: "
        in text
    )
    assert "1 pictures are in an evaluation set too" in text
    records = build_records(recipe, out_dir=tmp_path / "out", against=[tmp_path / "evaluated"])
    assert [Path(record["image"]).name for record in records] == ["1.png", "3.png", "4.png", "5.png"]


def test_a_recipe_that_names_no_image_does_not_fit(tmp_path: Path) -> None:
    """As `build`, whose advice is a command that works."""
    (tmp_path / "a.json").write_text(
        json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "nod"}]})
    )
    recipe = load_recipe(write_recipe(tmp_path, "{reader: coco, files: a.json}"))
    check = check_recipe(recipe)
    assert not check.ok and check.faults == [f"annotations: name no image under {tmp_path}"]
    with pytest.raises(UmedError, match=f"Look with: umed recipe check {tmp_path / 'recipe.yaml'} --data-root"):
        build_records(recipe, out_dir=tmp_path / "out")


@pytest.mark.llava
def test_a_class_has_one_colour_in_all_pictures(recipe_file: Path, tmp_path: Path) -> None:
    """2.png has a cyst alone, which is the second class of the recipe."""
    write_report(check_recipe(load_recipe(recipe_file)), tmp_path / "report")
    sheet = np.asarray(Image.open(tmp_path / "report" / "sheet_drawn.png")).astype(int)
    orange = (abs(sheet - (255, 170, 0)) < 30).all(axis=2)
    assert orange.any()


@pytest.mark.llava
def test_the_report_shows_augmented_studies_by_the_recipes_rule(recipe_file: Path, tmp_path: Path) -> None:
    for extra, told in (
        ("", "the defaults"),
        ("augment: {flips: [left_right], share: 1}\n", "flips=[&#39;left_right&#39;]"),
    ):
        recipe_file.write_text(recipe_file.read_text() + extra)
        folder = tmp_path / f"report{len(extra)}"
        page = write_report(check_recipe(load_recipe(recipe_file), augmented=True), folder).read_text()
        assert 'href="augmented_drawn.png"' in page and told in page
        with Image.open(folder / "augmented_drawn.png") as sheet:
            # Three studies of the split train: as they are, and in four epochs that change them.
            assert sheet.width == 5 * 246 and sheet.height % 3 == 0
            pixels = np.asarray(sheet.convert("RGB"))
    tiles = [pixels[: sheet.height // 3, 246 * n : 246 * n + 240] for n in range(5)]
    assert all(not np.array_equal(tiles[0][:240], tile[:240]) for tile in tiles[1:])
    page = write_report(check_recipe(load_recipe(recipe_file)), tmp_path / "without").read_text()
    assert "augmented" not in page and not (tmp_path / "without" / "augmented_drawn.png").exists()
