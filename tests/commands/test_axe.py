"""Every page under axe-core, at 1280 and 390 pixels, in light and in dark."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.axe import assert_accessible, axe_script
from support.browser import Page, opened_page
from support.chat_client import chat_server
from support.drawn import write_png, write_recipe
from support.report_runs import write_run
from support.series import write_series
from support.source_files import uneven
from support.speaking import teach

from umed_plugin import cli
from umed_plugin.commands.report.page import write_report
from umed_plugin.commands.report.runs_page import write_runs_page

pytestmark = [pytest.mark.llava, pytest.mark.one_stack]


@pytest.fixture
def page(tmp_path: Path):
    axe_script()  # skips before a browser is started
    with opened_page(tmp_path) as browser:
        yield browser


def test_the_report_and_an_opened_study(page: Page, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name, count=6)
    page.open(write_report(tmp_path / "one"))
    page.run("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    assert_accessible(page, "report")
    page.run("document.querySelector('#studies-list .card').click()")
    assert_accessible(page, "an opened study")
    page.run("document.getElementById('viewer').close()")
    page.run("document.querySelector('#candidates-list .card')?.click()")
    assert_accessible(page, "opened sampled answers")
    write_report(tmp_path / "two")
    page.open(write_runs_page([tmp_path / "one", tmp_path / "two"], tmp_path / "reports.html"))
    assert_accessible(page, "index of reports")


def built_recipe(folder: Path) -> Path:
    folder.mkdir()
    for number in (1, 4):
        write_png(folder / f"{number}.png", uneven(61, 97, 1) / 255)
    rows = "1.png,30,20,50,30,nod,p1,train\n1.png,40,40,52,55,cy,p1,train\n4.png,30,20,30.5,40,nod,p4,val\n"
    (folder / "a.csv").write_text("file,x1,y1,x2,y2,lesion,patient,split\n" + rows)
    columns = "{file: file, box: [x1, y1, x2, y2], lesion: lesion, patient: patient, split: split}"
    return write_recipe(folder, f"{{reader: csv, files: a.csv, columns: {columns}}}", "{by: column}")


def test_the_check_and_an_opened_image(page: Page, tmp_path: Path) -> None:
    recipe = built_recipe(tmp_path / "data")
    cli.main(["recipe", "check", str(recipe), "--report", str(tmp_path / "check")])
    page.open(tmp_path / "check" / "check.html")
    assert_accessible(page, "check")
    page.run("document.querySelector('#images-list .card').click()")
    assert_accessible(page, "an opened image")


def test_the_review(page: Page, tmp_path: Path) -> None:
    recipe, records = built_recipe(tmp_path / "data"), tmp_path / "out" / "train.json"
    assert cli.main(["recipe", "build", str(recipe), "--out", str(records)]) == 0
    assert cli.main(["recipe", "review", str(records)]) == 0
    page.open(tmp_path / "out" / "train.review.html")
    page.run("document.querySelector('#card-0 .do-accept').click()")
    page.run("document.querySelector('#card-1 .do-reject').click()")
    assert_accessible(page, "review")


def test_the_chat_page_with_one_and_with_two_checkpoints(tiny_mistral: Path, tmp_path: Path) -> None:
    axe_script()
    from umed_plugin.commands.serve.dialogue import Dialogue

    dialogue = Dialogue(teach(tiny_mistral, tmp_path), most_tokens=60)
    series = sorted(write_series(tmp_path / "series").glob("IM*"))
    for dialogues in ([dialogue], [dialogue, dialogue]):
        with chat_server(*dialogues) as server:
            page = Page(tmp_path / f"profile-{len(dialogues)}", tmp_path)
            try:
                page.visit(server.url)
                assert_accessible(page, "empty chat page")
                page.give_files("#files", *series)
                page.until("document.querySelector('#picture').naturalWidth > 0")
                page.run("document.querySelector('#suggestions button').click()")
                page.until("document.querySelectorAll('#talk .of-turn').length === 1")
                page.until("document.querySelector('#peak').textContent !== ''")
                assert_accessible(page, f"chat page with {len(dialogues)} checkpoints")
            finally:
                page.close()
