"""The Batch API on loopback for the tests of the writer: files, batches, and replies made by a model of chat completions."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from support.judge_server import Answer, Asked, served


class BatchServer(ThreadingHTTPServer):
    """``/v1/files`` and ``/v1/batches``.

    Attributes:
        answer: what a question of a batch gets; an answer that is not 200 goes to the error file.
        polls: how often a batch is looked at before it has ended.
        paid: question -> completions made for it.
        hold: while set, a batch is made, and the reply about it is not sent.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[Asked], Answer], polls: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.polls = answer, polls
        self.files: dict[str, str] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.paid: Counter[str] = Counter()
        self.asked: list[Asked] = []
        self.hold: threading.Event | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no fault of the server's."""

    def make_batch(self, file: str) -> dict[str, Any]:
        name = f"batch_{len(self.batches)}"
        self.batches[name] = {
            "id": name,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "input_file_id": file,
            "created_at": 0,
            "completion_window": "24h",
            "status": "in_progress",
            "looked_at": 0,
        }
        return self.batches[name]

    def look_at(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        batch["looked_at"] += 1
        if batch["looked_at"] == self.polls:
            self._answer_all(batch)
        return batch

    def _answer_all(self, batch: dict[str, Any]) -> None:
        lines: dict[str, list[str]] = {"output": [], "error": []}
        for text in self.files[batch["input_file_id"]].splitlines():
            question = json.loads(text)
            asked = Asked(question["url"], None, question["body"], 0.0, question["custom_id"])
            self.asked.append(asked)
            answer = self.answer(asked)
            self.paid[asked.request_id] += answer.status == 200
            line = {"custom_id": asked.request_id, "response": {"status_code": answer.status, "body": answer.body}}
            lines["output" if answer.status == 200 else "error"].append(json.dumps({**line, "error": None}))
        for kind, held in lines.items():
            if held:
                batch[f"{kind}_file_id"] = f"{batch['id']}_{kind}"
                self.files[f"{batch['id']}_{kind}"] = "\n".join(held) + "\n"
        batch["status"] = "completed"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BatchServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/files":
            content = re.search(rb'filename="[^"]+"[^\r]*\r\n(?:[^\r]+\r\n)*\r\n(.*?)\r\n--', body, re.DOTALL).group(1)
            name = f"file_{len(self.server.files)}"
            self.server.files[name] = content.decode()
            self._send({"id": name, "object": "file", "purpose": "batch", "filename": "umed.jsonl", "bytes": 1, "created_at": 0,
                        "status": "processed"})  # fmt: skip
        else:
            batch = self.server.make_batch(json.loads(body)["input_file_id"])
            if self.server.hold is not None:
                self.server.hold.wait(60)
            self._send(batch)

    def do_GET(self) -> None:
        path = self.path.split("?")[0].removeprefix("/v1/").split("/")
        if path[0] == "files":
            self._send(self.server.files[path[1]])
        elif len(path) > 1 and path[1] not in self.server.batches:
            self._send({"error": {"message": f"no batch {path[1]}"}}, 404)
        elif len(path) > 1:
            self._send(self.server.look_at(path[1]))
        else:
            self._send({"object": "list", "data": list(self.server.batches.values()), "has_more": False})

    def _send(self, body: Any, status: int = 200) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *unused: Any) -> None:
        """Tests read the lists instead."""


@contextmanager
def batch_server(answer: Callable[[Asked], Answer], polls: int = 2) -> Iterator[BatchServer]:
    """A running server; it ends with the block."""
    with served(BatchServer(answer, polls)) as server:
        yield server
