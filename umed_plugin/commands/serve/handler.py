"""The chat page over HTTP: uploads, pictures, questions.

| request | response |
| --- | --- |
| ``GET /`` and ``/page.css``, ``/page.js`` | the page |
| ``POST /studies`` | ``{"study": NAME}`` |
| ``PUT /studies/NAME/files?name=N`` | stores one file; the body is its raw bytes |
| ``POST /studies/NAME/open`` | the images in the files |
| ``GET /studies/NAME/picture?item=&axis=&slice=&volume=&window=`` | one slice as a JPEG |
| ``POST /studies/NAME/questions`` | lines of JSON: ``waiting``, ``text`` so far, finally ``answer`` or ``error`` |
| ``POST /studies/NAME/answers/N/attention`` | lines of JSON: ``waiting``, finally ``attention`` or ``error`` |
| ``GET /studies/NAME/window?item=&axis=&slice=&volume=&window=`` | ``{"low": L, "high": H}`` of a slice's window |
| ``POST /studies/NAME/forget`` | removes its files |

Errors are ``{"error": TEXT}``. Requests are not logged: file names and URLs would give access to patients' images.
"""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event
from typing import Any, Optional, Protocol, TypeVar
from urllib.parse import parse_qs, unquote

from pydantic import Field, ValidationError

from umed_plugin.commands.page_parts import PARTS, joined
from umed_plugin.commands.serve.access import new_cookie, person, refusal, split_or_none
from umed_plugin.commands.serve.dialogue import Dialogue
from umed_plugin.commands.serve.line import Line
from umed_plugin.commands.serve.shelf import Case, Full, Shelf
from umed_plugin.commands.serve.views import View
from umed_plugin.errors import UmedError
from umed_plugin.faults import StrictModel

SHOWN_SIDE = 1280  # longer side of a picture in the browser, in pixels
_MOST_JSON = 1 << 18
_GONE = "These images are no longer on the server. Choose them again."
_SILENCE = 60  # seconds without data after which a connection is closed
_Model = TypeVar("_Model", bound=StrictModel)
_OWN = Path(__file__).parent
# In this order: ``page.js`` uses the others as soon as it runs.
_SCRIPTS = ("requests", "pane", "answers", "saving", "choosing", "overlays", "asking", "page")
_FILES = {
    "/page.css": ((PARTS / "colours.css", _OWN / "page.css"), "text/css"),
    "/page.js": (
        (
            PARTS / "elements.js",
            PARTS / "heat.js",
            *(_OWN / f"{name}.js" for name in _SCRIPTS),
        ),
        "text/javascript",
    ),
}
_HEADERS = {
    # Nothing from other sites, no frames, nothing cached: these are images of patients.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class ChatRequest(StrictModel):
    """The JSON body of a question: the model that is asked, the view it is about, the earlier turns, and the question."""

    model: int = Field(default=0, ge=0)
    item: int = 0
    axis: int = 2
    slice: int = 0
    volume: int = 0
    window: str = "file"
    turns: list[tuple[str, str]] = Field(default=[], max_length=50)
    question: str = Field(min_length=1, max_length=4000)


class AttentionRequest(StrictModel):
    """The JSON body of a request for an answer's attention."""

    mask_sinks: bool = False


class Ending(Exception):
    """The server is shutting down."""


class _Refused(Exception):
    """A request that is answered with an error status and text."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class ChatState(Protocol):
    """The state that all connections share; `umed_plugin.commands.serve.server.ChatServer` implements it."""

    dialogues: Sequence[Dialogue]
    shelf: Shelf
    about: dict[str, Any]
    line: Line
    ending: Event
    own_name: str


class Handler(BaseHTTPRequestHandler):
    """Handles the requests of one connection."""

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
        """Log nothing."""

    def _handle(self, route: Callable[[str, list[str], dict[str, str]], None]) -> None:
        """Check the headers, call the route, and turn errors into responses."""
        self._replied = False
        lengths = self.headers.get_all("Content-Length", [])
        self._unread = (
            _whole_number(lengths[0]) if len(lengths) == 1 and "Transfer-Encoding" not in self.headers else None
        )
        # Where the body ends is not known then, so that what follows cannot be told from the next request.
        self._unreadable = self._unread is None and (lengths != [] or "Transfer-Encoding" in self.headers)
        host, origin, site = (self.headers.get(name) for name in ("Host", "Origin", "Sec-Fetch-Site"))
        try:
            reason = refusal(host, origin, site, self.server.own_name)
            if reason is not None:
                raise _Refused(HTTPStatus.FORBIDDEN, reason)
            address = split_or_none(self.path)
            if address is None:
                raise _Refused(HTTPStatus.BAD_REQUEST, "This is not an address. Reload the chat page.")
            query = {name: values[-1] for name, values in parse_qs(address.query).items()}
            route(address.path, [unquote(part) for part in address.path.split("/")[1:]], query)
        except _Refused as refused:
            self._error(refused.status, str(refused))
        except UmedError as error:
            self._error(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        finally:
            if not self._replied:
                self._error(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error in umed serve. Its terminal shows where.")

    # Routes.

    def _get(self, path: str, parts: list[str], query: dict[str, str]) -> None:
        if path == "/":
            cookie = new_cookie(self.headers.get("Cookie"))
            return self._reply(HTTPStatus.OK, page_html(self.server.about), "text/html; charset=utf-8", cookie)
        if path in _FILES:
            files, kind = _FILES[path]
            return self._reply(HTTPStatus.OK, joined(files).encode(), f"{kind}; charset=utf-8")
        if path == "/favicon.ico":
            return self._reply(HTTPStatus.NO_CONTENT, b"", "")
        if parts[2:] not in (["picture"], ["window"]):
            raise _Refused(HTTPStatus.NOT_FOUND, "There is no such page. Reload the chat page.")
        if parts[2:] == ["window"]:
            with self._case(parts) as case:
                low, high = case.opened().window_range(_view(query))
            return self._json({"low": low, "high": high})
        with self._case(parts) as case:
            picture = case.opened().picture(_view(query))
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        jpeg = io.BytesIO()
        picture.save(jpeg, format="JPEG", quality=92, subsampling=0)
        return self._reply(HTTPStatus.OK, jpeg.getvalue(), "image/jpeg")

    def _put(self, path: str, parts: list[str], query: dict[str, str]) -> None:
        if parts[2:] != ["files"]:
            raise _Refused(HTTPStatus.NOT_FOUND, "There is no such page. Reload the chat page.")
        length = self._length()
        with self._case(parts) as case, case.busy:
            if case.study is not None:
                raise _Refused(HTTPStatus.CONFLICT, "This upload is already complete. Start a new one.")
            self._store(case, length, query.get("name", "file"))
            self._unread = 0
            held = len(case.uploads.files)
        self._json({"files": held})

    def _store(self, case: Case, length: int, name: str) -> None:
        try:
            case.uploads.take(self.rfile, length, name)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _Refused(
                    HTTPStatus.INSUFFICIENT_STORAGE, "The server's disk is full. Send fewer images."
                ) from error
            if isinstance(error, FileNotFoundError):  # the page has given the upload up meanwhile
                raise _Refused(HTTPStatus.NOT_FOUND, _GONE) from error
            raise

    def _post(self, path: str, parts: list[str], query: dict[str, str]) -> None:
        content: Optional[dict[str, Any]]
        if parts == ["studies"]:
            self._body()
            try:
                content = {"study": self.server.shelf.begin(self._person()).name}
            except Full as full:
                raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, str(full)) from full
        else:
            with self._case(parts) as case:
                content = self._post_to(case, parts)
        if content is not None:  # after the case is released: the next request may need its place
            self._json(content)

    def _post_to(self, case: Case, parts: list[str]) -> Optional[dict[str, Any]]:
        """Do what is asked; the response's content, or None when it has been sent."""
        body = self._body()
        if parts[2:] == ["open"]:
            return case.opened().described()
        if parts[2:] == ["forget"]:
            self._forget(case)
        elif parts[2:] == ["questions"]:
            self._ask(case, _read(ChatRequest, body))
        elif len(parts) == 5 and parts[2] == "answers" and parts[4] == "attention":
            model, answer = case.answer(_whole_number(parts[3]) or 0)
            masked = _read(AttentionRequest, body).mask_sinks
            self._stream(lambda tell: {"attention": self.server.dialogues[model].attention(answer, masked)})
        else:
            raise _Refused(HTTPStatus.NOT_FOUND, "There is no such page. Reload the chat page.")
        return None

    def _forget(self, case: Case) -> None:
        self.server.shelf.forget(case.name)
        self._json({})  # respond first: a closing page does not wait
        with self.server.line.turn(lambda before: None):
            for dialogue in self.server.dialogues:
                dialogue.forget(case.owns)

    def _ask(self, case: Case, request: ChatRequest) -> None:
        view = View(request.item, request.axis, request.slice, request.volume, request.window)
        if request.model >= len(self.server.dialogues):
            raise _Refused(
                HTTPStatus.BAD_REQUEST, f"model: {request.model}. This server has {len(self.server.dialogues)}."
            )
        picture = case.opened().picture(view)
        dialogue = self.server.dialogues[request.model]

        def work(tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
            answer = dialogue.answer(
                case.key(view), picture, request.turns, request.question, lambda text: tell({"text": text})
            )
            number = case.keep(answer, request.model)
            shown = {"number": number, "text": answer.text, "boxes": answer.boxes, "places": answer.places}
            return {"answer": {**shown, "forgotten": answer.forgotten, "cut": answer.cut, "size": picture.size}}

        self._stream(work)

    def _stream(self, work: Callable[[Callable[[dict[str, Any]], None]], dict[str, Any]]) -> None:
        """Wait for the model, run ``work`` with it, and stream the progress as lines of JSON."""
        self._begin(HTTPStatus.OK, "application/x-ndjson", None)

        def tell(message: dict[str, Any]) -> None:
            if self.server.ending.is_set():
                raise Ending
            self.wfile.write(json.dumps(message).encode() + b"\n")

        try:
            with self.server.line.turn(lambda before: tell({"waiting": before})):
                tell({"waiting": 0})
                result = work(tell)
            tell(result)
        except UmedError as error:
            tell({"error": str(error)})

    # Parts of a request.

    def _person(self) -> str:
        return person(self.headers.get("Cookie"), str(self.client_address[0]))

    @contextmanager
    def _case(self, parts: list[str]) -> Iterator[Case]:
        name = parts[1] if parts[0] == "studies" and len(parts) > 2 else ""
        with self.server.shelf.using(name, self._person()) as case:
            if case is None:
                raise _Refused(HTTPStatus.NOT_FOUND, _GONE)
            yield case

    def _length(self) -> int:
        if self._unread is None:
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing or is not a whole number.")
        return self._unread

    def _body(self) -> bytes:
        length = self._length()
        if length > _MOST_JSON:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The request is too long: {length} bytes. Allowed: {_MOST_JSON}."
            )
        self._unread = 0
        return self.rfile.read(length)

    # Parts of a response.

    def _json(self, content: dict[str, Any]) -> None:
        self._reply(HTTPStatus.OK, json.dumps(content).encode(), "application/json")

    def _error(self, status: HTTPStatus, text: str) -> None:
        if not self._replied:
            self._reply(status, json.dumps({"error": text}).encode(), "application/json")

    def _reply(self, status: HTTPStatus, content: bytes, kind: str, cookie: Optional[str] = None) -> None:
        self._begin(status, kind, len(content), cookie)
        self.wfile.write(content)

    def _begin(self, status: HTTPStatus, kind: str, length: Optional[int], cookie: Optional[str] = None) -> None:
        """Send status and headers. Without a length, or behind a request body that is unread, the connection closes."""
        self._replied = True
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if kind:
            self.send_header("Content-Type", kind)
        if cookie:
            self.send_header("Set-Cookie", cookie)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if length is None or self._unreadable or (self._unread or 0) > 0:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()


def page_html(about: dict[str, Any]) -> bytes:
    """The page for a server with this checkpoint, limit of uploads and suggested questions."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(_OWN), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html").render(about).encode()


def _view(query: dict[str, str]) -> View:
    numbers = {name: _whole_number(query.get(name)) for name in ("item", "axis", "slice", "volume")}
    if None in numbers.values():
        raise _Refused(HTTPStatus.BAD_REQUEST, "item, axis, slice and volume must all be given, as whole numbers.")
    return View(window=query.get("window", "file"), **numbers)  # type: ignore[arg-type]


def _read(kind: type[_Model], body: bytes) -> _Model:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the request"
        raise _Refused(HTTPStatus.BAD_REQUEST, f"{key}: {first['msg']}.") from error


def _whole_number(text: Optional[str]) -> Optional[int]:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 16 else None
