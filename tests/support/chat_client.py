"""`umed serve` for tests: the real server on loopback, and a client that speaks to it as the page does."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

VIEW = {"item": 0, "axis": 2, "slice": 0, "volume": 0, "window": "file"}


@contextmanager
def chat_server(*dialogues: Any, most_bytes: int = 50_000_000) -> Iterator[Any]:
    from umed_plugin.commands.serve.server import ChatServer
    from umed_plugin.commands.serve.shelf import Shelf

    shelf = Shelf(most_bytes)
    about = {
        "checkpoints": ["tiny-<b>llava", "other-llava"][: len(dialogues)],
        "upload_mb": most_bytes / 1e6,
        "questions": ["Is it a nodule?", "And where?"],
    }
    server = ChatServer("127.0.0.1", 0, dialogues, shelf, about)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.end(30)
        shelf.close()


class Client:
    """Requests to a server; each on a connection of its own."""

    def __init__(self, server: Any) -> None:
        self.address = server.server_address[:2]

    def ask(self, method: str, path: str, body: bytes | dict | None = None, **headers: str) -> tuple[int, Any, dict]:
        """Status, content (JSON decoded, lines of JSON as a list) and headers. ``None`` as a header leaves it out."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, content, given)
        reply = connection.getresponse()
        data, kind = reply.read(), reply.headers.get("Content-Type", "")
        found = dict(reply.headers)
        connection.close()
        if kind == "application/json":
            return reply.status, json.loads(data), found
        if kind == "application/x-ndjson":
            return reply.status, [json.loads(line) for line in data.splitlines()], found
        return reply.status, data, found

    def begin(self) -> str:
        return self.ask("POST", "/studies", b"")[1]["study"]

    def put(self, study: str, name: str, content: bytes) -> tuple[int, Any]:
        return self.ask("PUT", f"/studies/{study}/files?name={quote(name)}", content)[:2]

    def open(self, study: str) -> tuple[int, Any]:
        return self.ask("POST", f"/studies/{study}/open", b"")[:2]

    def upload(self, *files: Path) -> tuple[str, Any]:
        """The study's name and what it holds, or the error."""
        study = self.begin()
        for file in files:
            status, said = self.put(study, file.name, file.read_bytes())
            assert status == 200, said
        return study, self.open(study)[1]

    def picture(self, study: str, **view: Any) -> tuple[int, Any]:
        return self.ask("GET", f"/studies/{study}/picture?{urlencode({**VIEW, **view})}")[:2]

    def question(self, study: str, question: str = "What is it?", **more: Any) -> list[dict[str, Any]]:
        return self.ask("POST", f"/studies/{study}/questions", {**VIEW, "question": question, **more})[1]

    @contextmanager
    def listening(self, study: str, question: str = "What is it?", **more: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """The lines of an answer as they come; the connection is closed behind the block, as by a page that goes away."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        connection.request("POST", f"/studies/{study}/questions", json.dumps({**VIEW, "question": question, **more}))
        reply = connection.getresponse()
        try:
            yield (json.loads(line) for line in reply)
        finally:
            reply.close()
            connection.close()

    def attention(self, study: str, number: int, **how: Any) -> list[dict[str, Any]]:
        return self.ask("POST", f"/studies/{study}/answers/{number}/attention", how)[1]

    def window(self, study: str, **view: Any) -> tuple[int, Any]:
        return self.ask("GET", f"/studies/{study}/window?{urlencode({**VIEW, **view})}")[:2]


def until(condition: Callable[[], bool]) -> None:
    """Wait for the condition, for 20 s at most."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met within 20 s"
        time.sleep(0.05)
