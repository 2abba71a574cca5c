"""The chat page's server over real connections: answers, pictures, heat maps, and the queue of questions."""

from __future__ import annotations

import io
import re
import threading
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.chat_client import VIEW, Client, chat_server, until
from support.drawn import scene, write_png
from support.speaking import BOX01, SENTENCE

from umed_plugin.commands.serve.dialogue import Dialogue
from umed_plugin.commands.serve.line import Line
from umed_plugin.commands.serve.page_files import page_html
from umed_plugin.data.images import load_image


def test_from_a_file_to_boxes_and_a_heat_map(client: Client, dicom: Path) -> None:
    study, held = client.upload(dicom)
    assert held["items"][0]["windows"][:2] == ["file", "full"]
    status, data = client.picture(study, window="lung")
    assert status == 200
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(shown - load_image(dicom, window="lung")[0]).mean() < 3, "equal up to JPEG compression"

    *progress, last = client.question(study)
    assert progress[0] == {"waiting": 0}
    texts = [line["text"] for line in progress[1:]]
    assert texts == sorted(texts, key=len) and len(texts) > 20, "the text grows token by token"
    answer = last["answer"]
    assert answer["text"] == SENTENCE and answer["size"] == [97, 61]
    assert answer["cut"] is None
    # 97 x 61 in a square of 97: 18 rows above, and as many below, into which the box reaches.
    x1, y1, x2, y2 = (97 * value for value in BOX01)
    assert answer["boxes"] == [pytest.approx([x1, y1 - 18, x2, 61])] and y2 - 18 > 61

    *_, last = client.attention(study, answer["number"])
    words = last["attention"]["words"]
    assert words[0]["text"] == "nodule" and words[0]["is_name"]
    assert last["attention"]["place"] == pytest.approx([0, -18, 97, 79])


def test_earlier_turns_go_along(client: Client, dicom: Path) -> None:
    study, _ = client.upload(dicom)
    first = client.question(study, "What is it?")[-1]["answer"]
    second = client.question(study, "Where?", turns=[["What is it?", first["text"]]])[-1]
    assert second["answer"]["number"] == 2 and second["answer"]["forgotten"] == 0


def test_two_pages_do_not_mix(client: Client, dicom: Path, tmp_path: Path) -> None:
    first, _ = client.upload(dicom)
    second, held = client.upload(write_png(tmp_path / "b.png", scene(width=50, height=50, box=(1, 1, 9, 9))))
    assert held["items"][0]["label"] == "b.png"
    number = client.question(first)[-1]["answer"]["number"]
    status, said, _ = client.ask("POST", f"/studies/{second}/answers/{number}/attention", b"{}")
    assert status == 422 and "not kept" in said["error"]
    assert client.question(second)[-1]["answer"]["size"] == [50, 50]
    assert client.picture(first)[1] != client.picture(second)[1]


def test_many_pages_at_once(client: Client, tmp_path: Path) -> None:
    """Eight pages upload and ask at the same time; each gets the answer about its own picture."""
    sizes: dict[int, Any] = {}

    def visit(number: int) -> None:
        width = 40 + number
        study, _ = client.upload(write_png(tmp_path / f"{number}.png", scene(width=width, box=(1, 1, 9, 9))))
        sizes[number] = client.question(study)[-1]["answer"]["size"]

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == {number: [40 + number, 61] for number in range(8)}


def test_questions_at_once_are_answered_as_alone(tiny_mistral: Path, dicom: Path, tmp_path: Path) -> None:
    """Two clients ask at the same time, each about its own picture, and then once more."""
    files = (dicom, write_png(tmp_path / "b.png", scene(width=50, height=50, box=(1, 1, 9, 9))))
    asked = [(file, question) for question in ("What is it?", "Where does it lie?") for file in files]
    with chat_server(attentive(tiny_mistral)) as server:
        alone = {(file, question): answer_of(Client(server), file, question) for file, question in asked}
    assert len(set(alone.values())) == len(asked), "they differ by picture and by question"
    together: dict[Any, str] = {}
    start = threading.Barrier(len(files))

    def visit(file: Path) -> None:
        client = Client(server)
        study, _ = client.upload(file)
        for question in [question for named, question in asked if named == file]:
            start.wait(30)
            together[file, question] = client.question(study, question)[-1]["answer"]["text"]

    with chat_server(attentive(tiny_mistral)) as server:
        threads = [threading.Thread(target=visit, args=(file,)) for file in files]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert together == alone


def attentive(checkpoint: Path) -> Dialogue:
    """A checkpoint with random weights whose layers say more, so that what it answers depends on all of its prompt."""
    dialogue = Dialogue(checkpoint, most_tokens=12)
    for layer in dialogue.llava.get_model().layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.o_proj):
            part.weight.data *= 10
    return dialogue


def answer_of(client: Client, file: Path, question: str) -> str:
    study, _ = client.upload(file)
    return str(client.question(study, question)[-1]["answer"]["text"])


def test_the_page_loads_nothing_from_elsewhere_and_takes_names_as_text(client: Client) -> None:
    status, page, headers = client.ask("GET", "/")
    assert status == 200 and b"tiny-&lt;b&gt;llava" in page
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
    for path, kind in (("/page.js", "text/javascript"), ("/page.css", "text/css")):
        status, content, headers = client.ask("GET", path)
        assert status == 200 and headers["Content-Type"].startswith(kind)
        page += content
    assert set(re.findall(rb"https?://[^\s\"'`]+", page)) == {b"http://www.w3.org/2000/svg"}


def test_a_page_needs_all_that_it_shows() -> None:
    with pytest.raises(Exception, match="is undefined"):
        page_html({"checkpoints": ["c"]})


def test_a_window_by_hand_and_the_range_of_a_named_one(client: Client, dicom: Path) -> None:
    study, _ = client.upload(dicom)
    assert client.window(study) == (200, {"low": -1000.0, "high": 999.0})
    assert client.window(study, window="lung") == (200, {"low": -1350.0, "high": 150.0})
    status, data = client.picture(study, window="-200,300.5")
    assert status == 200
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(shown - load_image(dicom, window=(-200, 300.5))[0]).mean() < 3
    for wrong, why in (("300,300", "below the upper"), ("1e3,2e3", "no such window"), ("1,2,3", "no such window")):
        status, said = client.picture(study, window=wrong)
        assert status == 422 and why in said["error"] and "a.dcm" in said["error"]


def test_two_checkpoints_are_asked_one_by_one(dialogue: Dialogue, client: Client, dicom: Path) -> None:
    study, _ = client.upload(dicom)
    status, said, _ = client.ask("POST", f"/studies/{study}/questions", {**VIEW, "question": "What?", "model": 1})
    assert status == 400 and "This server has 1." in said["error"]
    with chat_server(dialogue, dialogue) as both:
        asked = Client(both)
        study, _ = asked.upload(dicom)
        answers = [asked.question(study, model=model)[-1]["answer"] for model in (0, 1)]
        assert [answer["number"] for answer in answers] == [1, 2] and answers[0]["text"] == answers[1]["text"]
        assert asked.attention(study, 2)[-1]["attention"]["sinks"] is None
        masked = asked.attention(study, 2, mask_sinks=True)[-1]["attention"]
        assert masked["sinks"] == 0, "a hidden value is at most the root of the model's width times their RMS"


# The queue.


def test_the_line_is_served_in_order_and_told() -> None:
    line, served, heard = Line(), [], {}

    def stand(number: int) -> None:
        with line.turn(heard.setdefault(number, []).append):
            served.append(number)
            # The next one may be served when all behind have heard how many are before them.
            until(lambda: all(heard[behind][-1] == behind - number for behind in range(number + 1, 4)))

    threads = [threading.Thread(target=stand, args=(number,)) for number in range(4)]
    with line.turn(lambda before: None):  # until all stand in line, one behind the other
        for number, thread in enumerate(threads):
            thread.start()
            until(lambda number=number: heard.get(number, [])[-1:] == [number + 1])
            assert len(line._tickets) == number + 2
    for thread in threads:
        thread.join()
    assert served == [0, 1, 2, 3]
    # A number is told again after a second.
    told = {number: [before for before, _ in groupby(numbers)] for number, numbers in heard.items()}
    assert told == {0: [1], 1: [2, 1], 2: [3, 2, 1], 3: [4, 3, 2, 1]}


def test_who_leaves_the_line_lets_the_others_on() -> None:
    line, entered = Line(), []

    def gone(before: int) -> None:
        raise BrokenPipeError

    with line.turn(entered.append):
        with pytest.raises(BrokenPipeError), line.turn(gone):
            entered.append("never")
        assert len(line._tickets) == 1
    with line.turn(entered.append):
        entered.append("next")
    assert entered == ["next"]


def test_a_second_question_waits_and_is_told(server: Any, client: Client, dicom: Path) -> None:
    study, _ = client.upload(dicom)
    with ExitStack() as held:
        held.enter_context(server.line.turn(lambda before: None))
        with client.listening(study) as lines:
            assert next(lines) == {"waiting": 1}
            held.close()
            assert "answer" in list(lines)[-1]


def test_a_browser_that_goes_away_stops_its_answer(server: Any, client: Client, dicom: Path) -> None:
    study, _ = client.upload(dicom)
    with server.line.turn(lambda before: None):
        with client.listening(study) as lines:
            assert next(lines) == {"waiting": 1}
        until(lambda: len(server.line._tickets) == 1)
    assert client.question(study)[-1]["answer"]["text"] == SENTENCE
