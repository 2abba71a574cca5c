"""What a rollout server may say or leave unsaid, by a stand-in on loopback: each is an error that says what to do."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest
from support.judge_server import Answer
from support.rollout_stand_in import reply, stand_in

from umed_plugin.errors import UmedError
from umed_plugin.remote.keys import without_key
from umed_plugin.remote.rollout_server import RolloutServer, RolloutServerError
from umed_plugin.remote.settings import rollout_server_faults

BODY = {"model": "the-model", "prompt_embeds": ["AAAA"], "n": 1}


def good(body, folder):
    return reply(body, [[5, 2]], [[-0.5, -0.1]])


def asked(url: str, **settings) -> RolloutServer:
    return RolloutServer(url, **{"timeout": 5.0, "retries": 2, "pause": 0.01, **settings})


def test_it_lists_its_model_and_completes():
    with stand_in(good) as server:
        client = asked(server.url)
        assert client.base_model() == "the-model"
        (choice,) = client.complete(BODY)
        assert choice["token_ids"] == [5, 2]
        assert server.log == ["/v1/models", "/v1/completions"]


def test_a_server_that_is_gone_is_asked_again_and_then_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RolloutServerError, match=r"cannot be reached .*refused.* umed rollout-server CKPT"):
        asked(url).complete(BODY)


def test_a_busy_server_is_asked_again():
    answers = [Answer({"error": {"message": "busy"}}, 503), Answer({}, 500), None]
    with stand_in(lambda body, folder: answers.pop(0) or good(body, folder)) as server:
        assert len(asked(server.url).complete(BODY)) == 1
    answers = [Answer({"error": {"message": "engine\ndead"}}, 500)] * 3
    with stand_in(lambda body, folder: answers.pop(0)) as server, pytest.raises(RolloutServerError) as failed:
        asked(server.url).complete(BODY)
    assert "HTTP 500: engine dead." in str(failed.value) and not answers


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("head", [b"Content-Length: 5000", b"Transfer-Encoding: chunked"], ids=["length", "chunks"])
def test_a_reply_that_breaks_off_is_a_lost_connection(times, head):
    """Asked again; if that does not help, the connection is named, and not what the half reply looks like."""
    listening, broken = socket.create_server(("127.0.0.1", 0)), []
    whole = json.dumps(good(BODY, None).body).encode()

    def answer():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as request:
                # All of it: a connection that is closed before is reset, and does not end.
                lines = iter(request.readline, b"\r\n")
                request.read(
                    next(int(line[15:]) for line in list(lines) if line.lower().startswith(b"content-length:"))
                )
                if len(broken) < times:
                    broken.append(1)
                    body = b'{"choices": [' if b"Length" in head else b'1000\r\n{"choices": ['
                    connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + body)
                else:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(whole) + whole)

    threading.Thread(target=answer, daemon=True).start()
    with listening:
        server = asked(f"http://127.0.0.1:{listening.getsockname()[1]}/v1")
        if times == 1:
            assert len(server.complete(BODY)) == 1
        else:
            with pytest.raises(RolloutServerError, match=r"cannot be reached .IncompleteRead"):
                server.complete(BODY)
    assert len(broken) == times


def test_a_slow_server_is_not_asked_twice():
    let_go = threading.Event()

    def slow(body, folder):
        let_go.wait(60)
        return good(body, folder)

    with stand_in(slow) as server:
        with pytest.raises(RolloutServerError, match=r"no reply within 1 s.*--umed_rollout_timeout"):
            asked(server.url, timeout=1.0).complete(BODY)
        let_go.set()
    assert server.log == ["/v1/completions"]


def test_a_server_that_drips_is_slow_too():
    """No single read times out: each brings a byte. All of them would come within 20 s, and be no JSON."""
    listening = socket.create_server(("127.0.0.1", 0))

    def drip():
        connection, _ = listening.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(1000):
            try:
                connection.sendall(b" ")
            except OSError:
                return
            time.sleep(0.02)

    threading.Thread(target=drip, daemon=True).start()
    with listening, pytest.raises(RolloutServerError, match="no reply within 0.3 s"):
        asked(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", timeout=0.3).complete(BODY)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda body, folder: reply(body, [[2]], [[0.0]], model="gpt-5"), "'gpt-5' has answered, and not 'the-model'"),
        (lambda body, folder: Answer("<html>a portal</html>"), "the reply is not JSON"),
        (lambda body, folder: Answer({"choices": "many"}), "the reply is not a completion"),
        (lambda body, folder: Answer(["a list"]), "the reply is not a completion"),
        (lambda body, folder: Answer({"error": {"message": "hidden_size 64"}}, 400), "HTTP 400: hidden_size 64."),
        (
            lambda body, folder: Answer("", 307, {"Location": "http://me:secret@example.org/v1/completions/"}),
            "HTTP 307: the server sends the request on to another one, which is not followed. If that is the right one, give its "
            "address: http://example.org/v1.",
        ),
        (
            lambda body, folder: Answer("", 302, {"Location": "/v1/completions/"}),
            "HTTP 302: the server sends the request on to itself",
        ),
        (lambda body, folder: Answer("where?", 308), "HTTP 308: where?."),
        (lambda body, folder: Answer("a loop", 308, {"Location": "/v1/completions"}), "HTTP 308: a loop."),
        (lambda body, folder: Answer("", 308, {"Location": "http://[::1/v1"}), "HTTP 308: no reason given."),
        (lambda body, folder: Answer("moved", 308, {"Location": "/\xe9"}), "HTTP 308: moved."),
    ],
    ids=[
        "another model",
        "a web page",
        "no choices",
        "no object",
        "refused",
        *("to another", "302", "without an address", "to the same", "nowhere", "no ASCII"),
    ],
)
def test_other_replies_are_refused(answer, words):
    with stand_in(answer) as server, pytest.raises(RolloutServerError) as failed:
        asked(server.url).complete(BODY)
    assert words in str(failed.value) and server.log == ["/v1/completions"]


@pytest.mark.parametrize("status", [307, 308])
def test_another_path_of_the_same_server_is_followed(status):
    """As proxies and web frameworks ask for, such as a slash at the end; method and body stay."""
    with stand_in(good) as server:
        slash = lambda path: None if path.endswith("/") else Answer("", status, {"Location": f"{path}/"})  # noqa: E731
        answer, server.models = server.answer, slash
        server.answer = lambda path, body: slash(path) or answer(path.rstrip("/"), body)
        client = asked(server.url)
        assert client.base_model() == "the-model"
        assert client.complete(BODY)[0]["token_ids"] == [5, 2]
        assert server.log == ["/v1/models", "/v1/models/", "/v1/completions", "/v1/completions/"]
        server.models = lambda path: Answer("", status, {"Location": path})
        with pytest.raises(RolloutServerError, match=f"HTTP {status}"):
            client.base_model()


def test_adapters_are_loaded_and_forgotten(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with stand_in(good) as server:
        client = asked(server.url)
        client.load_adapter("a", tmp_path)
        assert server.adapters == {"a": str(tmp_path)}
        client.unload_adapter("a")
        client.unload_adapter("a")  # one that is not there is forgotten already
        assert server.adapters == {}
        with pytest.raises(
            RolloutServerError, match=r"does not exist.*'a' is not loaded there .any more.*started anew"
        ):
            client.complete({**BODY, "model": "a"})
        server.may_load = False
        with pytest.raises(RolloutServerError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
            client.load_adapter("b", tmp_path)


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("UMED_ROLLOUT_API_KEY", "secret-key")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")  # nobody listens there: no proxy is asked
    with stand_in(lambda body, folder: Answer({"error": {"message": "bad key secret-key"}}, 401)) as server:
        with pytest.raises(RolloutServerError) as failed:
            asked(server.url).complete(BODY)
        assert server.headers["Authorization"] == "Bearer secret-key"
    assert "bad key ***" in str(failed.value)


@pytest.mark.parametrize("key", ["secret-key\r", " secret-key\n", "\tsecret-key \r\n"])
def test_a_key_is_sent_without_the_line_end_that_was_copied_with_it(key, monkeypatch):
    monkeypatch.setenv("UMED_ROLLOUT_API_KEY", key)
    with stand_in(good) as server:
        asked(server.url).complete(BODY)
        assert server.headers["Authorization"] == "Bearer secret-key"


@pytest.mark.parametrize("key", ["secret\r-key", "secret-k\u00e9y", "secret-\x7fkey", "\ufeffsecret-key"])
def test_a_key_that_no_header_holds_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setenv("UMED_ROLLOUT_API_KEY", key)
    with stand_in(good) as server, pytest.raises(UmedError) as failed:
        asked(server.url).complete(BODY)
    assert "UMED_ROLLOUT_API_KEY" in str(failed.value) and "ecret" not in str(failed.value)
    assert server.log == []
    (fault,) = rollout_server_faults("--server", server.url, "--allow-remote", False)
    assert "--server: the environment variable UMED_ROLLOUT_API_KEY" in fault and "ecret" not in fault


@pytest.mark.parametrize("key", ["se\\cret'\"", "plain"])
def test_a_key_is_hidden_however_it_is_quoted(key):
    for text in (key, repr(key), json.dumps(key), repr(key.encode()), f"header {key!r}"):
        assert "***" in without_key(key, text) and key[:2] not in without_key(key, text)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_named_with_its_variables(status, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with stand_in(good) as server:
        server.answer = lambda path, body: Answer({"error": "Unauthorized"}, status)
        for ask in (lambda: asked(server.url).complete(BODY), lambda: asked(server.url).load_adapter("a", tmp_path)):
            with pytest.raises(RolloutServerError) as failed:
                ask()
            assert "UMED_ROLLOUT_API_KEY" in str(failed.value) and "VLLM_API_KEY" in str(failed.value)
            assert "--enable-lora" not in str(failed.value)


def test_an_address_without_v1_is_named():
    with stand_in(good) as server:
        server.models = lambda path: None if path == "/v1/models" else Answer({"detail": "Not Found"}, 404)
        with pytest.raises(RolloutServerError, match=r"ends with /v1, http://127.0.0.1:\d+/v1\. "):
            asked(server.url.removesuffix("/v1")).base_model()
        with pytest.raises(RolloutServerError, match=r"ends with /v1\. Is it one"):
            asked(server.url.replace("/v1", "/other/v1")).base_model()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again_to_load_an_adapter(status, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with stand_in(good) as server:
        load, busy = server.answer, [1, 1]
        server.answer = lambda *asked: Answer("busy", status) if busy and busy.pop() else load(*asked)
        asked(server.url).load_adapter("a", tmp_path)
        assert list(server.adapters) == ["a"]
        server.answer = lambda *asked: Answer("busy", status)
        with pytest.raises(RolloutServerError, match=f"HTTP {status}: busy") as failed:
            asked(server.url).load_adapter("b", tmp_path)
        assert "--enable-lora" not in str(failed.value)


def test_an_adapter_that_a_lost_attempt_has_loaded_is_loaded(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    loaded = Answer({"error": {"message": "The lora adapter 'a' has already been loaded."}}, 400)
    with stand_in(good) as server:
        answers = [Answer("a broken gateway", 502), loaded]
        server.answer = lambda *asked: answers.pop(0)
        asked(server.url).load_adapter("a", tmp_path)
        assert answers == []
        server.answer = lambda *asked: loaded
        with pytest.raises(RolloutServerError, match="already been loaded"):
            asked(server.url).load_adapter("a", tmp_path)


def test_refused_connections_are_tried_again_to_load_an_adapter(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr("umed_plugin.remote.rollout_server.time.sleep", pauses.append)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RolloutServerError, match="cannot be reached"):
        asked(url, retries=2, pause=1.0).load_adapter("a", tmp_path)
    assert pauses == [1.0, 2.0]


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/v1", "http://[::1]:1/v1", "http://localhost:8000/v1"])
def test_this_machine_is_allowed(url):
    assert rollout_server_faults("--server", url, "--allow-remote", False) == []


@pytest.mark.parametrize("url", ["http://gpu-box:8000/v1", "http://10.0.0.2/v1", "http://localhost.example.org/v1"])
def test_another_machine_is_asked_about(url):
    (fault,) = rollout_server_faults("--server", url, "--allow-remote", False)
    assert "another machine" in fault and "--allow-remote" in fault
    assert rollout_server_faults("--server", url, "--allow-remote", True) == []


@pytest.mark.parametrize(
    "url",
    [
        *("127.0.0.1:8000", "ftp://127.0.0.1/v1", "http:///v1", "http://me:word@127.0.0.1/v1"),
        *("http://127.0.0.1:99999/v1", "http://127.0.0.1:80a0/v1", "http://127.0.0.1/v1#x"),
    ],
)
def test_what_is_no_address_is_refused(url):
    (fault,) = rollout_server_faults("--server", url, "--allow-remote", True)
    assert "must be an address" in fault or "UMED_ROLLOUT_API_KEY" in fault
