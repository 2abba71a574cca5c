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

``HEAD`` is answered as ``GET`` is, without the body. Errors are ``{"error": TEXT}``; to a method that the path does not take, 405
and the header ``Allow``. Requests are not logged: file names and URLs would give access to patients' images.
"""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from threading import Event
from typing import Any, Optional, Protocol
from urllib.parse import parse_qs, unquote

from umed_plugin.commands.serve.access import new_cookie, person, refusal, split_or_none
from umed_plugin.commands.serve.dialogue import Dialogue
from umed_plugin.commands.serve.line import Line
from umed_plugin.commands.serve.page_files import FILES, page_file, page_html
from umed_plugin.commands.serve.requests import (
    AttentionRequest,
    ChatRequest,
    Refused,
    check_method,
    read_body,
    view_of,
    whole_number,
)
from umed_plugin.commands.serve.shelf import Case, Full, Shelf
from umed_plugin.commands.serve.views import View
from umed_plugin.errors import UmedError

SHOWN_SIDE = 1280  # longer side of a picture in the browser, in pixels
_MOST_JSON = 1 << 18
_GONE = "These images are no longer on the server. Choose them again."
_SILENCE = 60  # seconds without data after which a connection is closed
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


class Ending(Exception):
    """The server is shutting down."""


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
    _unread: Optional[int]  # bytes of the request's body; None if that is not known

    def do_GET(self) -> None:
        self._handle(self._get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._handle(self._post)

    def do_PUT(self) -> None:
        self._handle(self._put)

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        """Called by ``http.server`` for a method without a function above, and for what is no request of HTTP."""
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self._handle(self._get)  # refused before that: no path takes the method
        else:
            # Its headers are not read, so where it ends is not known. To a version that is not read no status would be sent.
            self._replied, self._unread, self._unreadable = False, None, True
            self.request_version = self.protocol_version
            status = HTTPStatus(code)
            self._error(status, f"This is no request that can be read: {status.phrase}. Reload the chat page.")

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def _handle(self, route: Callable[[str, list[str], dict[str, str]], None]) -> None:
        """Check the headers, call the route, and turn errors into responses."""
        self._replied = False
        lengths = self.headers.get_all("Content-Length", [])
        self._unread = (
            whole_number(lengths[0]) if len(lengths) == 1 and "Transfer-Encoding" not in self.headers else None
        )
        # Where the body ends is not known then, so that what follows cannot be told from the next request.
        self._unreadable = self._unread is None and (lengths != [] or "Transfer-Encoding" in self.headers)
        host, origin, site = (self.headers.get(name) for name in ("Host", "Origin", "Sec-Fetch-Site"))
        try:
            reason = refusal(host, origin, site, self.server.own_name)
            if reason is not None:
                raise Refused(HTTPStatus.FORBIDDEN, reason)
            address = split_or_none(self.path)
            if address is None:
                raise Refused(HTTPStatus.BAD_REQUEST, "This is not an address. Reload the chat page.")
            query = {name: values[-1] for name, values in parse_qs(address.query).items()}
            parts = [unquote(part) for part in address.path.split("/")[1:]]
            check_method(self.command, address.path, parts)
            route(address.path, parts, query)
        except Refused as refused:
            self._error(refused.status, str(refused), refused.headers)
        except UmedError as error:
            self._error(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        finally:
            if not self._replied:
                self._error(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error in umed serve. Its terminal shows where.")

    # Routes.

    def _get(self, path: str, parts: list[str], query: dict[str, str]) -> None:
        if path == "/":
            cookie = new_cookie(self.headers.get("Cookie"))
            headers = {"Set-Cookie": cookie} if cookie else None
            return self._reply(HTTPStatus.OK, page_html(self.server.about), "text/html; charset=utf-8", headers)
        if path in FILES:
            return self._reply(HTTPStatus.OK, *page_file(path))
        if path == "/favicon.ico":
            return self._reply(HTTPStatus.NO_CONTENT, b"", "")
        if parts[2:] == ["window"]:
            with self._case(parts) as case:
                low, high = case.opened().window_range(view_of(query))
            return self._json({"low": low, "high": high})
        with self._case(parts) as case:
            picture = case.opened().picture(view_of(query))
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        jpeg = io.BytesIO()
        picture.save(jpeg, format="JPEG", quality=92, subsampling=0)
        return self._reply(HTTPStatus.OK, jpeg.getvalue(), "image/jpeg")

    def _put(self, path: str, parts: list[str], query: dict[str, str]) -> None:
        length = self._length()
        with self._case(parts) as case, case.busy:
            if case.study is not None:
                raise Refused(HTTPStatus.CONFLICT, "This upload is already complete. Start a new one.")
            self._store(case, length, query.get("name", "file"))
            self._unread = 0
            held = len(case.uploads.files)
        self._json({"files": held})

    def _store(self, case: Case, length: int, name: str) -> None:
        try:
            case.uploads.take(self.rfile, length, name)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Refused(
                    HTTPStatus.INSUFFICIENT_STORAGE, "The server's disk is full. Send fewer images."
                ) from error
            if isinstance(error, FileNotFoundError):  # the page has given the upload up meanwhile
                raise Refused(HTTPStatus.NOT_FOUND, _GONE) from error
            raise

    def _post(self, path: str, parts: list[str], query: dict[str, str]) -> None:
        content: Optional[dict[str, Any]]
        if parts == ["studies"]:
            self._body()
            try:
                content = {"study": self.server.shelf.begin(self._person()).name}
            except Full as full:
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, str(full)) from full
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
            self._ask(case, read_body(ChatRequest, body))
        else:
            model, answer = case.answer(whole_number(parts[3]) or 0)
            masked = read_body(AttentionRequest, body).mask_sinks
            self._stream(lambda tell: {"attention": self.server.dialogues[model].attention(answer, masked)})
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
            raise Refused(
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
        with self.server.shelf.using(parts[1], self._person()) as case:
            if case is None:
                raise Refused(HTTPStatus.NOT_FOUND, _GONE)
            yield case

    def _length(self) -> int:
        if self._unread is None:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing or is not a whole number.")
        return self._unread

    def _body(self) -> bytes:
        length = self._length()
        if length > _MOST_JSON:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The request is too long: {length} bytes. Allowed: {_MOST_JSON}."
            )
        self._unread = 0
        return self.rfile.read(length)

    # Parts of a response.

    def _json(self, content: dict[str, Any]) -> None:
        self._reply(HTTPStatus.OK, json.dumps(content).encode(), "application/json")

    def _error(self, status: HTTPStatus, text: str, headers: Optional[Mapping[str, str]] = None) -> None:
        if not self._replied:
            self._reply(status, json.dumps({"error": text}).encode(), "application/json", headers)

    def _reply(
        self, status: HTTPStatus, content: bytes, kind: str, headers: Optional[Mapping[str, str]] = None
    ) -> None:
        self._begin(status, kind, len(content), headers)
        if self.command != "HEAD":
            self.wfile.write(content)

    def _begin(
        self, status: HTTPStatus, kind: str, length: Optional[int], headers: Optional[Mapping[str, str]] = None
    ) -> None:
        """Send status and headers. Without a length, or behind a request body that is unread, the connection closes."""
        self._replied = True
        self.send_response(status)
        for name, value in {**_HEADERS, **(headers or {})}.items():
            self.send_header(name, value)
        if kind:
            self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if length is None or self._unreadable or (self._unread or 0) > 0:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
