"""Diagnoses by a vision model, against a real server on loopback: what is sent, what is checked, what ends in the records."""

from __future__ import annotations

import json
import shlex
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.judge_server import Answer, Asked, judge_server
from support.pages import DOCS, blocks
from support.writer_server import (
    KEY,
    draft,
    findings_of,
    finished,
    good,
    is_asked_again,
    is_reflection,
    pictures_of,
    reply,
    text_of,
    write_data,
)

from umed_plugin import cli
from umed_plugin.data.records import load_records
from umed_plugin.data.writing.account import Account
from umed_plugin.data.writing.steps import WriterRequest
from umed_plugin.data.writing.writer import DiagnosisWriter
from umed_plugin.grounding.boxes import parse_boxes
from umed_plugin.remote.ledger import Ledger
from umed_plugin.remote.replies import Failure

pytestmark = pytest.mark.one_stack


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def build(folder: Path, server=None, *more: str, out: str = "train.json") -> int:
    address = ["--base-url", server.url] if server else []
    writer = ["--writer", "openai", "--model", "the-model", "--retries", "2", *address]
    return cli.main(
        ["recipe", "build", str(folder / "recipe.yaml"), "--out", str(folder / "out" / out), *writer, *more]
    )


def records_of(folder: Path, name: str = "train.json") -> list[dict]:
    return load_records(folder / "out" / name)


def ledger_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "train.ledger.jsonl").read_text().splitlines()]


# What is sent ----------------------------------------------------------------------------------------------------------------


@pytest.mark.llava
def test_each_image_is_written_about_and_then_reflected_on(tmp_path: Path) -> None:
    write_data(tmp_path, 6, negatives=2)
    with judge_server(good) as server:
        assert build(tmp_path, server) == 0
    records = records_of(tmp_path)
    assert [record["answer_type"] for record in records] == ["grounded"] * 6 + ["negative"] * 2
    assert [is_reflection(asked) for asked in server.asked].count(True) == 6 == len(server.asked) - 6
    for record in records[:6]:
        text = record["conversations"][1]["value"]
        (name,) = record["objects"]["ref"]
        assert len(parse_boxes(text)) == 1
        assert text.startswith("There is something abnormal") and text.endswith(f"this is a {name}.")
        assert record["conversations"][0]["value"].startswith("<image>\n")
        provenance = record["provenance"]
        assert (provenance["writer"], provenance["model"]) == ("openai", "the-model")
        assert set(provenance["prompts"]) == {"write", "reflect", "again"} and len(provenance["replies"]) == 2
        assert provenance["replies"] == [line["key"] for line in ledger_of(tmp_path) if line["record"] == record["id"]]
    assert all(record["provenance"]["writer"] == "templates-1" for record in records[6:])


@pytest.mark.llava
def test_the_frame_is_around_the_lesion_and_the_crop_shows_it(tmp_path: Path) -> None:
    write_data(tmp_path, 4)
    with judge_server(good) as server:
        assert build(tmp_path, server, "--crop") == 0
    first = [asked for asked in server.asked if not is_reflection(asked)]
    assert len(first) == 4
    for asked in first:
        whole, crop = pictures_of(asked)
        ((_, box),) = findings_of(asked)
        (told,) = parse_boxes(box)
        side = whole.shape[0]
        assert whole.shape == (512, 512, 3) == crop.shape
        red, green = whole[:, :, 0].astype(int), whole[:, :, 1].astype(int)
        rows, columns = np.nonzero(green - red > 120)
        frame = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / side
        np.testing.assert_allclose(frame, told, atol=0.02)
        inside = whole[rows.min() + 8 : rows.max() - 8, columns.min() + 8 : columns.max() - 8]
        assert np.median(inside) > 200 and np.median(crop[200:312, 200:312]) > 200
        assert (crop[:, :, 1].astype(int) - crop[:, :, 0] < 60).all()  # no frame in it


@pytest.mark.llava
def test_nothing_but_pixels_class_names_and_boxes_leaves_the_machine(tmp_path: Path) -> None:
    from support.drawn import BOX, scene, write_dicom, write_recipe

    (tmp_path / "Doe_Jane").mkdir()
    write_dicom(tmp_path / "Doe_Jane" / "c.dcm", scene(), StudyDescription="for-no-one", PatientComments="secret-8")
    (tmp_path / "a.csv").write_text(f'file,box,lesion,who\nDoe_Jane/c.dcm,"{BOX}",nod,secret-9\n')
    annotations = "{reader: csv, files: a.csv, columns: {file: file, box: box, lesion: lesion, patient: who}}"
    write_recipe(tmp_path, annotations)
    with judge_server(good) as server:
        assert build(tmp_path, server) == 0
    for asked in server.asked:
        sent = json.dumps(asked.body) + asked.path + asked.request_id
        parts = asked.body["messages"][0]["content"]
        for part in parts[1:] if not is_reflection(asked) else []:
            import base64

            sent += base64.b64decode(part["image_url"]["url"].split(",")[1]).decode("latin-1")
        for private in ("Doe", "Jane", "secret", "for-no-one", "c.dcm", "DICM", str(tmp_path), "Exif"):
            assert private not in sent, private
        assert set(asked.body) == {"model", "messages", "temperature", "max_tokens"}


@pytest.mark.llava
def test_the_key_is_in_no_file_and_no_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def telling(asked: Asked) -> Answer:
        if is_reflection(asked):
            return Answer({"error": {"message": f"Incorrect API key provided: {asked.authorization}"}}, 401)
        return reply(draft(asked) + f" {asked.authorization}")

    write_data(tmp_path, 3)
    with judge_server(telling) as server:
        assert build(tmp_path, server) == 1
    assert {asked.authorization for asked in server.asked} == {f"Bearer {KEY}"}
    printed = capfd.readouterr()
    assert "Bearer ***" in printed.out
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert "Bearer ***" in (tmp_path / "out" / "train.ledger.jsonl").read_text()
    for text in (printed.out, printed.err, *(file.read_bytes().decode("latin-1") for file in files)):
        assert KEY not in text


# What is checked -------------------------------------------------------------------------------------------------------------

WRONG = {
    "a wrong box": lambda text: text.replace("0.", "0.0", 1),
    "one box too many": lambda text: text.replace("; this", " and at [0.10, 0.10, 0.20, 0.20]; this"),
    "no box": lambda text: text.replace("[", "").replace("]", ""),
    "another class": lambda text: text.replace("nodule", "lump").replace("cyst", "nodule").replace("lump", "cyst"),
    "no class": lambda text: text.replace("nodule", "thing").replace("cyst", "thing"),
    "the name first": lambda text: "A nodule is seen. " + text if "nodule" in text else "A cyst is seen. " + text,
    "German": lambda text: (
        "In diesem Bild ist etwas nicht normal. Es liegt bei " + text.split(" at ")[1].split(",  where")[0]
    ).replace(
        "where the tissue is denser than what is around it; this is a", "und das Gewebe ist dort dichter, es ist ein"
    ),
    "too short": lambda text: (
        text.split(". ", 1)[1].split(", where")[0] + (": nodule" if "nodule" in text else ": cyst")
    ),
    "too long": lambda text: text + " The rest of the image is as it should be." * 30,
    "the frame": lambda text: text + " It is highlighted in the image.",
}


@pytest.mark.llava
@pytest.mark.parametrize("spoil", WRONG.values(), ids=list(WRONG))
def test_a_wrong_answer_is_asked_again_with_what_is_wrong(spoil, tmp_path: Path) -> None:
    def once_wrong(asked: Asked) -> Answer:
        if is_reflection(asked) and not is_asked_again(asked):
            return reply(spoil(finished(asked)))
        return good(asked)

    write_data(tmp_path, 2)
    with judge_server(once_wrong) as server:
        assert build(tmp_path, server) == 0
    again = [asked for asked in server.asked if is_asked_again(asked)]
    assert len(server.asked) == 6 and len(again) == 2
    for asked in again:
        first, wrong, told = asked.body["messages"]
        assert wrong == {"role": "assistant", "content": spoil(finished(asked)).strip()} and "\n- " in told["content"]
    assert len(records_of(tmp_path)) == 2


BAD_DRAFTS = {
    "truncated": lambda asked: reply(draft(asked), "length"),
    "refused": lambda asked: reply(None, refusal="I cannot help with that."),
    "filtered": lambda asked: reply(draft(asked), "content_filter"),
    "about something else": lambda asked: reply("The heart is enlarged at [0.1, 0.1, 0.2, 0.2]."),
}


@pytest.mark.llava
@pytest.mark.parametrize("bad", BAD_DRAFTS.values(), ids=list(BAD_DRAFTS))
def test_what_is_never_right_is_asked_three_times_and_put_aside(bad, tmp_path: Path, capsys) -> None:
    def stubborn(asked: Asked) -> Answer:
        return bad(asked) if findings_of(asked)[0][0] == "cyst" else good(asked)

    write_data(tmp_path, 3)
    with judge_server(stubborn) as server:
        assert build(tmp_path, server) == 0
        assert len(server.asked) == 2 * 2 + 3
        assert build(tmp_path, server) == 0
        assert len(server.asked) == 7
    assert [record["objects"]["ref"] for record in records_of(tmp_path)] == [["nodule"], ["nodule"]]
    (aside,) = records_of(tmp_path, "train.aside.json")
    assert aside["objects"]["ref"] == ["cyst"] and len(aside["provenance"]["replies"]) == 3 and aside["aside"]
    assert "1 records set aside" in capsys.readouterr().out


@pytest.mark.llava
def test_a_box_in_another_form_is_written_as_all_others(tmp_path: Path) -> None:
    def whole_numbers(asked: Asked) -> Answer:
        text = finished(asked) if is_reflection(asked) else draft(asked)
        (box,) = parse_boxes(text)
        return reply(
            text.replace(findings_of(asked)[0][1], "(" + ",".join(f"{value * 1000:.0f}" for value in box) + ")\n")
        )

    write_data(tmp_path, 2)
    with judge_server(whole_numbers) as server:
        assert build(tmp_path, server) == 0
    for record in records_of(tmp_path):
        assert findings_of(server.asked[0])
        assert "\n" not in record["conversations"][1]["value"] and " at [0." in record["conversations"][1]["value"]


# What is paid for ------------------------------------------------------------------------------------------------------------


@pytest.mark.llava
def test_a_second_run_asks_nothing_and_a_larger_one_only_what_is_new(tmp_path: Path) -> None:
    write_data(tmp_path, 3)
    with judge_server(good) as server:
        assert build(tmp_path, server) == 0
        before = records_of(tmp_path)
        assert build(tmp_path, server) == 0
        assert len(server.asked) == 6 and records_of(tmp_path) == before
        write_data(tmp_path, 5)
        assert build(tmp_path, server) == 0
        assert len(server.asked) == 10
    texts = [record["conversations"] for record in records_of(tmp_path)]
    assert len(texts) == 5 and texts[:3] == [record["conversations"] for record in before]


@pytest.mark.llava
def test_an_edited_prompt_is_asked_anew_and_told_in_the_records(tmp_path: Path) -> None:
    from umed_plugin.data.writing.prompts import SHIPPED

    write_data(tmp_path, 2)
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in SHIPPED.iterdir():
        (mine / file.name).write_text(file.read_text())
    with judge_server(good) as server:
        assert build(tmp_path, server, "--prompts", str(mine)) == 0
        first = records_of(tmp_path)[0]["provenance"]["prompts"]
        (mine / "reflect.txt").write_text("{findings}\n{draft}\nSay it like a pirate.")
        assert build(tmp_path, server, "--prompts", str(mine)) == 0
    assert [is_reflection(asked) for asked in server.asked[4:]] == [True, True]
    assert all("pirate" in text_of(asked) for asked in server.asked[4:])
    second = records_of(tmp_path)[0]["provenance"]["prompts"]
    assert first["reflect"] != second["reflect"] and first["write"] == second["write"]


@pytest.mark.llava
def test_images_that_are_alike_share_one_answer(tmp_path: Path) -> None:
    write_data(tmp_path, 1)
    (tmp_path / "copy.png").write_bytes((tmp_path / "0000.png").read_bytes())
    row = (tmp_path / "a.csv").read_text().splitlines()[1]
    (tmp_path / "a.csv").write_text((tmp_path / "a.csv").read_text() + row.replace("0000", "copy") + "\n")
    with judge_server(good) as server:
        assert build(tmp_path, server) == 0
    assert len(server.asked) == 2 and len(records_of(tmp_path)) == 2


@pytest.mark.llava
def test_a_server_that_sends_garbage_is_asked_the_same_again_and_the_loss_is_counted(tmp_path: Path) -> None:
    seen: set[str] = set()

    def garbage_first(asked: Asked) -> Answer:
        if asked.request_id not in seen:
            seen.add(asked.request_id)
            return Answer('{"choices": [', 200)
        return good(asked)

    write_data(tmp_path, 2)
    with judge_server(garbage_first) as server:
        assert build(tmp_path, server) == 0
    assert len(server.asked) == 8 and len(records_of(tmp_path)) == 2
    lost = [line for line in ledger_of(tmp_path) if "lost" in line]
    assert len(lost) == 4 and all(line["prompt_tokens"] > 0 for line in lost)


@pytest.mark.llava
@pytest.mark.parametrize(
    ("answer", "told", "requests"),
    [
        (Answer({"error": {"message": "no such model"}}, 404), "the server refuses: HTTP 404", 1),
        (Answer({"error": {"message": "bad"}}, 400), "10 consecutive requests failed", 10),
        (Answer("<html>gateway</html>", 200, {"Content-Type": "text/html"}), "10 consecutive requests failed", 10),
    ],
)
def test_a_server_that_only_fails_ends_the_run(answer, told, requests, tmp_path: Path, capsys) -> None:
    write_data(tmp_path, 30)
    with judge_server(lambda asked: answer) as server:
        assert build(tmp_path, server, "--concurrency", "1") == 1
        assert len(server.asked) == requests
        assert told in capsys.readouterr().out
        assert records_of(tmp_path) == []
        server.answer = good
        assert build(tmp_path, server) == 0
    assert len(records_of(tmp_path)) == 30


def test_a_run_that_has_stopped_draws_no_further_image(tmp_path: Path) -> None:
    """A wrong key ends it at the first reply; the other images are missing, and none of them is drawn and encoded."""
    drawn: list[str] = []

    def task(name: str) -> SimpleNamespace:
        request = WriterRequest(name, "write", 0, 10, 1, None, lambda: drawn.append(name) or [])
        return SimpleNamespace(record={"id": name}, next_step=lambda reply_to: request)

    def refuse(key: str, messages: object) -> Future:
        refused: Future = Future()
        refused.set_result(Failure("HTTP 401: wrong key", 401))
        return refused

    client = SimpleNamespace(ask=refuse, close=lambda: None)
    writer = DiagnosisWriter(Account(Ledger(tmp_path / "ledger.jsonl", "m")))
    outcome = writer.run([task(f"r{number}") for number in range(200)], lambda keep: client, 4)
    assert len(drawn) <= 8 and len(outcome.missing) == 200
    assert outcome.stopped == "the server refuses: HTTP 401: wrong key"


def test_an_image_that_cannot_be_drawn_ends_the_run_and_holds_up_no_other(tmp_path: Path) -> None:
    def broken() -> list:
        raise ValueError("broken image")

    request = WriterRequest("k", "write", 0, 10, 1, None, broken)
    tasks = [
        SimpleNamespace(record={"id": name}, next_step=lambda reply_to: request) for name in "ab"
    ]  # share a request
    client = SimpleNamespace(close=lambda: None)
    with pytest.raises(ValueError, match="broken image"):
        DiagnosisWriter(Account(Ledger(tmp_path / "ledger.jsonl", "m"))).run(tasks, lambda keep: client, 2)


@pytest.mark.llava
def test_the_commands_of_the_page_fit(tmp_path: Path, monkeypatch, capsys) -> None:
    """All but the reading of MAU's archives, which test_mau_page.py does: its recipe is replaced by a small one."""
    text = blocks(DOCS / "writer.md", "bash")[1]
    write_data(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    Path("mau").mkdir()
    with judge_server(good) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        for command in text.splitlines():
            if "--decisions" in command:
                Path(shlex.split(command)[-1]).write_text('{"decisions": []}')
            small = command.replace("build mau --data-root mau", "build recipe.yaml")
            assert cli.main(shlex.split(small)[1:]) == 0, capsys.readouterr()
    assert len(text.splitlines()) == 4 and len(server.asked) == 4
    assert len(load_records("mau/built/mau.json")) == 2 and Path("mau/built/mau.review.html").is_file()


# Flags -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "m"], "--model: no effect without --writer openai"),
        (["--writer", "openai"], "needs --model"),
        (["--writer", "openai", "--model", "m", "--base-url", "http://me:pw@h/v1"], "user name or password"),
        (["--writer", "openai", "--model", "m", "--budget", "5usd"], "--budget in usd needs --prices"),
        (["--writer", "openai", "--model", "m", "--budget", "5 euros"], "5000requests, 2000000tokens or 20usd"),
        (["--writer", "openai", "--model", "m", "--prices", "5"], "two numbers"),
        (["--writer", "openai", "--model", "m", "--answer-words", "9:3"], "such as 15:150"),
        (["--writer", "openai", "--model", "m", "--concurrency", "0"], "must be at least 1"),
        (
            ["--writer", "openai", "--model", "m", "--request-options", '{"model": "x"}'],
            "must not set `model`; the plugin sets it",
        ),
        (["--writer", "openai", "--model", "m", "--request-options", "7"], "must be a JSON object"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_read(flags, told, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "t.json")
    assert cli.main(["recipe", "build", "demo_studies", "--data-root", str(tmp_path), "--out", out, *flags]) == 2
    assert told in capsys.readouterr().err


def test_prompts_are_checked(tmp_path: Path, capsys) -> None:
    write_data(tmp_path, 1)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "write.txt").write_text("Look. {finding}")
    (mine / "reflect.txt").write_text("{findings}")
    assert build(tmp_path, None, "--prompts", str(mine)) == 1
    told = capsys.readouterr().err
    assert "unknown placeholder 'finding'. Did you mean 'findings'" in told and "reflect.txt: has no {draft}" in told
    assert "again.txt: cannot be read" in told and "write.txt: has no {findings}" in told


def test_without_a_key_or_a_server_nothing_is_sent(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    write_data(tmp_path, 1)
    assert build(tmp_path) == 2
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err


# Text in the pixels ----------------------------------------------------------------------------------------------------------


def write_text(file: Path, text: str, size: int = 20, place: tuple[int, int] = (10, 10)) -> None:
    """Burn a line into a picture of 400 x 300."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.open(file).resize((400, 300))
    ground = Image.new("L", (400, 34), 20)
    font = ImageFont.load_default(size) if "size" in ImageFont.load_default.__code__.co_varnames else None
    ImageDraw.Draw(ground).text((4, 4), text, fill=250, font=font)
    image.paste(ground, place)
    image.save(file)


def burnt_in_data(folder: Path) -> None:
    """Four images of 400 x 300, the second with a name in it, and a DICOM file whose header warns."""
    from support.drawn import BOX, scene, write_dicom, write_png, write_recipe

    rows = ["file,x1,y1,x2,y2,lesion"]
    for i in range(4):
        noise = np.random.default_rng(i).uniform(0, 0.2, (300, 400))
        noise[100:180, 120:220] = 0.7
        write_png(folder / f"{i}.png", noise)
        rows.append(f"{i}.png,120,100,220,180,nod")
    write_text(folder / "1.png", "DOE^JANE 12.03.1961")
    write_dicom(folder / "c.dcm", scene(), BurnedInAnnotation="YES")
    other = scene()
    other[:2, :2] = 0.5  # images with the same pixels would share a request
    write_dicom(folder / "d.dcm", other, BurnedInAnnotation="NO")
    rows += [f"{name}.dcm,{','.join(map(str, BOX))},nod" for name in "cd"]
    (folder / "a.csv").write_text("\n".join(rows) + "\n")
    write_recipe(folder, "{reader: csv, files: a.csv, columns: {file: file, box: [x1, y1, x2, y2], lesion: lesion}}")


def written_about(server) -> int:
    """First requests; pictures with the same box and draft share their second one."""
    return sum(not is_reflection(asked) for asked in server.asked)


@pytest.mark.llava
def test_images_with_text_burnt_in_are_listed_and_not_sent(tmp_path: Path, capsys) -> None:
    burnt_in_data(tmp_path)
    suspects = tmp_path / "out" / "train.burnt_in.txt"
    with judge_server(good) as server:
        assert build(tmp_path, server) == 0
        warned = capsys.readouterr().err
        assert "warning: 2 images may have text burnt into their pixels" in warned and "are left out" in warned
        names = [record["id"] for record in records_of(tmp_path)]
        assert names == ["drawn/0.png", "drawn/2.png", "drawn/3.png", "drawn/d.dcm"] and written_about(server) == 4
        listed = [line for line in suspects.read_text().splitlines() if not line.startswith("#")]
        assert listed[0].startswith("drawn/1.png\t# what looks like a line of text at x ")
        assert listed[1] == "drawn/c.dcm\t# its DICOM header says BurnedInAnnotation YES"

        # The person has looked: the DICOM is harmless, the name is not.
        suspects.write_text("\n".join(listed[:1]) + "\n")
        assert build(tmp_path, server, "--burnt-in", "send", "--leave-out", str(suspects)) == 0
        warned = capsys.readouterr().err
        assert written_about(server) == 5 and "1 images may have text" in warned and "are sent because of" in warned
        assert [record["id"] for record in records_of(tmp_path)] == [*names[:3], "drawn/c.dcm", names[3]]
        assert suspects.read_text() == listed[0] + "\n"

        assert build(tmp_path, server, "--leave-out", str(suspects)) == 0
        assert {line.split("\t")[0] for line in suspects.read_text().splitlines()[2:]} == {"drawn/1.png", "drawn/c.dcm"}


@pytest.mark.llava
def test_a_list_of_what_is_never_sent(tmp_path: Path, capsys) -> None:
    write_data(tmp_path, 3)
    (tmp_path / "private.txt").write_text("# mine\ndrawn/0001.png\n\ndrawn/0009.png\n")
    with judge_server(good) as server:
        assert build(tmp_path, server, "--leave-out", str(tmp_path / "private.txt")) == 0
    assert [record["id"] for record in records_of(tmp_path)] == ["drawn/0000.png", "drawn/0002.png"]
    assert len(server.asked) == 4 and "drawn/0009.png" in (printed := capsys.readouterr()).err
    assert "1 images are on the list" in printed.out
    assert build(tmp_path, None, "--base-url", "http://127.0.0.1:9/v1", "--leave-out", str(tmp_path / "gone.txt")) == 1
    assert "gone.txt: cannot be read" in capsys.readouterr().err


def test_text_is_found_on_real_images_and_seldom_where_there_is_none(real_data: Path) -> None:
    """Looked at: these have a date, a window and a name of a site in them; of the brain slices none has text."""
    from PIL import Image

    from umed_plugin.data.writing.burnt_in import text_lines

    with_text = [
        "kvasir_seg/images/cju0qkwl35piu0993l0dewei2.jpg",
        "vqa_rad/synpic32933.jpg",
        "vqa_rad/synpic42202.jpg",
    ]
    for name in with_text:
        assert text_lines(Image.open(real_data / name)), name
    slices = sorted((real_data / "brain_tumor_coco").glob("*/*.jpg"))[::4]
    false = [file.name for file in slices if text_lines(Image.open(file))]
    assert len(slices) > 40 and len(false) <= 0.06 * len(slices), false
