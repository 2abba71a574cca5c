"""The chat page's server over real connections: its responses, the requests that it refuses, and its robustness."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.chat_client import VIEW, Client, chat_server
from support.drawn import scene, write_dicom, write_png
from support.speaking import BOX01, SENTENCE, teach
from support.umed_runs import environment

from umed_plugin import cli
from umed_plugin.commands.serve import shelf, uploads
from umed_plugin.commands.serve.access import refusal
from umed_plugin.commands.serve.dialogue import Dialogue
from umed_plugin.commands.serve.handler import page_html
from umed_plugin.commands.serve.line import Line
from umed_plugin.data.images import load_image
from umed_plugin.remote.settings import is_loopback


@pytest.fixture(scope="module")
def speaking(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teach(tiny_mistral, tmp_path_factory.mktemp("taught"))


@pytest.fixture(scope="module")
def dialogue(speaking: Path) -> Dialogue:
    return Dialogue(speaking, most_tokens=60)


@pytest.fixture
def server(dialogue: Dialogue) -> Any:
    with chat_server(dialogue) as running:
        yield running


@pytest.fixture
def client(server: Any) -> Client:
    return Client(server)


@pytest.fixture
def dicom(tmp_path: Path) -> Path:
    return write_dicom(tmp_path / "a.dcm", scene(), WindowCenter=0, WindowWidth=2000)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met within 20 s"
        time.sleep(0.05)


# Requests that succeed.


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
    # 97 x 61 in a square of 97: 18 rows above.
    x1, y1, x2, y2 = (97 * value for value in BOX01)
    assert answer["boxes"] == [pytest.approx([x1, y1 - 18, x2, y2 - 18])]

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


def test_images_are_removed_when_the_page_says_so_and_the_oldest_give_way(
    server: Any, client: Client, dicom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "MOST_STUDIES_OF_ONE", 2)
    studies = [client.upload(dicom)[0] for _ in range(3)]
    assert sorted(folder.name for folder in server.shelf.folder.iterdir()) == sorted(studies[1:])
    assert client.picture(studies[0])[0] == 404
    assert client.ask("POST", f"/studies/{studies[1]}/forget", b"")[0] == 200
    assert [folder.name for folder in server.shelf.folder.iterdir()] == [studies[2]]
    client.question(studies[2])
    assert client.ask("POST", f"/studies/{studies[2]}/forget", b"")[0] == 200
    until(lambda: not [key for key in list(server.dialogues[0]._features) if key[0] == studies[2]])
    assert server.shelf.folder.stat().st_mode & 0o077 == 0, "readable by this user only"


def cookie_of(client: Client) -> str:
    headers = client.ask("GET", "/")[2]
    assert "HttpOnly" in headers["Set-Cookie"] and "SameSite=Strict" in headers["Set-Cookie"]
    return headers["Set-Cookie"].partition(";")[0]


def test_browsers_do_not_reach_each_others_studies(client: Client, dicom: Path) -> None:
    first, second = cookie_of(client), cookie_of(client)
    assert first != second and "Set-Cookie" not in client.ask("GET", "/", Cookie=first)[2]
    study = client.ask("POST", "/studies", b"", Cookie=first)[1]["study"]
    for other in (second, "umed-serve=guessed", "umed-serve=" + "a" * 30, None):
        headers = {"Cookie": other} if other else {}
        for method, path in (("PUT", "files?name=a"), ("POST", "open"), ("POST", "questions"), ("POST", "forget")):
            assert client.ask(method, f"/studies/{study}/{path}", b"{}", **headers)[0] == 404
    path = f"/studies/{study}/files?name=a.dcm"
    assert client.ask("PUT", path, dicom.read_bytes(), Cookie=f"other=1; {first}")[0] == 200
    assert client.ask("POST", f"/studies/{study}/open", b"", Cookie=first)[0] == 200


def test_nobodys_uploads_evict_another_persons(client: Client, dicom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "MOST_STUDIES_OF_ONE", 2)
    monkeypatch.setattr(shelf, "MOST_STUDIES", 3)
    mine, theirs = cookie_of(client), cookie_of(client)

    def begin(cookie: str) -> tuple[int, Any]:
        return client.ask("POST", "/studies", b"", Cookie=cookie)[:2]

    def complete(cookie: str, study: str) -> None:
        assert client.ask("PUT", f"/studies/{study}/files?name=a.dcm", dicom.read_bytes(), Cookie=cookie)[0] == 200
        assert client.ask("POST", f"/studies/{study}/open", b"", Cookie=cookie)[0] == 200

    their = begin(theirs)[1]["study"]
    first, second = begin(mine)[1]["study"], begin(mine)[1]["study"]
    status, said = begin(mine)
    assert status == 503 and "uploading 2 studies already" in said["error"], "an upload is never evicted"
    complete(mine, second)
    assert begin(mine)[0] == 200
    assert client.ask("POST", f"/studies/{second}/open", b"", Cookie=mine)[0] == 404, "one's own complete one gives way"
    complete(mine, first)
    complete(theirs, their)
    status, said = begin(theirs)
    assert status == 503 and "holds 3 studies of all its users" in said["error"]
    assert client.ask("POST", f"/studies/{first}/open", b"", Cookie=mine)[0] == 200, "another person's does not"


def test_a_study_that_nobody_uses_makes_room(server: Any, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "MOST_STUDIES", 1)
    study = client.begin()
    assert client.ask("POST", "/studies", b"")[0] == 503
    server.shelf._cases[study].touched -= shelf.IDLE_SECONDS + 1
    assert client.ask("POST", "/studies", b"")[0] == 200 and not (server.shelf.folder / study).exists()


def test_the_sizes_of_all_uploads_are_bounded_together(
    server: Any, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "MOST_UPLOADS", 1)
    server.shelf._cases[client.begin()].uploads.size = 50_000_000
    status, said, _ = client.ask("POST", "/studies", b"")
    assert status == 503 and "50 MB. Allowed: 64 studies, 50 MB" in said["error"]


def test_a_full_disk_is_said(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    study = client.begin()
    monkeypatch.setattr(uploads.Uploads, "_stored", full)
    status, said = client.put(study, "a.png", b"\x89PNG\r\n\x1a\n")
    assert status == 507 and "disk is full" in said["error"]


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


# Requests that are refused.


@pytest.mark.parametrize(
    ("host", "origin", "site", "allowed"),
    [
        ("127.0.0.1:8470", None, None, True),
        ("localhost:9000", "http://localhost:9000", "same-origin", True),
        ("[::1]:8470", "http://[::1]:8470", None, True),
        ("192.168.1.5:8470", None, "none", True),
        ("gpu-box:8470", "https://gpu-box:8470", None, True),
        ("evil.example:8470", None, None, False),
        ("127.0.0.1.evil.example", None, None, False),
        ("127.0.0.1:8470", "http://evil.example", None, False),
        ("127.0.0.1:8470", "http://127.0.0.1:9999", None, False),
        ("127.0.0.1:8470", "null", None, False),
        ("127.0.0.1:8470", None, "cross-site", False),
        ("127.0.0.1:8470", None, "same-site", False),
        (None, None, None, False),
        ("[::1", None, None, False),
        ("", None, None, False),
    ],
)
def test_who_may_speak_to_it(host: str | None, origin: str | None, site: str | None, allowed: bool) -> None:
    assert (refusal(host, origin, site, "gpu-box") is None) == allowed


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Sec_Fetch_Site": "cross-site"}],
    ids=["rebinding", "foreign page", "foreign script"],
)
def test_foreign_pages_get_nothing(server: Any, client: Client, headers: dict[str, str]) -> None:
    for method, path in (("POST", "/studies"), ("GET", "/"), ("GET", "/page.js")):
        status, said, _ = client.ask(method, path, b"", **headers)
        assert status == 403 and "error" in said
    assert list(server.shelf.folder.iterdir()) == []


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.3.2.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.2", "gpu-box", "")))


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("questions", {**VIEW, "question": ""}, 400, "question: "),
        ("questions", {**VIEW}, 400, "question: "),
        ("questions", {**VIEW, "question": "x" * 5000}, 400, "question: "),
        ("questions", {**VIEW, "question": "q", "turns": [["one"]]}, 400, "turns.0"),
        ("questions", {**VIEW, "question": "q", "slice": "a"}, 400, "slice: "),
        ("questions", {**VIEW, "question": "q", "sice": 1}, 400, "sice: "),
        ("questions", b"[]", 400, "the request: "),
        ("questions", b"{", 400, "the request: "),
        ("questions", b" " * 300_000, 413, "too long"),
        ("questions", {**VIEW, "question": "q", "slice": 7}, 422, "no such slice"),
        ("questions", {**VIEW, "question": "q", "window": "x"}, 422, "no such window"),
        ("answers/9/attention", b"{}", 422, "not kept"),
        ("answers/x/attention", b"{}", 422, "not kept"),
        ("nothing", b"{}", 404, "no such page"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(
    client: Client, dicom: Path, path: str, body: Any, status: int, said: str
) -> None:
    study, _ = client.upload(dicom)
    actual, answer, _ = client.ask("POST", f"/studies/{study}/{path}", body)
    assert (actual, said in answer["error"]) == (status, True), answer
    assert client.question(study)[-1]["answer"]["text"] == SENTENCE, "the server still works"


@pytest.mark.parametrize("query", ["", "item=0", "item=-1&axis=2&slice=0&volume=0", "item=0&axis=2&slice=9e9&volume=0"])
def test_wrong_pictures(client: Client, dicom: Path, query: str) -> None:
    study, _ = client.upload(dicom)
    assert client.ask("GET", f"/studies/{study}/picture?{query}")[0] == 400
    assert client.picture(study, slice=5)[0] == 422
    assert client.ask("GET", "/studies/../../etc/passwd")[0] == 404
    assert client.ask("GET", "/%2e%2e/server.py")[0] == 404


def test_uploads_are_bounded_and_need_a_length(dialogue: Dialogue, tmp_path: Path) -> None:
    with chat_server(dialogue, most_bytes=10_000) as server:
        client = Client(server)
        study = client.begin()
        assert client.put(study, "a.png", b"\x89PNG\r\n\x1a\n" + bytes(20_000))[0] == 422
        assert "0 MB" in client.put(study, "a.png", b"\x89PNG\r\n\x1a\n" + bytes(20_000))[1]["error"]
        raw = f"PUT /studies/{study}/files HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert b" 411 " in spoken(server, raw.encode())
        raw = f"PUT /studies/{study}/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n"
        assert b" 411 " in spoken(server, raw.encode())
        assert client.open(study)[0] == 422
        assert client.ask("PUT", "/studies/guessed/files", b"x")[0] == 404


def spoken(server: Any, said: bytes) -> bytes:
    with socket.create_connection(server.server_address[:2], timeout=30) as connection:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        heard = b""
        while piece := connection.recv(1 << 16):
            heard += piece
        return heard


@pytest.mark.parametrize(
    "said",
    [b"", b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03" * 9, b"GET / HTTP/9\r\n\r\n", b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_request_does_no_harm(
    server: Any, client: Client, said: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    spoken(server, said)
    assert client.ask("GET", "/")[0] == 200
    assert capfd.readouterr().err == ""


# The queue.


def test_the_line_is_served_in_order_and_told() -> None:
    line, served, heard = Line(), [], {}

    def stand(number: int) -> None:
        with line.turn(heard.setdefault(number, []).append):
            served.append(number)
            time.sleep(0.1)

    threads = []
    for number in range(4):
        threads.append(threading.Thread(target=stand, args=(number,)))
        threads[-1].start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert served == [0, 1, 2, 3]
    assert heard == {0: [], 1: [1], 2: [2, 1], 3: [3, 2, 1]}


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
    heard: list[Any] = []
    with server.line.turn(lambda before: None):
        asking = threading.Thread(target=lambda: heard.extend(client.question(study)))
        asking.start()
        time.sleep(0.3)
    asking.join()
    assert heard[0] == {"waiting": 1} and "answer" in heard[-1]


def test_a_browser_that_goes_away_stops_its_answer(server: Any, client: Client, dicom: Path) -> None:
    study, _ = client.upload(dicom)
    body = b'{"question": "What is it?", "item": 0}'
    head = (
        f"POST /studies/{study}/questions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    )
    with server.line.turn(lambda before: None):
        with socket.create_connection(server.server_address[:2]) as connection:
            connection.sendall(head + body)
            heard = b""
            while b"waiting" not in heard:
                heard += connection.recv(4096)
        until(lambda: len(server.line._tickets) == 1)
    assert client.question(study)[-1]["answer"]["text"] == SENTENCE


# The command.


@contextlib.contextmanager
def served(checkpoint: Path, temporary: Path, *more: str) -> Any:
    """Run `umed serve` in a separate process; yields it with its address."""
    command = [sys.executable, "-m", "umed_plugin.cli", "serve", str(checkpoint), "--port", "0", *more]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        seen = ""
        while not (found := re.search(r"http://([\d.]+):(\d+)/", seen)):
            line = process.stdout.readline()
            assert line, seen
            seen += line
        process.server_address = (found[1].replace("0.0.0.0", "127.0.0.1"), int(found[2]))
        process.began = seen
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_cleanly_and_tells_nothing_of_patients(
    speaking: Path, tmp_path: Path, dicom: Path, how: signal.Signals
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    odd = dicom.read_bytes().replace(b"-1000", b"Doe^J", 1)
    with served(speaking, temporary) as process:
        client = Client(process)
        study, held = client.upload(dicom)
        assert client.question(study)[-1]["answer"]["text"] == SENTENCE
        bad = client.begin()
        client.put(bad, "Doe.dcm", odd)
        status, said = client.open(bad)
        assert status == 422 and "Doe^J" not in str(said)
        (folder,) = temporary.glob("umed-serve-*")
        assert any(folder.rglob("*.dcm"))
        process.send_signal(how)
        printed = process.began + process.stdout.read()
        assert process.wait(30) == 0
    assert not folder.exists()
    assert "Doe" not in printed and "secret-7" not in printed and "Traceback" not in printed
    assert printed.splitlines()[-1] == "umed serve: stopping" and "umed: warning" not in printed


def test_ctrl_c_does_not_wait_for_a_long_answer_to_end(tiny_mistral: Path, tmp_path: Path, dicom: Path) -> None:
    with served(tiny_mistral, tmp_path, "--max-new-tokens", "800") as process:
        client = Client(process)
        study, _ = client.upload(dicom)
        heard: list[Any] = []
        asking = threading.Thread(target=lambda: heard.extend(client.question(study)))
        asking.start()
        with socket.create_connection(process.server_address):  # browsers keep idle connections open
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        asking.join()
    assert "answer" not in heard[-1], "the answer was stopped"


def test_an_address_beyond_this_machine_is_warned_of(tiny_mistral: Path, tmp_path: Path) -> None:
    with served(tiny_mistral, tmp_path, "--host", "0.0.0.0") as process:
        assert "umed: warning: 0.0.0.0 can be reached from other machines" in process.began
        assert Client(process).ask("GET", "/")[0] == 200
        assert Client(process).ask("GET", "/", Host="evil.example")[0] == 403


def test_two_checkpoints_are_served_by_one_command(
    speaking: Path, tiny_mistral: Path, tmp_path: Path, dicom: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(speaking, tmp_path, "--compare", str(tiny_mistral), "--max-new-tokens", "4") as process:
        client = Client(process)
        page = client.ask("GET", "/")[1].decode()
        # Both folders have one name: as much of their paths is shown as tells them apart.
        for checkpoint in (speaking, tiny_mistral):
            assert f'data-name="{checkpoint.parent.name}/{checkpoint.name}"' in page
        study, _ = client.upload(dicom)
        texts = [client.question(study, model=model)[-1]["answer"]["text"] for model in (0, 1)]
        assert SENTENCE.startswith(texts[0]) and texts[0] != texts[1]
    assert cli.main(["serve", str(speaking), "--compare", str(speaking)]) == 2
    assert "is the checkpoint that is served already" in capsys.readouterr().err


def test_a_port_that_is_taken(tiny_mistral: Path, server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(["serve", str(tiny_mistral), "--port", str(server.server_address[1])]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "cannot listen there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--port", "70000"], ["--upload-mb", "0"], ["--megapixels", "0"], ["--max-new-tokens", "-3"]]
)
def test_wrong_flags(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "anywhere", *wrong]) == 2
    assert wrong[0] in capsys.readouterr().err


_FREED = """
import ctypes
from umed_plugin.commands.serve.command import give_large_blocks_back

class Blocks(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "a", "b", "c", "d", "e")]

libc = ctypes.CDLL(None)
libc.mallinfo.restype, libc.malloc.restype, libc.free.argtypes = Blocks, ctypes.c_void_p, [ctypes.c_void_p]
if {given_back}:
    give_large_blocks_back()
libc.free(libc.malloc(16 << 20))  # glibc now counts blocks of this size among the small ones, unless told otherwise
before = libc.mallinfo().hblks
libc.malloc(16 << 20)
print(libc.mallinfo().hblks - before)
"""


@pytest.mark.parametrize("given_back", [True, False])
def test_memory_of_a_large_image_is_given_back(given_back: bool) -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo"):
        pytest.skip("only glibc keeps large blocks")
    code = _FREED.replace("{given_back}", str(given_back))
    said = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert said.stdout.split()[-1] == str(int(given_back))
