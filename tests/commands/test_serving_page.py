"""The chat page in a real browser: from a file to a box on the picture, at desktop and phone size, by mouse and by keyboard."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.browser import Page
from support.chat_client import chat_server, until
from support.drawn import scene, write_dicom, write_png
from support.report_runs import HOSTILE
from support.series import write_series
from support.speaking import BOX01, SENTENCE, teach

from umed_plugin.commands.serve.dialogue import Dialogue

pytestmark = pytest.mark.one_stack
SHOTS = os.environ.get("UMED_SCREENSHOTS")


@pytest.fixture(scope="module")
def server(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    dialogue = Dialogue(teach(tiny_mistral, tmp_path_factory.mktemp("taught")), most_tokens=60)
    with chat_server(dialogue, most_bytes=2_000_000) as running:
        yield running


@pytest.fixture
def page(server: Any, tmp_path: Path) -> Any:
    opened = Page(tmp_path / "profile", tmp_path)
    try:
        opened.visit(server.url)
        yield opened
        loaded = [event for event in opened.events if event["method"] == "Runtime.exceptionThrown"]
        assert not loaded, loaded
    finally:
        opened.close()


def shot(page: Page, name: str) -> None:
    """Save a screenshot if ``UMED_SCREENSHOTS`` names a folder."""
    if SHOTS:
        page.screenshot(Path(SHOTS) / f"{name}.png")


def shown(page: Page) -> None:
    page.until("document.querySelector('#picture').naturalWidth > 0 && !document.querySelector('body.loading')")


def answers(page: Page) -> list[str]:
    return page.run("[...document.querySelectorAll('#talk .answer')].map(e => e.textContent)")


def boxes(page: Page) -> list[list[float]]:
    """The corners of the drawn boxes as they appear on the screen, 0-1 of the picture."""
    return page.run("""[...document.querySelectorAll('#boxes rect.line')].map(box => {
      const b = box.getBoundingClientRect(), p = document.querySelector('#picture').getBoundingClientRect();
      return [(b.left - p.left) / p.width, (b.top - p.top) / p.height, (b.right - p.left) / p.width,
              (b.bottom - p.top) / p.height]; })""")


def test_from_a_series_to_boxes_and_a_heat_map(page: Page, tmp_path: Path) -> None:
    series = write_series(tmp_path / "series", WindowCenter=0, WindowWidth=2000)
    page.give_files("#files", *sorted(series.iterdir()))
    shown(page)
    assert page.run("document.querySelector('#slice-shown').textContent") == "7 of 12"
    assert "readme.txt: is not a supported image" in page.run("document.querySelector('#left-out').textContent")
    assert page.run("[...document.querySelector('#window').options].map(o => o.value)")[:2] == ["file", "full"]

    # By keyboard: the slider, then the question.
    page.run("document.querySelector('#slice').focus()")
    page.press("ArrowRight")
    assert page.run("document.querySelector('#slice-shown').textContent") == "8 of 12"
    assert "slice 8 of 12" in page.run("document.querySelector('#picture').alt")
    page.run("document.querySelector('#question').focus()")
    page._say("Input.insertText", on_page=True, text="What is it?")
    page.press("Enter")
    page.until("document.querySelectorAll('#talk .of-turn').length === 1")
    assert answers(page) == [SENTENCE]
    # 97 x 61 in a square of 97: 18 rows above.
    x1, y1, x2, y2 = (97 * value for value in BOX01)
    assert boxes(page) == [pytest.approx([x1 / 97, (y1 - 18) / 61, x2 / 97, min((y2 - 18) / 61, 1)], abs=0.02)]
    page.until("!document.querySelector('#anyway').hidden")  # random weights look at everything alike
    assert page.run("document.querySelector('#heat').hidden")
    page.click("#anyway")
    assert not page.run("document.querySelector('#heat').hidden")
    assert page.run("document.querySelector('#word').selectedOptions[0].textContent") == "nodule"
    place = page.run("""(() => { const h = document.querySelector('#heat').getBoundingClientRect(),
      p = document.querySelector('#picture').getBoundingClientRect();
      return [(h.left - p.left) / p.width, (h.top - p.top) / p.height, h.width / p.width, h.height / p.height]; })()""")
    assert place == pytest.approx([0, -18 / 61, 1, 97 / 61], abs=0.02)
    shot(page, "series")

    # Toggles, another word, and away from the slice that was asked about.
    page.click("#with-heat")
    assert page.run("document.querySelector('#heat').hidden")
    page.click("#with-heat")
    before = page.run("document.querySelector('#heat').toDataURL()")
    page.run(
        "(() => { const w = document.querySelector('#word'); w.value = 3; w.dispatchEvent(new Event('change')); })()"
    )
    assert page.run("document.querySelector('#heat').toDataURL()") != before
    page.click("#with-boxes")
    assert boxes(page) == []
    page.click("#with-boxes")
    page.run("document.querySelector('#slice').focus()")
    page.press("ArrowLeft", times=2)
    assert boxes(page) == [] and not page.run("document.querySelector('#elsewhere').hidden")
    page.click("#back")
    assert len(boxes(page)) == 1
    shown(page)

    # A further question on the same slice, from the suggestions.
    page.click("#suggestions button")
    page.until("document.querySelectorAll('#talk .of-turn').length === 2")
    assert page.run("document.querySelector('#fault').textContent") == ""


def test_files_and_folders_can_be_dropped(page: Page, tmp_path: Path) -> None:
    page.drop("#choose", write_png(tmp_path / "a.png", scene()))
    shown(page)
    nested = tmp_path / "study"
    nested.mkdir()
    write_series(nested / "series")
    page.drop("#stage", nested)
    page.until("document.querySelector('#slice-shown').textContent === '7 of 12'")
    assert "readme.txt" in page.run("document.querySelector('#left-out').textContent")


def test_the_window_changes_the_picture(page: Page, tmp_path: Path) -> None:
    page.give_files("#files", write_dicom(tmp_path / "a.dcm", scene(), WindowCenter=0, WindowWidth=2000))
    shown(page)
    grey = """(() => { const i = document.querySelector('#picture'), c = document.createElement('canvas');
      c.width = c.height = 1; c.getContext('2d').drawImage(i, 5, 40, 1, 1, 0, 0, 1, 1);
      return c.getContext('2d').getImageData(0, 0, 1, 1).data[0]; })()"""
    before = page.run(grey)
    page.run(
        "(() => { const w = document.querySelector('#window'); w.value = 'lung'; w.dispatchEvent(new Event('change')); })()"
    )
    page.until("document.querySelector('#picture').dataset.address.includes('window=lung')")
    shown(page)
    assert abs(page.run(grey) - before) > 8


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.txt", b"text", "notes.txt: is not a supported image"),
        ("cut.png", b"\x89PNG\r\n\x1a\n" + bytes(50), "cut.png: cannot be read as an image"),
        ("large.png", bytes(3_000_000), "large.png: 3 MB. Allowed: 2 MB."),
        ("<img src=x onerror=alert(1)>.png", b"x", "<img src=x onerror=alert(1)>.png: is not a supported image"),
    ],
)
def test_bad_files_are_told_and_the_page_goes_on(
    page: Page, server: Any, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    bad, before = tmp_path / name, set(server.shelf._cases)
    bad.write_bytes(content)
    page.give_files("#files", bad)
    page.until("document.querySelector('#fault').textContent !== ''")
    assert said in page.run("document.querySelector('#fault').textContent")
    assert page.run("document.querySelector('#fault').getAttribute('role')") == "alert"
    until(lambda: set(server.shelf._cases) <= before)  # a refused upload holds no place
    page.give_files("#files", write_png(tmp_path / "good.png", scene()))
    shown(page)
    assert page.run("document.querySelector('#fault').textContent") == ""


def test_two_tabs_do_not_mix(page: Page, server: Any, tmp_path: Path) -> None:
    other = Page(tmp_path / "other", tmp_path)
    try:
        other.visit(server.url)
        page.give_files("#files", write_png(tmp_path / "wide.png", scene()))
        other.give_files("#files", write_png(tmp_path / "tall.png", scene(width=40, height=90, box=(1, 1, 9, 9))))
        shown(page)
        shown(other)
        for tab in (page, other):
            tab.click("#suggestions button")
        for tab in (page, other):
            tab.until("document.querySelectorAll('#talk .of-turn').length === 1")
        assert page.run("document.querySelector('#boxes').getAttribute('viewBox')") == "0 0 97 61"
        assert other.run("document.querySelector('#boxes').getAttribute('viewBox')") == "0 0 40 90"
        # A closed page takes its images along.
        folders = len(list(server.shelf.folder.iterdir()))
        other.visit("about:blank")
        until(lambda: len(list(server.shelf.folder.iterdir())) == folders - 1)
    finally:
        other.close()


def test_an_answer_can_be_stopped(page: Page, server: Any, tmp_path: Path) -> None:
    page.give_files("#files", write_png(tmp_path / "a.png", scene()))
    shown(page)
    with server.line.turn(lambda before: None):
        page.click("#suggestions button")
        page.until("document.querySelector('#status').textContent.startsWith('Waiting: 1 request is before')")
        shot(page, "waiting")
        page.click("#stop")
        page.until("!document.querySelector('#send').disabled")
    assert answers(page) == ["Stopped."]
    page.click("#suggestions button")
    page.until("document.querySelectorAll('#talk .of-turn').length === 1")


def test_hostile_answers_and_file_names_are_shown_and_do_nothing(
    page: Page, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Dialogue.answer

    def hostile(self: Dialogue, key: Any, picture: Any, turns: Any, question: str, tell: Any) -> Any:
        tell(HOSTILE)
        return replace(said(self, key, picture, turns, question, lambda text: None), text=HOSTILE)

    monkeypatch.setattr(Dialogue, "answer", hostile)
    name = "<img src=x onerror='window.hacked=3'>.png"
    page.give_files("#files", write_png(tmp_path / name, scene()), write_png(tmp_path / f"b{name}", scene()))
    shown(page)
    page.run("document.querySelector('#question').focus()")
    page._say("Input.insertText", on_page=True, text=HOSTILE)
    page.press("Enter")
    page.until("document.querySelectorAll('#talk .of-turn').length === 1")
    assert answers(page) == [HOSTILE] and HOSTILE in page.run("document.querySelector('#talk').textContent")
    assert name in page.run("document.body.textContent")
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.querySelectorAll('#talk b, #talk script, img[src=x]').length") == 0


@pytest.mark.parametrize(("width", "height"), [(390, 844), (320, 568)])
def test_on_a_phone_nothing_is_cut_off(page: Page, tmp_path: Path, width: int, height: int) -> None:
    page.shape(width, height, phone=True)
    shot(page, f"phone-{width}-empty")
    page.give_files("#files", *sorted(write_series(tmp_path / "s", WindowCenter=0, WindowWidth=2000).glob("IM*")))
    shown(page)
    page.click("#suggestions button")
    page.until(
        "document.querySelectorAll('#talk .of-turn').length === 1 && document.querySelector('#peak').textContent"
    )
    shot(page, f"phone-{width}")
    assert page.run("document.documentElement.scrollWidth") <= width
    too_wide = """[...document.querySelectorAll('body *')].filter(e => e.getClientRects().length
      && !e.closest('svg, #stage') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.id || e.tagName)"""
    assert page.run(too_wide) == []
    assert page.run("document.querySelector('#picture').getBoundingClientRect().width") > width * 0.8


def test_everything_can_be_reached_with_the_tab_key_and_has_a_name(page: Page, tmp_path: Path) -> None:
    page.give_files("#files", *sorted(write_series(tmp_path / "s", WindowCenter=0, WindowWidth=2000).glob("IM*")))
    shown(page)
    page.run("document.activeElement.blur()")
    reached = []
    for _ in range(26):
        page.press("Tab")
        reached.append(page.run("document.activeElement.id || document.activeElement.textContent"))
    wanted = {
        "files",
        "folder",
        "stage",
        "zoom-in",
        "level",
        "width",
        "drag",
        "window",
        "slice",
        "with-boxes",
        "with-heat",
        "question",
        "send",
        "with-turns",
    }
    assert wanted <= set(reached)
    nameless = """[...document.querySelectorAll('button, input, select, textarea')].filter(e =>
      !(e.labels && e.labels.length && e.labels[0].textContent.trim()) && !e.textContent.trim()).map(e => e.id)"""
    assert page.run(nameless) == []
