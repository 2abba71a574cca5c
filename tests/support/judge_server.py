"""A small OpenAI-compatible server on loopback for the tests of the judge: it answers as told, and remembers what was asked."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

Server = TypeVar("Server", bound=ThreadingHTTPServer)

# At the start of a process with a client. As it ends, the client drops what was not sent, then waits for what was: a line is
# printed between the two.
SAYS_DROPPED = """
import asyncio
_wait = asyncio.wait
def _said(tasks, **named):
    print("dropped", flush=True)
    return _wait(tasks, **named)
asyncio.wait = _said
"""


@dataclass
class Answer:
    """What the server says to one request: ``body`` is sent as it is when it is text or bytes, else as JSON."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def completion(content: str | None, *, usage: bool = True, **message: Any) -> dict[str, Any]:
    """The body of a chat completion; 100 tokens read and 10 written."""
    body: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "the-model",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": content, **message},
            }
        ],
    }
    if usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return body


def score(value: float) -> Answer:
    return Answer(completion(json.dumps({"score": value})))


@dataclass
class Asked:
    """One request as it came."""

    path: str
    authorization: str | None
    body: dict[str, Any]
    at: float
    request_id: str = ""

    @property
    def text(self) -> str:
        return self.body["messages"][0]["content"]


class JudgeServer(ThreadingHTTPServer):
    """Answers ``POST /v1/chat/completions`` with ``answer(request)``; counts how many requests it holds at the same time."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Callable[[Asked], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.asked: list[Asked] = []
        self.held = self.most_held = 0
        self.changed = threading.Condition()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no fault of the server's; all else is told."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def hold_until(self, count: int, seconds: float = 10.0) -> bool:
        """Keep a request until ``count`` of them are held together; False when they never are."""
        with self.changed:
            return self.changed.wait_for(lambda: self.most_held >= count, seconds)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JudgeServer

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        if len(data) < length:
            raise ConnectionResetError("the client has gone in the middle of its request")
        body = json.loads(data)
        asked = Asked(self.path, self.headers.get("Authorization"), body, time.monotonic())
        asked.request_id = self.headers.get("X-Client-Request-Id", "")
        with self.server.changed:
            self.server.asked.append(asked)
            self.server.held += 1
            self.server.most_held = max(self.server.most_held, self.server.held)
            self.server.changed.notify_all()
        try:
            answer = self.server.answer(asked)
            text = answer.body if isinstance(answer.body, (bytes, str)) else json.dumps(answer.body)
            data = text if isinstance(text, bytes) else text.encode()
            self.send_response(answer.status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **answer.headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client has gone: a timeout, or a process that was killed
            self.close_connection = True
        finally:
            with self.server.changed:
                self.server.held -= 1

    def log_message(self, *unused: Any) -> None:
        """Tests read the list instead."""


@contextmanager
def judge_server(answer: Callable[[Asked], Answer]) -> Iterator[JudgeServer]:
    """A running server; it ends with the block."""
    with served(JudgeServer(answer)) as server:
        yield server


@contextmanager
def served(server: Server) -> Iterator[Server]:
    """``server`` in a thread of its own; it ends with the block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
