"""The page of ``umed recipe check --report`` in headless Chromium: filters, links from faults, duplicates, phone, dark."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from PIL import Image
from support.browser import CONTRASTS, Page, opened_page
from support.drawn import scene, write_png, write_recipe
from support.source_files import uneven

from umed_plugin.cli import main
from umed_plugin.commands.recipe.check_page import write_report
from umed_plugin.data.checking.check import RecipeCheck, check_recipe
from umed_plugin.data.checking.gallery import MOST, BoxPlaces
from umed_plugin.data.recipes.recipe import load_recipe

COLUMNS = "{file: file, box: [x1, y1, x2, y2], lesion: lesion, patient: patient, split: split}"
CSV = f"{{reader: csv, files: a.csv, columns: {COLUMNS}}}"
ROWS = """file,x1,y1,x2,y2,lesion,patient,split
1.png,30,20,50,30,nod,p1,train
1.png,31,20,50,30,nod,p1,train
2.png,70,10,95,50,cy,p2,train
3.png,,,,,,p3,train
4.png,30,20,30.5,40,nod,p4,val
5.png,3,2,90,55,nod,p5,test
"""
CARDS = "[...document.querySelectorAll('#images-list .card')].map(card => card.querySelector('img').alt)"
pytestmark = [pytest.mark.llava, pytest.mark.one_stack]


def checked(folder: Path, rows: str = ROWS, same: bool = False) -> RecipeCheck:
    """A check of small pictures; 4.png, of val, is 1.png mirrored if ``same``."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, 6):
        pixels = uneven(61, 97, 1 if same and number == 4 else number)
        write_png(folder / f"{number}.png", pixels / 255 if same else scene((9 * number, 7, 40, 19)))
    (folder / "a.csv").write_text(rows)
    return check_recipe(load_recipe(write_recipe(folder, CSV, "{by: column}")), most_shown=MOST)


@pytest.fixture
def page(tmp_path):
    with opened_page(tmp_path) as browser:
        yield browser


def choose(page: Page, field: str, value: str) -> list[str]:
    page.run(
        f"(() => {{ const e = document.getElementById({json.dumps(field)}); e.value = {json.dumps(value)};"
        " e.dispatchEvent(new Event('change')); })()"
    )
    return page.run(CARDS)


def test_filters_and_the_pictures_that_faults_and_findings_name(page, tmp_path):
    rows = ROWS + "2.png,90,10,120,50,cy,p2,train\n"
    check = checked(tmp_path / "data", rows)
    page.open(write_report(check, tmp_path / "report"))
    name = "Image train: drawn/2.png: cyst"
    assert len(page.run(CARDS)) == 5
    assert choose(page, "images-class", "cyst") == [name]
    choose(page, "images-class", "")
    assert choose(page, "images-split", "test") == ["Image test: drawn/5.png: nodule"]
    choose(page, "images-split", "")
    assert choose(page, "images-size", "large") == [name, "Image test: drawn/5.png: nodule"]
    choose(page, "images-size", "")
    assert choose(page, "images-finding", "box under a pixel") == ["Image val: drawn/4.png: nodule"]
    # A fault leads to its picture whatever is filtered.
    links = "[...document.querySelectorAll('#verdict a[data-image]')]"
    faulty = links + ".filter(a => a.closest('li').textContent.includes('leaves'))"
    assert page.run(faulty + ".map(a => a.dataset.image)") == ["train: drawn/2.png"]
    page.run(faulty + "[0].click()")
    page.until("document.getElementById('viewer').open")
    assert page.run("document.getElementById('viewer-title').textContent") == "train: drawn/2.png"
    page.press("ArrowRight")
    assert page.run("document.getElementById('viewer-title').textContent") == "train: drawn/3.png"
    page.press("Escape")
    # 1.png has two boxes of one class that overlap; the finding links to it.
    overlapping = "[...document.querySelectorAll('#verdict li')].find(li => li.textContent.includes('overlap another'))"
    assert page.run(overlapping + ".querySelector('a').dataset.image") == "train: drawn/1.png"


def test_boxes_are_drawn_where_they_are_and_counted_by_size_and_place(page, tmp_path):
    check = checked(tmp_path / "data")
    page.open(write_report(check, tmp_path / "report"))
    card = next(card for card in check.images_shown.cards if card["id"] == "train: drawn/2.png")
    # 97 x 61 in a square of 97: 18 rows above.
    assert card["boxes"] == [pytest.approx([70 / 97, 28 / 97, 95 / 97, 68 / 97], abs=1e-4)]
    drawn = "[...document.querySelectorAll('#images-list li:nth-child(2) .edge')]"
    assert page.run(drawn + ".map(e => ['x', 'y'].map(n => +e.getAttribute(n)))") == [card["boxes"][0][:2]]
    shown = page.run("[...document.querySelectorAll('#plots text')].map(text => text.textContent)")
    assert shown[:2] == ["1", "0"] and shown[2:4] == ["2", "10"], "4.png's box is the smallest, then both of 1.png"
    (places,) = [BoxPlaces()]
    places.add((0.0, 0.0, 1.0, 1.0))
    assert places.sides[9] == 1 and places.centres[5][5] == 1


def test_near_duplicates_stand_side_by_side(page, tmp_path):
    check = checked(tmp_path / "data", same=True)
    page.open(write_report(check, tmp_path / "report"))
    pair = page.run("[...document.querySelectorAll('#pairs figcaption')].map(text => text.textContent)")
    assert pair == ["val: drawn/4.png", "train: drawn/1.png"]
    assert page.run("[...document.querySelectorAll('#pairs img')].map(image => image.src.slice(0, 5))") == ["data:"] * 2
    assert "a split by groups: 1 pictures are in two splits" in page.run(
        "document.getElementById('verdict').textContent"
    )
    assert len(choose(page, "images-finding", "near-duplicate")) == 2


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height", "phone"), [(1280, 900, False), (390, 844, True)], ids=["desktop", "phone"])
def test_it_is_readable_on_a_desktop_and_a_phone(page, tmp_path, dark, width, height, phone):
    page.shape(width, height, phone=phone, dark=dark)
    page.open(write_report(checked(tmp_path / "data", same=True), tmp_path / "report"))
    for opened in (False, True):
        if opened:
            page.click("#images-list .card")
            page.until("document.getElementById('viewer').open")
            viewer = page.run(
                "(({scrollWidth, clientWidth}) => [scrollWidth, clientWidth])(document.getElementById('viewer'))"
            )
            assert viewer[0] <= viewer[1], "an opened image is not wider than the window"
        assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert not {name: ratio for name, ratio in page.run(CONTRASTS).items() if ratio < 4.5}
    assert page.run("[...document.images].filter(image => !image.alt.trim()).length") == 0


def test_2000_images_open_with_the_pictures_of_the_first_only(page, tmp_path):
    check = checked(tmp_path / "data")
    cards = check.images_shown.cards
    picture = tmp_path / "noise.png"
    Image.effect_noise((320, 320), 60).save(picture)  # a file of about the size of a real slice
    from umed_plugin.commands.report.pictures import as_data_url

    large = as_data_url(Image.open(picture).convert("RGB"))
    cards.extend({**cards[0], "id": f"train: drawn/copy-{n}.png", "picture": large} for n in range(MOST - len(cards)))
    file = write_report(check, tmp_path / "report")
    page.open(tmp_path / "data" / "1.png")  # the browser has started
    began = time.monotonic()
    page.open(file)
    page.until(CARDS + ".length === 24")
    seconds = time.monotonic() - began
    print(f"{MOST} images: {file.stat().st_size / 1e6:.1f} MB, first cards after {seconds:.2f} s")
    assert page.run("document.images.length") == 24, "the others are made when they are asked for"


def test_the_command_writes_the_page(tmp_path, capsys):
    checked(tmp_path / "data")
    (recipe,) = (tmp_path / "data").glob("*.yaml")
    assert main(["recipe", "check", str(recipe), "--report", str(tmp_path / "report")]) == 0
    assert "report written" in capsys.readouterr().out
    assert (tmp_path / "report" / "check.html").read_text().count("data:image/webp") == 5


def test_a_recipe_without_patients_says_that_each_image_counts_as_one(tmp_path, capsys):
    """Finding 19: the number of patients was the number of images, and nothing said so."""
    said = "The recipe knows no patients, so each image counts as one."
    checked(tmp_path / "data")
    (recipe,) = (tmp_path / "data").glob("*.yaml")
    assert main(["recipe", "check", str(recipe)]) == 0
    assert said not in capsys.readouterr().out
    recipe.write_text(recipe.read_text().replace(", patient: patient", ""))
    assert main(["recipe", "check", str(recipe), "--report", str(tmp_path / "report")]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in (tmp_path / "report" / "check.html").read_text()


def test_faults_of_the_recipe_say_that_the_data_comes_later_and_one_is_one(tmp_path, capsys):
    """Finding 20: a fault of the YAML hid the faults of the data silently, and "1 faults" was said."""
    checked(tmp_path / "data", ROWS + "2.png,90,10,120,50,cy,p2,train\n")
    (recipe,) = (tmp_path / "data").glob("*.yaml")
    good = recipe.read_text()
    recipe.write_text(good.replace("reader: csv", "reader: cvs").replace("modality: CT", "modalty: CT"))
    assert main(["recipe", "check", str(recipe)]) == 1
    told = capsys.readouterr().err
    assert "cvs" in told and "modalty" in told, "all of the recipe's faults at once"
    assert "The data was not looked at: its faults are found once the recipe has none." in told
    recipe.write_text(good)
    assert main(["recipe", "check", str(recipe), "--report", str(tmp_path / "report")]) == 1
    assert "1 fault:" in capsys.readouterr().out
    assert "1 fault, 0 images missing" in (tmp_path / "report" / "check.html").read_text()
