"""The end of the client that sends requests: it must not hang, whoever closes it and how often."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from support.umed_runs import TESTS, environment

from umed_plugin.errors import UmedError
from umed_plugin.remote.client import ModelClient, key_from_environment, short_message
from umed_plugin.remote.settings import ServerSettings

# Threads change over as often as possible, so that a second call meets a loop that is about to stop.
CLOSING_TWICE = """
import faulthandler, sys, time
from umed_plugin.remote.client import ModelClient
from umed_plugin.remote.settings import ServerSettings

faulthandler.dump_traceback_later(60, exit=True)
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
    done = subprocess.run(command, env=environment(TESTS), capture_output=True, text=True, timeout=120)
    assert done.stdout == "closed\n", done.stderr[-2000:]


def test_a_request_after_the_end_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    client = ModelClient(ServerSettings("m", "http://127.0.0.1:9/v1"), lambda key, reply: None)
    while not client._loop.is_running():
        time.sleep(0.01)
    client.close()
    assert client.ask("k", [{"role": "user", "content": "?"}]).cancelled()


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
