"""The report as a person has it, in headless Chromium: sorted, filtered, opened, by mouse and keys, on a phone, in the dark."""

from __future__ import annotations

import csv
import json
import re
import time
from urllib.parse import quote

import pytest
from support.browser import CONTRASTS, Page, opened_page
from support.report_runs import (
    HOSTILE,
    SHIFTS,
    change_predictions,
    make_records,
    write_evaluation,
    write_log,
    write_run,
)

from umed_plugin.commands.report.page import write_report

pytestmark = pytest.mark.one_stack
STAGES = ("base", "stage 1", "stage 2")
CARDS = "[...document.querySelectorAll('#studies-list .card')]"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, count=40)
    return folder


@pytest.fixture
def page(tmp_path):
    with opened_page(tmp_path) as browser:
        yield browser


def titles(page: Page) -> list[str]:
    return page.run(CARDS + ".map(card => card.querySelector('img').alt)")


def choose(page: Page, field: str, value: str) -> None:
    page.run(
        f"(() => {{ const e = document.getElementById({json.dumps(field)}); e.value = {json.dumps(value)};"
        " e.dispatchEvent(new Event('change')); })()"
    )


def cases(run, stage):
    return [json.loads(line) for line in (run / "evaluation" / stage / "predictions.jsonl").read_text().splitlines()]


def test_sorted_by_gain_and_by_failure_and_filtered(run, page):
    page.open(write_report(run))
    before, after = ({one["id"]: one for one in cases(run, stage)} for stage in ("base", "rewarding"))
    gains = {name: (after[name]["set_iou"] - before[name]["set_iou"]) for name in after}
    shown = [title.split(",")[0].removeprefix("Study ") for title in titles(page)]
    assert len(shown) == 24 and page.run("document.getElementById('studies-count').textContent").startswith("24 of 40")
    assert [gains[name] for name in shown] == pytest.approx(sorted(gains.values(), reverse=True)[:24])

    choose(page, "studies-sort", "failure")
    shown = [title.split(",")[0].removeprefix("Study ") for title in titles(page)]
    worst = sorted((one["values"]["accuracy"], one["set_iou"]) for one in after.values())
    assert [(after[name]["values"]["accuracy"], after[name]["set_iou"]) for name in shown] == worst[:24]
    said = CARDS + "[0].querySelector('.scores').textContent"
    assert page.run(said).startswith("IoU no box → ") and "wrong class (stage 2)" in page.run(said)
    assert page.run(said).endswith(shown[0].split("/")[-1])

    # Among the failures of stage 1 the verdict is stage 1's.
    choose(page, "studies-to", "1")
    assert "wrong class (stage 1)" in page.run(said)
    choose(page, "studies-sort", "box")
    overlaps = page.run(CARDS + ".map(card => card.querySelector('.scores').textContent.split(' → ')[1])")
    assert "no box" not in overlaps and overlaps == sorted(overlaps)
    choose(page, "studies-to", "2")

    choose(page, "studies-sort", "loss")
    choose(page, "studies-from", "1")
    first = titles(page)[0].split(",")[0].removeprefix("Study ")
    middle = {one["id"]: one["set_iou"] for one in cases(run, "instruction_tuning")}
    assert after[first]["set_iou"] - middle[first] == pytest.approx(min(after[n]["set_iou"] - middle[n] for n in after))

    choose(page, "studies-class", "cyst")
    with_cyst = [one for one in after.values() if "cyst" in one["true_classes"]]
    assert 0 < len(titles(page)) == len(with_cyst) and all("cyst" in title for title in titles(page))
    choose(page, "studies-class", "no abnormality")
    assert all(title.endswith("true: no abnormality") for title in titles(page)) and titles(page)
    assert page.run("[...document.getElementById('studies-source').options].map(o => o.value)") == ["", "demo_studies"]


def test_an_opened_study_shows_boxes_on_its_lesion_the_answers_and_the_attention(run, page):
    """The yellow box of a study, where the browser draws it, holds pixels that differ from those around it."""
    page.open(write_report(run))
    choose(page, "studies-class", "calcification")
    page.click("#studies-list .card")
    page.until("document.getElementById('viewer').open")
    name = page.run("document.getElementById('viewer-title').textContent")
    answers = page.run("[...document.querySelectorAll('#viewer .answer')].map(p => p.textContent)")
    assert answers == [next(one["answer"] for one in cases(run, stage) if one["id"] == name) for stage in SHIFTS]
    assert page.run("document.querySelectorAll('#viewer canvas.heat').length") == 3
    page.until("[...document.querySelectorAll('#viewer img')].every(image => image.complete)")
    inside, around = page.run(
        """(() => {
      const panel = document.querySelectorAll("#viewer .panel")[2], image = panel.querySelector("img");
      const seen = image.getBoundingClientRect(), drawn = panel.querySelector(".boxes.true .edge").getBoundingClientRect();
      const canvas = document.createElement("canvas");
      const side = canvas.width = canvas.height = image.naturalWidth;
      const pen = canvas.getContext("2d", {willReadFrequently: true});
      pen.drawImage(image, 0, 0);
      const scale = side / seen.width, half = drawn.width / 2 * scale;
      const middle = [(drawn.x + drawn.width / 2 - seen.x) * scale, (drawn.y + drawn.height / 2 - seen.y) * scale];
      const grey = (x, y) => pen.getImageData(Math.round(x), Math.round(y), 1, 1).data[0];
      return [grey(...middle), grey(middle[0] - half - 5, middle[1])];
    })()"""
    )
    assert inside > around + 60, "a calcification is white"


def test_the_boxes_and_the_attention_can_be_switched(run, page):
    page.open(write_report(run))
    assert page.run("document.querySelectorAll('#studies-list canvas').length") == 0
    choose(page, "heat", "2")
    assert page.run("document.querySelectorAll('#studies-list canvas').length") > 10
    shown = "getComputedStyle(document.querySelector('#studies-list .boxes.stage-2')).display"
    assert page.run(shown) != "none"
    page.click("input[data-layer=stage-2]")
    assert page.run(shown) == "none"


def test_the_keyboard_alone_is_enough(run, page):
    page.open(write_report(run))
    focused = "document.activeElement.textContent.trim() || document.activeElement.id"
    page.press("Tab")
    assert page.run(focused) == "Skip to the results"
    assert page.run("document.activeElement.getBoundingClientRect().left >= 0"), "it shows when it has the focus"
    ring = (
        "getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth"
    )
    order = []
    for _ in range(60):
        page.press("Tab")
        assert page.run(ring) == "solid3px", page.run("document.activeElement.outerHTML.slice(0, 200)")
        order.append(
            page.run("document.activeElement.id || document.activeElement.className || document.activeElement.tagName")
        )
        if order[-1] == "card":
            break
    tools = ["studies-sort", "studies-from", "studies-to", "studies-source", "studies-class", "heat"]
    assert [name for name in order if name in tools] == tools
    assert order[-1] == "card", "one stop for all cards, after the tools"
    place = "Number(document.activeElement.dataset.place)"
    for key, expected in (("ArrowRight", 1), ("End", 23), ("ArrowRight", 24), ("Home", 0), ("ArrowLeft", 0)):
        page.press(key)
        assert page.run(place) == expected, key
    page.press("ArrowDown")
    columns = page.run(
        "getComputedStyle(document.getElementById('studies-list')).gridTemplateColumns.split(' ').length"
    )
    assert page.run(place) == columns > 1
    page.press("Enter")
    page.until("document.getElementById('viewer').open")
    first = page.run("document.getElementById('viewer-title').textContent")
    page.press("ArrowRight")
    assert page.run("document.getElementById('viewer-title').textContent") != first
    for _ in range(8):
        page.press("Tab")
        assert page.run(
            "document.activeElement === document.body || document.getElementById('viewer').contains(document.activeElement)"
        )
    page.press("Escape")
    page.until("!document.getElementById('viewer').open")
    page.until(f"{place} === {columns + 1}", seconds=20)  # back at the card of the study that was open


def test_sampled_answers_show_the_reward_per_term(run, page):
    page.open(write_report(run))
    choose(page, "candidates-sort", "gain")
    page.click("#candidates-list .card")
    page.until("document.getElementById('viewer').open")
    cells = "[...document.querySelectorAll('#viewer tbody tr')].map(row => [...row.cells].slice(2).map(cell => cell.textContent))"
    assert page.run("[...document.querySelectorAll('#viewer th')].map(head => head.textContent)") == [
        *("box", "answer", "relevance", "localization", "reward"),
    ]
    rows = page.run(cells)
    rows = [[cell.replace("\u00a0", " ") for cell in row] for row in rows]
    assert rows[0] == ["1.000 → 1.0 × 1.000", "1.000 → 1.0 × 1.000", "2.000 (best)"]
    assert rows[2] == ["– → 1.0 × 1.000", "0.000 → 1.0 × 0.000", "0.250 = 1.000 − 0.750 (cut off)"]
    how = page.run("document.querySelector('#viewer .how').textContent")
    assert "–: not scored; it counts as the mean" in how and "Cut off: the answer had reached" in how
    truth = page.run("document.querySelector('#viewer .truth').textContent")
    assert "the same reward" not in how
    assert re.match(r"True: \[0\.\d\d, .*\]\. Reference: .+", truth), truth
    pressed = (
        "[...document.querySelectorAll('#viewer tbody button')].map(button => button.getAttribute('aria-pressed'))"
    )
    assert page.run(pressed) == ["true", "false", "false"]
    box = "document.querySelector('#viewer .boxes.best .edge').getAttribute('x')"
    at = float(page.run(box))
    page.click("#viewer tbody tr:nth-child(2) button")
    assert page.run(pressed) == ["false", "true", "false"] and float(page.run(box)) > at


def test_a_chart_tells_its_values_to_the_pointer_and_to_the_keys_and_can_be_smoothed(run, page):
    page.open(write_report(run))
    chart = "document.querySelector('figure[aria-label=\"reward/total\"]')"
    page.run(f"{chart}.focus()")
    page.press("ArrowRight", times=2)
    assert page.run(f"{chart}.querySelector('.reading').textContent") == "step 20: 2.2"
    # The mark is on the line that matplotlib drew.
    circle = page.run(f"['cx', 'cy'].map(name => Number({chart}.querySelector('circle').getAttribute(name)))")
    drawn = page.run(f"{chart}.querySelector('path[style*=\"--line\"]').getAttribute('d')")
    second = [float(word) for word in drawn.replace("M", " ").replace("L", " ").split()][2:4]
    assert circle == pytest.approx(second, abs=0.6)
    page.press("ArrowDown")
    assert page.run("document.activeElement.getAttribute('aria-label')") == "reward/localization"
    page.run(
        "(() => { const e = document.getElementById('smoothing'); e.value = .5; e.dispatchEvent(new Event('input')); })()"
    )
    page.press("End")
    # Weights of 1, 1/2, 1/4, ... over 0.31, 0.30, 0.29, ...
    weights = [0.5**age for age in range(11)]
    mean = sum(weight * (0.31 - 0.01 * age) for age, weight in enumerate(weights)) / sum(weights)
    assert (
        page.run("document.activeElement.querySelector('.reading').textContent")
        == f"step 110: 0.31, smoothed {mean:.4g}"
    )


def test_what_the_page_shows_can_be_downloaded(run, page, tmp_path):
    file = write_report(run)
    page.open(file)
    for name in ("metrics-csv", "metrics-json", "curves-csv", "studies-csv", "studies-json"):
        page.click(f"[data-download={name}]")
        target = tmp_path / "downloads" / f"run-{name.replace('-', '.')}"
        deadline = time.monotonic() + 20
        while not target.exists():
            assert time.monotonic() < deadline, f"{target.name} was not downloaded"
            time.sleep(0.05)
    loaded = json.loads((tmp_path / "downloads" / "run-metrics.json").read_text())
    assert (
        loaded["stages"]["stage 2"] == json.loads((run / "evaluation/rewarding/evaluation.json").read_text())["metrics"]
    )
    with open(tmp_path / "downloads" / "run-metrics.csv", newline="") as stream:
        rows = {(row["checkpoint"], row["metric"]): row for row in csv.DictReader(stream)}
    iou = loaded["differences"]["stage 2 − stage 1"]["mean_iou"]
    found = rows["stage 2 − stage 1", "mean_iou"]
    assert [float(found[name]) for name in ("value", "low", "high")] == [iou["difference"], *iou["ci95"]]
    with open(tmp_path / "downloads" / "run-studies.csv", newline="") as stream:
        answers = {(row["id"], row["checkpoint"]): row["answer"] for row in csv.DictReader(stream)}
    assert answers == {
        (one["id"], label): one["answer"] for stage, label in zip(SHIFTS, STAGES) for one in cases(run, stage)
    }
    studies = json.loads((tmp_path / "downloads" / "run-studies.json").read_text())
    assert {
        (one["id"], label): one["answers"][place]["text"] for one in studies for place, label in enumerate(STAGES)
    } == answers
    assert len((tmp_path / "downloads" / "run-curves.csv").read_text().splitlines()) > 50


def test_a_link_opens_one_study_with_its_reference(run, page):
    one = cases(run, "rewarding")[30]
    page.open(write_report(run), "#studies=" + quote(one["id"], safe=""))
    page.until("document.getElementById('viewer').open")
    assert page.run("document.getElementById('viewer-title').textContent") == one["id"]
    assert page.run("document.querySelector('#viewer .reference').textContent") == one["truth"]
    page.click("#viewer-link")
    page.until("document.getElementById('viewer-copied').textContent.startsWith('link ')")
    page.press("ArrowRight")
    following = page.run("document.getElementById('viewer-title').textContent")
    assert page.run("decodeURIComponent(document.getElementById('viewer-link').hash)") == f"#studies={following}"


def test_a_phone_shows_results_and_rewards_and_folds_the_rest(run, page):
    page.shape(390, 844, phone=True)
    page.open(write_report(run))
    opened = "[...document.querySelectorAll('#run details, #curves details')].filter(d => d.open)"
    shown = ["Rewards", "Hacking guards (1 warning)"]
    assert page.run(opened + ".map(d => d.querySelector('summary').textContent)") == shown, "no warning is folded away"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height", "phone"), [(1280, 900, False), (390, 844, True)], ids=["desktop", "phone"])
def test_it_is_readable_in_light_and_dark_on_a_desktop_and_a_phone(run, page, dark, width, height, phone):
    page.shape(width, height, phone=phone, dark=dark)
    page.open(write_report(run))
    wide = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    for where in ("", "#studies-list .card", "#candidates-list .card"):
        if where:
            page.click(where)
            page.until("document.getElementById('viewer').open")
            body = page.run(
                "[document.getElementById('viewer').scrollWidth, document.getElementById('viewer').clientWidth]"
            )
            assert body[0] <= body[1], "an opened study is not wider than the window"
        scroll, client = page.run(wide)
        assert scroll <= client <= width
        low = {name: round(ratio, 2) for name, ratio in page.run(CONTRASTS).items() if ratio < 4.5}
        assert not low
        page.run("document.getElementById('viewer').close()")
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == dark
    touched = "[...document.querySelectorAll('.tools select, .more')].filter(e => !e.hidden)"
    heights = page.run(touched + ".map(e => e.getBoundingClientRect().height)")
    assert min(heights) >= 40, "what is touched is large enough for a finger"


def test_everything_has_a_name(run, page):
    page.open(write_report(run))
    assert page.run("[...document.images].filter(image => !image.alt.trim()).length") == 0
    for opened, least in ((False, 50), (True, 3)):  # an opened study hides what is behind it
        if opened:
            page.click("#studies-list .card")
        tree = page._say("Accessibility.getFullAXTree", on_page=True)["nodes"]
        kinds = ("button", "combobox", "checkbox", "link", "dialog", "image", "table")
        asking = [node for node in tree if node.get("role", {}).get("value") in kinds and not node["ignored"]]
        assert len(asking) > least
        assert not [node for node in asking if not node["name"]["value"].strip()]


def test_hostile_texts_are_shown_and_do_nothing(run, page, tmp_path):
    import shutil

    hostile = shutil.copytree(run, tmp_path / "run")
    for stage in SHIFTS:
        change_predictions(
            hostile, stage, lambda _n, line: line.update(answer=HOSTILE, groups={"source": HOSTILE}, question=HOSTILE)
        )
    write_log(hostile / "runs" / "tuned-llava-mistral", "instruction_tuning", [{HOSTILE: 1.0, "loss": 1.0}] * 3)
    page.open(write_report(hostile))
    page.click("#studies-list .card")
    page.until("document.getElementById('viewer').open")
    assert page.run("document.querySelector('#viewer .answer').textContent") == HOSTILE
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.querySelectorAll('#viewer b, #curves script').length") == 0


def test_500_studies_open_with_the_pictures_of_the_first_only(tmp_path, page):
    records = make_records(tmp_path / "run" / "data", 500)
    for stage in SHIFTS:
        write_evaluation(tmp_path / "run", stage, records)
    file = write_report(tmp_path / "run")
    assert file.stat().st_size < 15e6
    began = time.monotonic()
    page.open(file)
    page.until(CARDS + ".length === 24")
    seconds = time.monotonic() - began
    print(f"500 studies: {file.stat().st_size / 1e6:.1f} MB, first cards after {seconds:.2f} s")
    assert page.run("document.images.length") == 24, "the others are made when they are asked for"
