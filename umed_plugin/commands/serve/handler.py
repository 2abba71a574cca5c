"""The chat page over HTTP: uploads, pictures, questions.

| request | answer |
| --- | --- |
| ``GET /`` and ``/page.css``, ``/page.js`` | the page |
| ``POST /studies`` | ``{"study": NAME}`` |
| ``PUT /studies/NAME/files?name=N`` | takes one file, its bytes as they are |
| ``POST /studies/NAME/open`` | what the files hold |
| ``GET /studies/NAME/picture?item=&axis=&slice=&volume=&window=`` | one slice as an image |
| ``POST /studies/NAME/questions`` | lines of JSON: ``waiting``, ``text`` so far, and at last ``answer`` or ``error`` |
| ``POST /studies/NAME/answers/N/attention`` | lines of JSON: ``waiting``, and at last ``attention`` or ``error`` |
| ``POST /studies/NAME/forget`` | removes its files |

Errors are ``{"error": TEXT}``. Requests are not logged: their names and addresses lead to patients' images.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event
from typing import Any, Optional, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from pydantic import Field, ValidationError

from umed_plugin.commands.serve.access import refusal
from umed_plugin.commands.serve.dialogue import Dialogue
from umed_plugin.commands.serve.line import Line
from umed_plugin.commands.serve.shelf import Case, Shelf
from umed_plugin.commands.serve.studies import View
from umed_plugin.errors import UmedError
from umed_plugin.faults import StrictModel

SHOWN_SIDE = 1280  # pixels of a picture's longer side in the browser
_MOST_JSON = 1 << 18
_SILENCE = 60  # seconds after which a connection that says nothing is closed
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    # Nothing from elsewhere, no frames, nothing kept: the images are patients'.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Question(StrictModel):
    """The body of a question: what it is about, what was said before, and the question."""

    item: int = 0
    axis: int = 2
    slice: int = 0
    volume: int = 0
    window: str = "file"
    turns: list[tuple[str, str]] = Field(default=[], max_length=50)
    question: str = Field(min_length=1, max_length=4000)


class Ending(Exception):
    """The server is being stopped."""


class _Refused(Exception):
    """A request that gets an error: its status and text."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class ChatState(Protocol):
    """What all connections share; `umed_plugin.commands.serve.server.ChatServer` holds it."""

    dialogue: Dialogue
    shelf: Shelf
    about: dict[str, Any]
    line: Line
    ending: Event
    own_name: str


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "umed", ""
    timeout = _SILENCE
    server: ChatState  # type: ignore[assignment]

    def do_GET(self) -> None:
        self._handle(self._get)

    def do_POST(self) -> None:
        self._handle(self._post)

    def do_PUT(self) -> None:
        self._handle(self._put)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def _handle(self, route: Callable[[str, list[str], dict[str, str]], None]) -> None:
        """Check who asks, find the route, and turn errors into answers."""
        self._replied = False
        self._unread = _whole_number(self.headers.get("Content-Length"))
        asked = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(asked.query).items()}
        host, origin, site = (self.headers.get(name) for name in ("Host", "Origin", "Sec-Fetch-Site"))
        try:
            reason = refusal(host, origin, site, self.server.own_name)
            if reason is not None:
                raise _Refused(HTTPStatus.FORBIDDEN, reason)
            route(asked.path, [unquote(part) for part in asked.path.split("/")[1:]], query)
        except _Refused as refused:
            self._error(refused.status, str(refused))
        except UmedError as error:
            self._error(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        finally:
            if not self._replied:
                self._error(
                    HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong in umed serve; its terminal says where."
                )

    # Routes.

    def _get(self, path: str, parts: list[str], query: dict[str, str]) -> None:
        if path in _FILES:
            name, kind = _FILES[path]
            return self._reply(HTTPStatus.OK, _page_file(name, self.server.about), f"{kind}; charset=utf-8")
        if path == "/favicon.ico":
            return self._reply(HTTPStatus.NO_CONTENT, b"", "")
        case = self._case(parts)
        if parts[2:] != ["picture"]:
            raise _Refused(HTTPStatus.NOT_FOUND, "There is no such page.")
        picture = case.opened().picture(_view(query))
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        held = io.BytesIO()
        picture.save(held, format="JPEG", quality=92, subsampling=0)
        return self._reply(HTTPStatus.OK, held.getvalue(), "image/jpeg")

    def _put(self, path: str, parts: list[str], query: dict[str, str]) -> None:
        case = self._case(parts)
        if parts[2:] != ["files"]:
            raise _Refused(HTTPStatus.NOT_FOUND, "There is no such page.")
        length = self._length()
        with case.busy:
            if case.study is not None:
                raise _Refused(HTTPStatus.CONFLICT, "This upload is complete. Begin another one.")
            case.uploads.take(self.rfile, length, query.get("name", "file"))
            self._unread = 0
        self._json({"files": len(case.uploads.files)})

    def _post(self, path: str, parts: list[str], query: dict[str, str]) -> None:
        if parts == ["studies"]:
            self._body()
            return self._json({"study": self.server.shelf.begin().name})
        case = self._case(parts)
        body = self._body()
        if parts[2:] == ["open"]:
            return self._json(case.opened().described())
        if parts[2:] == ["forget"]:
            return self._forget(case)
        if parts[2:] == ["questions"]:
            return self._ask(case, _question(body))
        if len(parts) == 5 and parts[2] == "answers" and parts[4] == "attention":
            answer = case.answer(_whole_number(parts[3]) or 0)
            return self._stream(lambda tell: {"attention": self.server.dialogue.attention(answer)})
        raise _Refused(HTTPStatus.NOT_FOUND, "There is no such page.")

    def _forget(self, case: Case) -> None:
        self.server.shelf.forget(case.name)
        self._json({})  # a page that is being closed does not wait
        with self.server.line.turn(lambda before: None):
            self.server.dialogue.forget(case.owns)

    def _ask(self, case: Case, question: Question) -> None:
        view = View(question.item, question.axis, question.slice, question.volume, question.window)
        picture = case.opened().picture(view)
        dialogue = self.server.dialogue

        def work(tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
            answer = dialogue.answer(
                case.key(view), picture, question.turns, question.question, lambda text: tell({"text": text})
            )
            number = case.keep(answer)
            shown = {"number": number, "text": answer.text, "boxes": answer.boxes, "forgotten": answer.forgotten}
            return {"answer": {**shown, "size": picture.size}}

        self._stream(work)

    def _stream(self, work: Callable[[Callable[[dict[str, Any]], None]], dict[str, Any]]) -> None:
        """Wait for the model, do the work with it, and tell how it goes, a line of JSON at a time."""
        self._begin(HTTPStatus.OK, "application/x-ndjson", None)

        def tell(said: dict[str, Any]) -> None:
            if self.server.ending.is_set():
                raise Ending
            self.wfile.write(json.dumps(said).encode() + b"\n")

        try:
            with self.server.line.turn(lambda before: tell({"waiting": before})):
                tell({"waiting": 0})
                found = work(tell)
            tell(found)
        except UmedError as error:
            tell({"error": str(error)})

    # Parts of a request.

    def _case(self, parts: list[str]) -> Case:
        case = self.server.shelf.find(parts[1]) if parts[0] == "studies" and len(parts) > 2 else None
        if case is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "These images are not on the server any more. Choose them again.")
        return case

    def _length(self) -> int:
        if self._unread is None:
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "The request does not say how long it is.")
        return self._unread

    def _body(self) -> bytes:
        length = self._length()
        if length > _MOST_JSON:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request is too long.")
        self._unread = 0
        return self.rfile.read(length)

    # Parts of an answer.

    def _json(self, content: dict[str, Any]) -> None:
        self._reply(HTTPStatus.OK, json.dumps(content).encode(), "application/json")

    def _error(self, status: HTTPStatus, text: str) -> None:
        if not self._replied:
            self._reply(status, json.dumps({"error": text}).encode(), "application/json")

    def _reply(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self._begin(status, kind, len(content))
        self.wfile.write(content)

    def _begin(self, status: HTTPStatus, kind: str, length: Optional[int]) -> None:
        """Status and headers; without a length, or with a body that nobody read, the connection ends with the answer."""
        self._replied = True
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if kind:
            self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if length is None or (self._unread or 0) > 0:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()


def _page_file(name: str, about: dict[str, Any]) -> bytes:
    folder = Path(__file__).parent
    if not name.endswith(".html"):
        return (folder / name).read_bytes()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(name).render(about).encode()


def _view(query: dict[str, str]) -> View:
    numbers = {name: _whole_number(query.get(name)) for name in ("item", "axis", "slice", "volume")}
    if None in numbers.values():
        raise _Refused(HTTPStatus.BAD_REQUEST, "item, axis, slice and volume are needed, as whole numbers.")
    return View(window=query.get("window", "file"), **numbers)  # type: ignore[arg-type]


def _question(body: bytes) -> Question:
    try:
        return Question.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the request"
        raise _Refused(HTTPStatus.BAD_REQUEST, f"{place}: {first['msg']}.") from error


def _whole_number(text: Optional[str]) -> Optional[int]:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 16 else None
