"""Requests that the chat page's server refuses: of foreign pages, wrong ones, too long ones, and what is no request."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from support.chat_client import VIEW, Client, chat_server
from support.speaking import SENTENCE

from umed_plugin.commands.serve.access import refusal
from umed_plugin.commands.serve.dialogue import Dialogue
from umed_plugin.remote.settings import is_loopback


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
        ("127.0.0.1:8470", "http://[", None, False),
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
    for method, path in (("POST", "/studies"), ("GET", "/"), ("GET", "/page.js"), ("DELETE", "/")):
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


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/", "GET, HEAD"),
        ("PUT", "/page.js", "GET, HEAD"),
        ("GET", "/studies", "POST"),
        ("HEAD", "/studies", "POST"),
        ("POST", "/studies/a/picture", "GET, HEAD"),
        ("BREW", "/studies/a/files", "PUT"),
        ("OPTIONS", "/studies/a/answers/1/attention", "POST"),
    ],
)
def test_a_method_that_a_path_does_not_take_is_told_those_that_it_does(
    server: Any, method: str, path: str, allowed: str
) -> None:
    head, body = spoken(server, f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()).split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 405 ") and f"\r\nAllow: {allowed}\r\n".encode() in head
    told = json.loads(body)["error"] if method != "HEAD" else f"{method} {allowed}"
    assert method in told and allowed in told


def test_head_is_answered_as_get_without_the_body(server: Any, client: Client, dicom: Path) -> None:
    study, _ = client.upload(dicom)
    for path in ("/page.js", f"/studies/{study}/picture?{urlencode(VIEW)}"):
        status, body, headers = client.ask("HEAD", path)
        assert (status, body) == (200, b"")
        assert headers["Content-Length"] == client.ask("GET", path)[2]["Content-Length"]
    heard = spoken(server, b"".join(b"HEAD /%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path for path in (b"none", b"")))
    assert heard.count(b"HTTP/1.1 404") == heard.count(b"HTTP/1.1 200") == 1 and b"error" not in heard


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
        follows = "GET /page.css HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for header in ("Transfer-Encoding: chunked", "Content-Length: 5x", "Content-Length: 2\r\nContent-Length: 0"):
            heard = spoken(server, f"POST /studies HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n{follows}".encode())
            assert heard.count(b"HTTP/1.1 ") == 1 and b" 411 " in heard, "its body is not the next request"
        assert spoken(server, follows.encode() * 2).count(b" 200 ") == 2
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


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"GET http://[ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://[\r\n\r\n", b"403"),
        (b"GET http://[ HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"403"),
        (b"POST studies HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"404"),
        (b"GET / HTTP/9\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"431"),
        (b"GET / HTTP/3.0\r\n\r\n", b"505"),
    ],
    ids=["address", "origin", "foreign", "no slash", "no version", "headers", "version"],
)
def test_malformed_requests_are_answered(
    server: Any, said: bytes, status: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    heard = spoken(server, said)
    assert heard.startswith(b"HTTP/1.1 " + status) and b'{"error": ' in heard
    assert capfd.readouterr().err == ""
