"""The review page in a real browser, and what its decisions do to the records."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path

import pytest
from support.browser import Page
from support.drawn import write_noise_recipe
from support.judge_server import Asked, judge_server
from support.pages import DOCS, blocks
from support.writer_server import KEY, draft, findings_of, finished, is_reflection, reply, write_data

from umed_plugin import cli
from umed_plugin.data.records import load_records, record_geometry

pytestmark = [pytest.mark.llava, pytest.mark.one_stack]  # images are read through MONAI, which needs torch


@pytest.fixture
def built(tmp_path: Path, monkeypatch) -> Path:
    """Six records of two classes, of which two could not be written: cysts get a text with a box too many."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def model(asked: Asked):
        cyst = findings_of(asked)[0][0] == "cyst"
        text = finished(asked) if is_reflection(asked) else draft(asked)
        return reply(
            text + (" Another <b>area</b> lies at [0.01, 0.01, 0.02, 0.02]." if cyst and is_reflection(asked) else "")
        )

    write_data(tmp_path, 6, negatives=1)
    with judge_server(model) as server:
        assert cli.main(build_command(tmp_path, "--base-url", server.url)) == 0
    return tmp_path


def build_command(folder: Path, *more: str) -> list[str]:
    out = str(folder / "out" / "train.json")
    return ["recipe", "build", str(folder / "recipe.yaml"), "--out", out, "--writer", "openai", "--model", "m", *more]


def rebuild(folder: Path, *decisions: Path) -> int:
    """All replies are there: no server is needed."""
    return cli.main(build_command(folder, "--base-url", "http://127.0.0.1:9/v1", "--decisions", *map(str, decisions)))


def review(folder: Path, *more: str) -> Path:
    assert cli.main(["recipe", "review", str(folder / "out" / "train.json"), *more]) == 0
    return folder / "out" / "train.review.html"


def decisions_file(folder: Path, *made: dict, name: str = "d.json", reviewer: str = "A") -> Path:
    file = folder / name
    file.write_text(json.dumps({"reviewer": reviewer, "decisions": list(made)}))
    return file


def shown(page: Path) -> dict[str, dict]:
    """The page's own list of cards: id to digest, text and boxes."""
    listed = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL).group(
        1
    )
    return {card["id"]: card for card in json.loads(listed)["cards"]}


def decision(card: dict, kind: str, text: str = "") -> dict:
    return {"id": card["id"], "shown": card["shown"], "decision": kind, "text": text, "note": ""}


def test_a_reviewer_clicks_through_the_page_and_the_build_takes_it(built: Path, tmp_path: Path, capsys) -> None:
    file = review(built)
    cards = shown(file)
    names = list(cards)
    assert [cards[name]["aside"] for name in names] == [True, True, False, False, False, False, False]
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    page = Page(tmp_path / "profile", downloads)
    try:
        page.open(file)
        assert page.run("document.querySelectorAll('article').length") == 7
        page.until("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert page.run("document.querySelector('b') === null")  # the model's words are text, not HTML
        frame = page.run("(() => { const r = document.querySelector('rect.line').getBoundingClientRect(),"
                         " p = document.querySelector('img').getBoundingClientRect();"
                         " return [(r.left - p.left) / p.width, (r.top - p.top) / p.height]; })()")  # fmt: skip
        box = json.loads(cards[names[0]]["lesions"][0]["box"])
        assert frame == pytest.approx(box[:2], abs=0.02)

        assert page.run("document.querySelector('#card-0 .do-accept').disabled")
        assert "not one of the image's" in page.run("document.querySelector('#card-0 .wrong').textContent")
        mended = cards[names[0]]["text"].split(" Another")[0]
        page.type_into("#card-0 textarea", mended, instead=True)
        page.click("#card-0 .do-accept")
        page.click("#card-1 .do-reject")
        page.click("#card-2 .do-accept")
        page.type_into("#card-3 textarea", " Nothing else is seen.")
        page.click("#card-3 .do-accept")
        page.click("#card-4 .do-reject")
        page.click("#card-5 .do-accept")
        page.click("#card-5 .do-undo")
        page.type_into("#reviewer", "Dr. A")
        counts = "document.getElementById('counts').textContent"
        assert page.run(counts) == "1 accepted, 2 edited, 2 rejected, 2 left"
        page.screenshot(built / "review.png")

        page.open(file)  # a closed tab loses nothing
        assert page.run(counts) == "1 accepted, 2 edited, 2 rejected, 2 left"
        page.click("#download")
        ended = time.monotonic() + 60
        while not (found := list(downloads.glob("*.json"))):
            assert time.monotonic() < ended
            time.sleep(0.05)
        outside = [
            event["params"]["request"]["url"] for event in page.events if event["method"] == "Network.requestWillBeSent"
        ]
        assert {url.split(":")[0] for url in outside} <= {"file", "data", "blob"}
        errors = [event for event in page.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        assert not errors
    finally:
        page.close()

    assert found[0].name == "train.review.Dr_A.decisions.json"
    capsys.readouterr()
    assert rebuild(built, found[0]) == 0
    assert "reviewed: 1 accepted, 2 edited, 2 rejected" in capsys.readouterr().out
    texts = {record["id"]: record["conversations"][1]["value"] for record in load_records(built / "out" / "train.json")}
    assert set(texts) == {names[0], *names[2:4], *names[5:]}
    assert texts[names[0]] == mended and texts[names[3]].endswith("Nothing else is seen.")
    assert not (built / "out" / "train.aside.json").exists()


def test_boxes_are_moved_by_mouse_and_keys_and_the_build_takes_them(built: Path, tmp_path: Path) -> None:
    file = review(built)
    card = next(card for card in shown(file).values() if not card["aside"] and card["lesions"])
    place, box = list(shown(file)).index(card["id"]), card["lesions"][0]["box"]
    (tmp_path / "downloads").mkdir()
    page = Page(tmp_path / "profile", tmp_path / "downloads")
    try:
        page.open(file)
        own = f"#card-{place} "
        assert page.run(f"document.querySelector('{own}.box text').textContent") == "1"
        page.click(f"{own}.do-accept")
        page.run(f"document.querySelector('{own}.box').focus()")
        page.press("ArrowRight", times=3)
        page.press("ArrowDown", shift=True)
        x1, y1, x2, y2 = json.loads(box)
        moved = [round(x1 + 0.03, 2), y1, round(x2 + 0.03, 2), round(y2 + 0.01, 2)]
        listed = f"document.querySelector('{own}.lesions code').textContent"
        assert json.loads(page.run(listed)) == pytest.approx(moved)
        assert page.run(listed) in page.run(f"document.querySelector('{own}textarea').value")
        assert page.run(f"document.querySelector('{own}.do-undo').disabled"), "the decision was about another box"
        page.drag(f"{own}.box .corner.se", -6, 0)
        now = json.loads(page.run(listed))
        assert now[:2] == pytest.approx(moved[:2]) and now[2] < moved[2]
        page.drag(f"{own}.box .line", 500, 0)
        at_edge = json.loads(page.run(listed))
        assert at_edge[2] == 1 and at_edge[2] - at_edge[0] == pytest.approx(now[2] - now[0]), "kept whole at the edge"
        page.click(f"{own}.do-back")
        assert page.run(listed) == box
        page.drag(f"{own}.box .line", 20, 8)
        final = page.run(listed)
        page.click(f"{own}.do-accept")
        assert page.run(f"document.querySelector('{own}.state').textContent") == "accepted with your changes"
        page.open(file)  # a closed tab loses nothing
        assert page.run(listed) == final
        page.click("#download")
        ended = time.monotonic() + 60
        while not (found := list((tmp_path / "downloads").glob("*.json"))):
            assert time.monotonic() < ended
            time.sleep(0.05)
    finally:
        page.close()
    before = {record["id"]: record for record in load_records(built / "out" / "train.json")}[card["id"]]
    assert rebuild(built, found[0]) == 0
    record = {record["id"]: record for record in load_records(built / "out" / "train.json")}[card["id"]]
    assert final in record["conversations"][1]["value"] and box not in record["conversations"][1]["value"]
    assert record["provenance"]["review"]["boxes_moved"] == 1
    assert record["objects"]["ref"] == before["objects"]["ref"]
    (found_box,) = record_geometry(record).to_square(record["objects"]["bbox"])
    assert found_box == pytest.approx(json.loads(final), abs=0.006)


def test_keys_go_on_decide_and_take_back(built: Path, tmp_path: Path) -> None:
    page = Page(tmp_path / "profile", tmp_path)
    try:
        page.open(review(built))
        current, counts = "document.querySelector('.current').id", "document.getElementById('counts').textContent"
        page.press("j", times=3)
        assert page.run(current) == "card-2"
        page.press("k")
        page.press("a")  # its text has a box too many: nothing happens
        assert page.run(current) == "card-1" and page.run(counts).startswith("0 accepted")
        page.press("r")
        assert page.run(current) == "card-2"
        page.press("a")
        assert page.run(counts) == "1 accepted, 0 edited, 1 rejected, 5 left" and page.run(current) == "card-3"
        assert page.run("document.getElementById('progress').value") == 2
        page.press("k")
        page.press("u")
        assert page.run(counts).startswith("0 accepted")
        page.press("e")
        page._say("Input.insertText", on_page=True, text="ajrk")
        assert page.run(counts).startswith("0 accepted"), "in a text these are letters"
        page.press("Escape")
        assert page.run("document.activeElement.id") == "card-2"
    finally:
        page.close()


def test_a_settled_disagreement_counts_instead_of_the_reviewers(built: Path, capsys) -> None:
    cards = [card for card in shown(review(built)).values() if not card["aside"]]
    one = decisions_file(built, *(decision(card, "accept") for card in cards), name="1.json")
    two = decisions_file(
        built,
        decision(cards[0], "reject"),
        *(decision(card, "accept") for card in cards[1:]),
        name="2.json",
        reviewer="B",
    )
    names = {
        "mau.review.A.decisions.json": one,
        "mau.review.B.decisions.json": two,
        "mau/built/mau.json": built / "out" / "train.json",
    }
    for command in blocks(DOCS / "writer.md", "bash")[-1].splitlines():
        for name, file in names.items():
            command = command.replace(name, str(file))
        assert cli.main(shlex.split(command)[1:]) == 0, command
    assert f"  {cards[0]['id']}: A accept; B reject" in capsys.readouterr().out
    page = built / "out" / "train.disagreements.html"
    assert list(shown(page)) == [cards[0]["id"]]
    assert "<b>A</b>: accept" in page.read_text() and "<b>B</b>: reject" in page.read_text()
    settled = built / "settled.json"
    settled.write_text(json.dumps({"reviewer": "C", "settles": True, "decisions": [decision(cards[0], "accept")]}))
    capsys.readouterr()
    assert rebuild(built, one, two, settled) == 0
    printed = capsys.readouterr().out
    assert cards[0]["id"] in {record["id"] for record in load_records(built / "out" / "train.json")}
    assert "Cohen's kappa of A and B: 0.00" in printed and "they disagree on 1 texts" in printed
    assert cli.main(["recipe", "review", str(built / "out" / "train.json"), "--disagreements", str(one), str(one)]) == 1
    assert "only A is in these files" in capsys.readouterr().err


def test_a_box_that_is_none_is_told(built: Path, capsys) -> None:
    card = next(card for card in shown(review(built)).values() if not card["aside"])
    for boxes, why in (
        ([[0.5, 0.1, 0.2, 0.3]], "has the box [0.5"),
        ([[0, 0, 1, 1]] * 2, "has 1 boxes, not 2"),
        ("x", "of type str"),
    ):
        file = decisions_file(built, {**decision(card, "edit", card["text"]), "boxes": boxes})
        assert rebuild(built, file) == 1
        assert why in capsys.readouterr().err


def test_pages_hold_only_so_many_and_a_sample_is_drawn(built: Path, monkeypatch, capsys) -> None:
    assert len(shown(review(built, "--sample", "2"))) == 4  # two aside and two others
    assert "4 of 7 records on one page" in capsys.readouterr().out
    assert "<h1>Review of train</h1>" in (built / "out/train.review.html").read_text()
    assert list(shown(review(built, "--sample", "2"))) == list(shown(review(built, "--sample", "2")))
    monkeypatch.setattr("umed_plugin.commands.recipe.review_page.PAGE_RECORDS", 3)
    review(built)
    pages = sorted(file.name for file in (built / "out").glob("*.html"))
    assert pages == ["train.review-2.html", "train.review-3.html", "train.review.html"]
    assert "7 of 7 records on 3 pages" in capsys.readouterr().out
    assert "<h1>Review of train, page 2 of 3</h1>" in (built / "out/train.review-2.html").read_text()


def test_one_rejection_is_enough_and_an_edit_goes_before_acceptance(built: Path) -> None:
    cards = [card for card in shown(review(built)).values() if not card["aside"]]
    edited = cards[1]["text"] + " It is small."
    one = decisions_file(built, decision(cards[0], "accept"), decision(cards[1], "accept"), name="1.json")
    two = decisions_file(
        built, decision(cards[0], "reject"), decision(cards[1], "edit", edited), name="2.json", reviewer="B"
    )
    assert rebuild(built, one, two) == 0
    records = {record["id"]: record for record in load_records(built / "out" / "train.json")}
    assert cards[0]["id"] not in records
    assert records[cards[1]["id"]]["conversations"][1]["value"] == edited
    assert records[cards[1]["id"]]["provenance"]["review"] == {"decision": "edit", "reviewers": ["A", "B"]}


def test_decisions_that_cannot_be_used_are_told(built: Path, capsys) -> None:
    cards = [card for card in shown(review(built)).values() if not card["aside"]]
    before = (built / "out" / "train.json").read_bytes()
    text = cards[0]["text"]
    wrong_box = decisions_file(built, decision(cards[0], "edit", text.replace("[0.", "[0.0")), name="box.json")
    one = decisions_file(built, decision(cards[1], "edit", cards[1]["text"] + " One."), name="one.json")
    two = decisions_file(built, decision(cards[1], "edit", cards[1]["text"] + " Two."), name="two.json")
    assert rebuild(built, wrong_box, one, two) == 1
    told = capsys.readouterr().err
    assert "box.json: the text for record" in told and "is missing" in told
    assert "was edited in different ways in" in told and "one.json" in told and "two.json" in told
    assert (built / "out" / "train.json").read_bytes() == before

    (built / "no.json").write_text("{")
    bad = decisions_file(
        built, {"id": 7}, {**decision(cards[0], "maybe")}, {**decision(cards[0], "edit", " ")}, name="bad.json"
    )
    assert rebuild(built, built / "no.json", built / "gone.json", bad) == 1
    told = capsys.readouterr().err
    for words in ("no.json: is not JSON", "gone.json: cannot be read", "decisions[0] has no text under 'id'"):
        assert words in told
    assert "the decision 'maybe'; allowed: accept, edit, reject" in told and "is an edit without text" in told


def test_decisions_about_an_older_text_are_counted_and_not_used(built: Path, capsys) -> None:
    card = next(card for card in shown(review(built)).values() if not card["aside"])
    old = decisions_file(
        built, {**decision(card, "reject"), "shown": "0123"}, {**decision(card, "reject"), "id": "x/y"}
    )
    capsys.readouterr()
    assert rebuild(built, old) == 0
    printed = capsys.readouterr().out
    assert "1 decisions are about a text that has changed since" in printed and "1 decisions name no record" in printed
    assert card["id"] in {record["id"] for record in load_records(built / "out" / "train.json")}


def test_records_of_the_templates_can_be_reviewed_too(tmp_path: Path) -> None:
    write_data(tmp_path, 2)
    command = ["recipe", "build", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out" / "train.json")]
    assert cli.main(command) == 0
    first, second = shown(review(tmp_path)).values()
    assert cli.main([*command, "--decisions", str(decisions_file(tmp_path, decision(first, "reject")))]) == 0
    assert [record["id"] for record in load_records(tmp_path / "out" / "train.json")] == [second["id"]]


def test_probes_are_not_reviewed_and_are_made_of_the_studies_that_remain(tmp_path: Path) -> None:
    studies = [(("cyst", "nodule")[number % 2], (5, 5, 35, 40)) for number in range(8)]
    recipe = write_noise_recipe(tmp_path, studies, side=100, extra="probes: {share: 1, kinds: [removed_option]}")
    out = tmp_path / "out" / "train.json"
    command = ["recipe", "build", str(recipe), "--out", str(out), "--split", "train"]
    assert cli.main(command) == 0
    built = load_records(out)
    assert [record["answer_type"] for record in built] == ["grounded"] * 8 + ["probe"] * 8
    cards = list(shown(review(tmp_path)).values())
    assert [card["id"] for card in cards] == [record["id"] for record in built[:8]]
    accepted = decisions_file(tmp_path, *(decision(card, "accept") for card in cards))
    assert cli.main([*command, "--decisions", str(accepted)]) == 0
    reviewed = load_records(out)
    assert len(reviewed) == 16 and all("review" in record["provenance"] for record in reviewed[:8])
    assert reviewed[8:] == built[8:], "a probe is no diagnosis, and nobody accepted it"
    rejected = decisions_file(tmp_path, *(decision(card, "reject") for card in cards[:4]))
    assert cli.main([*command, "--decisions", str(rejected)]) == 0
    left = load_records(out)
    kept = {record["image"] for record in left if record["answer_type"] == "grounded"}
    probes = [record for record in left if record["answer_type"] == "probe"]
    assert len(kept) == len(probes) == 4 and {record["image"] for record in probes} <= kept
