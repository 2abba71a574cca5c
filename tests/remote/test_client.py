"""The end of the client that sends requests: it must not hang, whoever closes it and how often."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
import zlib

import pytest
from support.judge_server import Answer, Asked, completion, judge_server
from support.umed_runs import TESTS, environment

from umed_plugin.errors import UmedError
from umed_plugin.remote.bounded import MOST_BYTES, BoundedClient
from umed_plugin.remote.client import ModelClient, key_from_environment, short_message
from umed_plugin.remote.replies import Failure, Reply, RequestResult, Unreadable
from umed_plugin.remote.settings import ServerSettings

# Threads change over as often as possible, so that a second call meets a loop that is about to stop.
CLOSING_TWICE = """
import faulthandler, sys, time
from umed_plugin.remote.client import ModelClient
from umed_plugin.remote.settings import ServerSettings

faulthandler.dump_traceback_later(240, exit=True)  # a hang never ends; a busy machine takes a minute
sys.setswitchinterval(1e-6)
for _ in range(200):
    client = ModelClient(ServerSettings("m", "http://127.0.0.1:9/v1"), lambda key, reply: None)
    time.sleep(0.002)
    client.close()
    client.close()
print("closed")
"""


def test_closing_twice_does_not_hang() -> None:
    """As a run that is interrupted does: once when it ends, and once more when the process does."""
    command = [sys.executable, "-c", CLOSING_TWICE]
    done = subprocess.run(command, env=environment(TESTS), capture_output=True, text=True, timeout=300)
    assert done.stdout == "closed\n", done.stderr[-2000:]


def test_a_request_after_the_end_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    client = ModelClient(ServerSettings("m", "http://127.0.0.1:9/v1"), lambda key, reply: None)
    while not client._loop.is_running():
        time.sleep(0.01)
    client.close()
    assert client.ask("k", [{"role": "user", "content": "?"}]).cancelled()


def asked(answer: Answer) -> RequestResult:
    with judge_server(lambda request: answer) as server:
        client = ModelClient(ServerSettings("m", server.url, retries=0), lambda key, reply: None)
        result = client.ask("k", [{"role": "user", "content": "a patient's report"}]).result(60)
        client.close()
    return result


def test_a_request_stays_with_the_address_that_was_given() -> None:
    with judge_server(lambda request: Answer(completion("stolen"))) as other:
        result = asked(Answer("", 307, {"Location": f"{other.url}/chat/completions"}))
        assert other.asked == []
    assert isinstance(result, Failure) and result.status == 307
    assert result.reason.endswith(f"--base-url {other.url}")


@pytest.mark.parametrize("location", ["http://me:secret@%s:81/api/v1/chat/completions", "//me:secret@%s:81/api/v1"])
@pytest.mark.parametrize("host", ["host", "my-department-inference.prod.eu-west-1.hospital.example.org"])
def test_the_advice_names_the_address_to_give(host: str, location: str) -> None:
    result = asked(Answer("", 301, {"Location": location % host}))
    assert isinstance(result, Failure) and result.reason.endswith(f"--base-url http://{host}:81/api/v1")
    assert "secret" not in result.reason


@pytest.mark.parametrize("whole_address", [False, True])
@pytest.mark.parametrize("status", [307, 308])
def test_another_path_of_the_same_server_is_followed(status: int, whole_address: bool) -> None:
    """As proxies and web frameworks ask for, such as a slash at the end."""

    def answer(request: Asked) -> Answer:
        if request.path.endswith("/"):
            return Answer(completion(request.text))
        here = server.url.removesuffix("/v1") if whole_address else ""
        return Answer("", status, {"Location": f"{here}{request.path}/"})

    with judge_server(answer) as server:
        client = ModelClient(ServerSettings("m", server.url, retries=0), lambda key, reply: None)
        result = client.ask("k", [{"role": "user", "content": "a report"}]).result(60)
        client.close()
        assert isinstance(result, Reply) and result.text == "a report"
        assert server.asked[0].authorization == server.asked[1].authorization
        with BoundedClient() as batches:
            assert batches.post(f"{server.url}/files", json={"messages": [{"content": "?"}]}).status_code == 200


def test_a_server_that_sends_on_for_ever_is_left() -> None:
    result = asked(Answer("", 307, {"Location": "/v1/chat/completions"}))
    assert isinstance(result, Failure) and result.status == 307


def test_a_reply_that_was_packed_unasked_is_read() -> None:
    packed = gzip.compress(json.dumps(completion("yes")).encode())
    result = asked(Answer(packed, headers={"Content-Encoding": "gzip"}))
    assert isinstance(result, Reply) and result.text == "yes"


@pytest.mark.parametrize("coding", ["utf-8", "none", "", "Identity", "UTF-8, identity"])
def test_a_reply_that_was_not_packed_is_read_whatever_its_header_says(coding: str) -> None:
    result = asked(Answer(completion("yes"), headers={"Content-Encoding": coding}))
    assert isinstance(result, Reply) and result.text == "yes"


@pytest.mark.parametrize("coding", ["X-Gzip", "deflate", "deflate, gzip", "utf-8, gzip"])
def test_every_way_to_pack_that_python_knows_is_unpacked(coding: str) -> None:
    body = json.dumps(completion("yes")).encode()
    for way in coding.split(", "):
        body = {"deflate": zlib.compress, "utf-8": bytes}.get(way, gzip.compress)(body)
    result = asked(Answer(body, headers={"Content-Encoding": coding}))
    assert isinstance(result, Reply) and result.text == "yes"


@pytest.mark.parametrize(
    ("coding", "body"),
    [("br", b"x"), ("zstd", b"x"), ("gzip", b"x"), ("gzip", gzip.compress(b"x" * 99, mtime=0)[:20])],
    ids=["br", "zstd", "broken", "cut off"],
)
def test_a_packed_reply_that_cannot_be_unpacked_is_no_batchs_file(coding: str, body: bytes) -> None:
    """A single request may be paid for, so it is not sent again; a batch would be noted as collected."""
    answer = Answer(body, headers={"Content-Encoding": coding})
    assert isinstance(asked(answer), Unreadable)
    with judge_server(lambda request: answer) as server, BoundedClient() as client:
        assert client.post(f"{server.url}/files/f/content", json={}).status_code == 415


@pytest.mark.parametrize("packed", [False, True])
def test_a_reply_without_end_is_read_to_a_limit(packed: bool) -> None:
    """Packed, 64 MiB of spaces are 64 kB."""
    body = gzip.compress(b" " * 2**26) if packed else b" " * 2**26
    result = asked(Answer(body, headers={"Content-Encoding": "gzip"} if packed else {}))
    assert isinstance(result, Unreadable) and f"a reply of more than {MOST_BYTES} bytes" in result.reason


def test_a_batchs_file_without_end_is_an_error() -> None:
    """Its lines would be skipped as no results, and the batch noted as collected."""
    with judge_server(lambda request: Answer(b"x" * 1001)) as server, BoundedClient() as client:
        statuses = []
        for client.most_bytes in (1000, 1001):
            statuses.append(client.post(f"{server.url}/files/f/content", json={}).status_code)
    assert statuses == [413, 200]


@pytest.mark.parametrize("body", ["[" * 200_000, '{"choices": ' + "[" * 100_000 + "]" * 100_000 + "}"])
def test_a_reply_that_is_nested_too_deeply_is_unreadable(body: str) -> None:
    assert isinstance(asked(Answer(body)), Unreadable)


@pytest.mark.parametrize("count", [-1, 2**53 + 1, 10**400], ids=["negative", "above 2 to the 53", "huge"])
def test_numbers_of_tokens_that_cannot_be_count_as_not_reported(count: int) -> None:
    body = completion("yes")
    body["usage"]["completion_tokens"] = count
    result = asked(Answer(body))
    assert isinstance(result, Reply) and result.usage == {"prompt_tokens": 100}


def test_the_key_has_no_line_end_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx would refuse a header with a line end in a text that shows the key as Python writes it."""
    monkeypatch.setenv("OPENAI_API_KEY", " sk-secret\r\n")
    assert key_from_environment() == "sk-secret"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\rsecret")
    with pytest.raises(UmedError, match="OPENAI_API_KEY holds a key whose character 4") as failed:
        key_from_environment()
    assert "secret" not in str(failed.value)
    quoted = repr(b"Bearer sk'\\x")
    assert short_message("sk'\\x", f"Illegal header value {quoted}") == 'Illegal header value b"Bearer ***"'
