"""The picture of the chat page in a real browser: sides, zoom, level and width, heat, sentences, saving, two checkpoints."""

from __future__ import annotations

import base64
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.browser import Page
from support.chat_client import chat_server, until
from support.drawn import scene, write_dicom, write_png
from support.series import write_series
from support.speaking import SENTENCE, teach

from umed_plugin.commands.serve.box_places import box_places
from umed_plugin.commands.serve.dialogue import Dialogue
from umed_plugin.commands.serve.handler import Handler
from umed_plugin.commands.serve.studies import Study

pytestmark = pytest.mark.one_stack
RANGE_SHOWN = "document.querySelector('#level').value === '40' && document.querySelector('#width').value === '400'"
ASKED = "document.querySelectorAll('#talk .of-turn').length === 1"
WINDOW = "document.querySelector('#window').value"
OTHER = "A cyst lies at (225,130;487 951)."


@pytest.fixture(scope="module")
def dialogues(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Dialogue]:
    taught = [teach(tiny_mistral, tmp_path_factory.mktemp("taught"), text) for text in (SENTENCE, OTHER)]
    return [Dialogue(checkpoint, most_tokens=60) for checkpoint in taught]


@pytest.fixture
def page(dialogues: list[Dialogue], tmp_path: Path) -> Any:
    with chat_server(dialogues[0]) as server:
        yield from opened(server, tmp_path)


@pytest.fixture
def page_of_two(dialogues: list[Dialogue], tmp_path: Path) -> Any:
    with chat_server(*dialogues) as server:
        yield from opened(server, tmp_path)


def opened(server: Any, folder: Path) -> Any:
    (folder / "downloads").mkdir()
    page = Page(folder / "profile", folder / "downloads")
    try:
        page.visit(server.url)
        yield page
        logged = [event for event in page.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        entries = [event["params"].get("entry", event["params"]) for event in logged]
        faults = [entry for entry in entries if entry.get("level", "error") == "error"]
        # The limits of a window may be asked for when the study has just been replaced by another.
        assert not [entry for entry in faults if "/window?" not in entry.get("url", "")]
    finally:
        page.close()


def give(page: Page, *files: Path) -> None:
    page.give_files("#files", *files)
    page.until("document.querySelector('#picture').naturalWidth > 0 && !document.querySelector('body.loading')")


def ask(page: Page) -> None:
    page.click("#suggestions button")
    page.until(ASKED)
    # The controls of the heat map come with its first picture, and make the pictures smaller.
    page.until("!document.querySelector('#word-label').hidden")


def text(page: Page, selector: str) -> str:
    return page.run(f"document.querySelector({json.dumps(selector)}).textContent")


def sides(page: Page) -> list[str]:
    return page.run("[...document.querySelectorAll('.side')].map(side => side.textContent)")


def zoom_of(page: Page) -> float:
    return page.run(
        "document.querySelector('#picture').getBoundingClientRect().width"
        " / document.querySelector('#stage').getBoundingClientRect().width"
    )


def box_on_picture(page: Page) -> list[float]:
    return page.run("""(() => { const b = document.querySelector('#boxes rect.line').getBoundingClientRect(),
      p = document.querySelector('#picture').getBoundingClientRect();
      return [(b.left - p.left) / p.width, (b.top - p.top) / p.height, b.width / p.width, b.height / p.height]; })()""")


def test_the_letters_of_the_sides_are_shown_where_they_are_known(page: Page, tmp_path: Path) -> None:
    give(page, write_dicom(tmp_path / "a.dcm", scene()))
    assert sides(page) == ["R", "L", "A", "P"]
    assert "R at the left edge and L at the right" in text(page, "#sides")
    give(page, write_png(tmp_path / "a.png", scene()))
    page.until("document.querySelector('#sides').textContent.startsWith('No letters')")
    assert sides(page) == ["", "", "", ""]


def test_zoom_by_keys_wheel_and_buttons_keeps_boxes_in_place(page: Page, tmp_path: Path) -> None:
    give(page, write_png(tmp_path / "a.png", scene()))
    ask(page)
    before = box_on_picture(page)
    page.run("document.querySelector('#stage').focus()")
    page.press("+", times=2)
    assert zoom_of(page) == pytest.approx(1.96, abs=0.05) and text(page, "#zoom-whole") == "196 %"
    assert box_on_picture(page) == pytest.approx(before, abs=0.02)
    left = "document.querySelector('#picture').getBoundingClientRect().left"
    x = page.run(left)
    page.press("ArrowRight")
    assert page.run(left) < x, "what lies to the right comes into view"
    x = page.run(left)
    page.drag("#stage", 30, 0)
    page.until(f"Math.abs({left} - {x} - 30) < 1")
    page.wheel("#stage", -200, ctrl=True)
    page.until("parseFloat(document.querySelector('#zoom-whole').textContent) > 300")
    page.press("0")
    assert zoom_of(page) == pytest.approx(1, abs=0.01)
    for button, times in (("#zoom-in", 1.4), ("#zoom-out", 1)):
        page.click(button)
        assert zoom_of(page) == pytest.approx(times, abs=0.01), button
    page.wheel("#stage", -300)
    page.until("parseFloat(document.querySelector('#zoom-whole').textContent) > 150")  # a single picture has no slices
    page.click("#zoom-whole")
    assert zoom_of(page) == pytest.approx(1, abs=0.01)


def test_level_and_width_by_drag_keys_and_numbers(page: Page, tmp_path: Path) -> None:
    give(page, write_dicom(tmp_path / "a.dcm", scene()))
    assert page.run(WINDOW) == "soft_tissue"
    page.until(RANGE_SHOWN)
    page.drag("#stage", 50, 0)
    page.until(f"{WINDOW}.includes(',')")
    low, high = map(float, page.run(WINDOW).split(","))
    assert high - low > 420 and (low + high) / 2 == pytest.approx(40, abs=1)
    assert float(page.run("document.querySelector('#width').value")) == pytest.approx(high - low)
    page.until("document.querySelector('#picture').dataset.address.includes('window=-')")
    page.run("document.querySelector('#stage').focus()")
    page.press("ArrowUp", shift=True)
    assert sum(map(float, page.run(WINDOW).split(","))) / 2 < 40
    page.type_into("#level", "100", instead=True)
    page.press("Enter")
    page.until(f"({WINDOW}.split(',').map(Number).reduce((a, b) => a + b) / 2) === 100")
    # Dragging can move the picture instead, and 8-bit pictures have no window.
    page.run(
        "(() => { const d = document.querySelector('#drag'); d.value = 'move'; d.dispatchEvent(new Event('change')); })()"
    )
    window = page.run(WINDOW)
    page.drag("#stage", 40, 40)
    assert page.run(WINDOW) == window
    give(page, write_png(tmp_path / "a.png", scene()))
    page.until("document.querySelector('#windows').hidden")


def test_an_answer_is_shown_again_in_the_window_by_hand_that_the_model_saw(page: Page, tmp_path: Path) -> None:
    give(page, write_dicom(tmp_path / "a.dcm", scene()), write_png(tmp_path / "b.png", scene()))
    item = page.run("[...document.querySelector('#item').options].findIndex(o => o.textContent.includes('b.png'))")
    choose = """(value => { const i = document.querySelector('#item'); i.value = value;
      i.dispatchEvent(new Event('change')); })"""
    page.run(f"{choose}({1 - item})")
    page.until(RANGE_SHOWN)
    page.type_into("#level", "100", instead=True)
    page.press("Enter")
    page.until(f"{WINDOW} === '-100,300'")
    ask(page)
    page.run(f"{choose}({item})")
    page.until("document.querySelector('#windows').hidden")
    page.run("document.querySelector('#back').click()")
    assert page.run(WINDOW) == "-100,300" and page.run("document.querySelector('#elsewhere').hidden")
    page.until("document.querySelector('#picture').dataset.address.includes('window=-100%2C300')")


def test_a_slow_drag_adds_up(page: Page, tmp_path: Path) -> None:
    """One pixel of a window of 80 values is a third of a value, and the picture is asked for in whole ones."""
    give(page, write_dicom(tmp_path / "a.dcm", scene()))
    page.until(RANGE_SHOWN)
    page.type_into("#width", "80", instead=True)
    page.press("Enter")
    page.until(f"{WINDOW} === '0,80'")
    page.drag("#stage", 60, 0, steps=60)
    low, high = map(int, page.run(WINDOW).split(","))  # whole numbers
    assert high - low == pytest.approx(80 * (1 + 1 / 250) ** 60, abs=3) and (low + high) / 2 == pytest.approx(40, abs=1)


def test_slices_that_are_passed_ask_for_one_range_at_a_time(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, let_go, stock = [], threading.Event(), Study.window_range

    def slow(self: Study, view: Any) -> Any:
        asked.append(view.slice)
        let_go.wait(60)
        return stock(self, view)

    monkeypatch.setattr(Study, "window_range", slow)
    give(page, *sorted(write_series(tmp_path / "s").glob("IM*")))
    until(lambda: len(asked) == 1)
    page.run("document.querySelector('#stage').focus()")
    page.press("ArrowRight", 4)
    page.until("document.querySelector('#slice').value === '10'")
    let_go.set()
    page.until("document.querySelector('#width').value !== ''")
    assert asked == [6, 10]


def test_a_picture_that_is_late_is_not_shown_beside_the_next_study(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, late, next_shown, sent = Handler._reply, threading.Event(), threading.Event(), threading.Event()

    def reply(handler: Handler, status: Any, content: bytes, kind: str, *more: Any) -> None:
        if kind != "image/jpeg" or not late.is_set():
            return stock(handler, status, content, kind, *more)
        late.clear()
        next_shown.wait(60)
        try:
            stock(handler, status, content, kind, *more)
        finally:  # the browser may have closed the connection
            sent.set()

    monkeypatch.setattr(Handler, "_reply", reply)
    give(page, write_dicom(tmp_path / "a.dcm", scene()))
    page.until(RANGE_SHOWN)  # what is typed counts with the width
    late.set()
    page.type_into("#level", "100", instead=True)
    page.press("Enter")
    page.until("document.querySelector('body.loading') !== null")
    page.give_files("#files", write_png(tmp_path / "a.png", scene()))
    page.until("document.querySelector('#windows').hidden && document.querySelector('#picture').naturalWidth > 0")
    shown = page.run("document.querySelector('#picture').dataset.address")
    next_shown.set()
    assert sent.wait(60)
    until(lambda: has_ended(page, "window=-100%2C300"))
    page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.run("document.querySelector('#picture').dataset.address") == shown
    assert text(page, "#fault") == ""


def has_ended(page: Page, part: str) -> bool:
    """Whether the browser is done with its request for an address that has this part, or has called it off."""
    page.run("0")  # takes in what the browser tells
    told = [(event["method"], event["params"]) for event in page.events]
    asked = [
        p["requestId"] for method, p in told if method == "Network.requestWillBeSent" and part in p["request"]["url"]
    ]
    assert asked, f"nothing was asked for at {part}"
    ended = [p["requestId"] for method, p in told if method in ("Network.loadingFinished", "Network.loadingFailed")]
    return set(asked) <= set(ended)


def test_boxes_stay_under_another_window_and_the_page_says_what_the_model_saw(page: Page, tmp_path: Path) -> None:
    give(page, write_dicom(tmp_path / "a.dcm", scene()))
    page.until(RANGE_SHOWN)  # the keys change it
    ask(page)
    assert page.run("document.querySelector('#elsewhere').hidden")
    page.run("document.querySelector('#stage').focus()")
    page.press("ArrowUp", shift=True)
    page.until("!document.querySelector('#elsewhere').hidden")
    assert text(page, "#elsewhere span") == "The model saw another window (soft tissue)."
    assert page.run("document.querySelectorAll('#boxes rect.line').length") == 1
    page.click("#back")
    assert page.run(WINDOW) == "soft_tissue" and page.run("document.querySelector('#elsewhere').hidden")


def word(values: list[float]) -> dict[str, Any]:
    shares = np.array(values) / sum(values)
    scaled = np.round(shares / shares.max() * 255).astype(np.uint8)
    return {
        "text": "nodule",
        "is_name": True,
        "map": base64.b64encode(scaled.tobytes()).decode(),
        "peak": float(shares.max()),
    }


@pytest.mark.parametrize("times", [1.5, 6.0])
def test_a_flat_map_is_off_and_a_sharp_one_has_the_reports_colours(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: float
) -> None:
    values = [times] + [(64 - times) / 63] * 63

    def attention(_self: Dialogue, answer: Any, mask_sinks: bool = False) -> dict[str, Any]:
        return {"grid": 8, "place": [0, -18, 97, 79], "sinks": 3 if mask_sinks else None, "words": [word(values)]}

    monkeypatch.setattr(Dialogue, "attention", attention)
    give(page, write_png(tmp_path / "a.png", scene()))
    ask(page)
    page.until("document.querySelector('#peak').textContent !== ''")
    said = text(page, "#peak")
    assert f"The strongest patch has {times:.1f} times an even share" in said
    flat = times < 2
    assert page.run("document.querySelector('#heat').hidden") == flat == ("no map" in said)
    if flat:
        page.click("#anyway")
        assert not page.run("document.querySelector('#heat').hidden")
    pixel = "[...document.querySelector('#heat').getContext('2d').getImageData(0, 0, 1, 1).data]"
    red, green, blue, alpha = page.run(pixel)
    # The report's scale: 4 times an even share or more is (240, 249, 33); 1.5 of 4 lies between its second and third colour.
    expected = (165, 36, 144) if flat else (240, 249, 33)
    assert (red, green, blue) == pytest.approx(expected, abs=3)
    assert alpha == pytest.approx(255 * 0.75 * min(times / 4, 1), abs=2)
    page.run(
        "(() => { const o = document.querySelector('#opacity'); o.value = 0.2; o.dispatchEvent(new Event('input')); })()"
    )
    assert page.run(pixel)[3] < alpha / 2
    page.click("#sinks")
    page.until("document.querySelector('#peak').textContent.includes('3 of 64 patches left out as sinks')")


def test_a_box_and_its_sentence_light_one_another_and_half_a_box_is_said(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, answered = (
        "It lies at [0.20, 0.30, 0.60, 0.60]. Clear otherwise. A mass 0.38, 0.49, 0.54] too.",
        Dialogue.answer,
    )

    def two(self: Dialogue, *args: Any) -> Any:
        return replace(answered(self, *args), text=said, boxes=[(20, 10, 60, 40)], places=box_places(said), cut=60)

    monkeypatch.setattr(Dialogue, "answer", two)
    give(page, write_png(tmp_path / "a.png", scene()))
    ask(page)
    assert text(page, "#talk .answer") == said
    assert page.run("[...document.querySelectorAll('.sentence')].map(s => s.textContent)") == [
        "It lies at [0.20, 0.30, 0.60, 0.60]."
    ]
    assert text(page, "#talk mark") == "0.38, 0.49, 0.54]"
    assert "1 place in the text could not be read as a box, such as half a box" in text(page, "#talk .about")
    assert "cut off at 60 tokens" in text(page, "#talk .about")
    lit = "document.querySelectorAll('#boxes .lit').length"
    assert page.run(lit) == 0
    page.run("document.querySelector('.sentence').focus()")
    assert page.run(lit) == 1
    page.run("document.querySelector('.sentence').blur()")
    assert page.run(lit) == 0
    page.hover("#boxes rect.line")
    page.until("document.querySelectorAll('.sentence.lit').length === 1")
    page.hover("#question")
    page.until("document.querySelectorAll('.sentence.lit').length === 0")


def downloaded(folder: Path, ending: str) -> Path:
    ended = time.monotonic() + 30
    while not (found := list((folder / "downloads").glob(f"*{ending}"))):
        assert time.monotonic() < ended
        time.sleep(0.05)
    return found[0]


def test_two_checkpoints_answer_side_by_side_and_are_saved(page_of_two: Page, tmp_path: Path) -> None:
    page = page_of_two
    give(page, *sorted(write_series(tmp_path / "s").glob("IM*")))
    ask(page)
    assert page.run("[...document.querySelectorAll('#talk .answer')].map(e => e.textContent)") == [SENTENCE, OTHER]
    assert page.run("[...document.querySelectorAll('#talk h2')].map(e => e.textContent)") == [
        "tiny-<b>llava",
        "other-llava",
    ]
    assert page.run("[...document.querySelectorAll('.boxes')].map(e => e.querySelectorAll('rect.line').length)") == [
        1,
        1,
    ]
    tops = page.run("[...document.querySelectorAll('.stage')].map(e => e.getBoundingClientRect().top)")
    assert tops[0] == pytest.approx(tops[1], abs=1), "beside one another"
    # Both panes show the same part of the same slice.
    page.run("document.querySelector('#stage').focus()")
    page.press("+")
    widths = page.run("[...document.querySelectorAll('.layers')].map(e => e.style.width)")
    assert widths[0] == widths[1]
    page.press("0")
    buttons = "[...document.querySelectorAll('#talk .of-turn button')]"
    page.run(f"{buttons}.find(b => b.textContent === 'Save the answer').click()")
    saved = json.loads(downloaded(tmp_path, ".json").read_text())
    assert [one["text"] for one in saved["answers"]] == [SENTENCE, OTHER]
    assert saved["answers"][1]["checkpoint"] == "other-llava" and len(saved["answers"][0]["boxes"]) == 1
    assert [one["cut_off_at_tokens"] for one in saved["answers"]] == [None, None]
    assert saved["view"]["slice"] == 6 and saved["question"] == "Is it a nodule?"
    page.run(f"{buttons}.find(b => b.textContent === 'Save the picture').click()")
    picture = Image.open(downloaded(tmp_path, ".png")).convert("RGB")
    width, height = picture.size
    assert width == 1812 and height > 700
    shown = np.asarray(picture).astype(int)
    green = (shown[:560, :900] - [0, 230, 92]).__abs__().sum(axis=2) < 60
    orange = (shown[:560, 912:] - [255, 180, 84]).__abs__().sum(axis=2) < 60
    assert green.sum() > 500 and orange.sum() > 300, "each pane has its checkpoint's box"
    assert (shown[-44:].max(axis=2) < 60).sum() > 10, "the text under it"


def test_new_images_while_one_of_two_still_answers_leave_the_page_alive(
    page_of_two: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, let_go, stock, asked = page_of_two, threading.Event(), Dialogue.answer, []

    def second_is_slow(self: Dialogue, key: Any, picture: Any, turns: Any, question: str, tell: Any) -> Any:
        asked.append(self)
        while len(asked) == 2 and not let_go.wait(0.05):
            tell("It is")
        return stock(self, key, picture, turns, question, tell)

    monkeypatch.setattr(Dialogue, "answer", second_is_slow)
    give(page, write_png(tmp_path / "a.png", scene()))
    page.click("#suggestions button")
    replies = "[...document.querySelectorAll('#talk .answer')].map(e => e.textContent)"
    page.until(f"{replies}.includes('It is')")  # the other has ended: the model answers one by one
    page.run("document.querySelector('#picture').removeAttribute('src')")
    give(page, write_dicom(tmp_path / "b.dcm", scene()))
    page.until("!document.querySelector('#send').disabled && document.querySelector('#stop').hidden", 10)
    assert text(page, "#fault") == "" and page.run("document.querySelectorAll('#talk .turn').length") == 0
    let_go.set()
    ask(page)
    assert page.run(replies) == [SENTENCE, OTHER]


def test_a_small_screen_shows_the_end_of_a_new_answer_above_the_form(page: Page, tmp_path: Path) -> None:
    page.shape(390, 844, phone=True)
    give(page, write_png(tmp_path / "a.png", scene()))
    ask(page)
    page.until("document.querySelector('#peak').textContent !== ''")
    page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    answer, form = page.run(
        "['#talk .answer', '#ask'].map(name => document.querySelector(name).getBoundingClientRect())"
        ".map(box => ({top: box.top, bottom: box.bottom}))"
    )
    assert answer["bottom"] <= form["top"] + 1
