"""What a request may be: the methods of each path, the JSON of a body, the numbers of an address; and how others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Optional, TypeVar

from pydantic import Field, ValidationError

from umed_plugin.commands.serve.page_files import FILES
from umed_plugin.commands.serve.views import View
from umed_plugin.faults import StrictModel

_Model = TypeVar("_Model", bound=StrictModel)


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


class Refused(Exception):
    """A request that is answered with an error status and text, and perhaps further headers."""

    def __init__(self, status: HTTPStatus, text: str, headers: Optional[Mapping[str, str]] = None) -> None:
        super().__init__(text)
        self.status, self.headers = status, headers


def check_method(method: str, path: str, parts: list[str]) -> None:
    """Refuse a path that nothing is behind, and a method that it does not take."""
    allowed = _methods(path, parts)
    if not allowed:
        raise Refused(HTTPStatus.NOT_FOUND, "There is no such page. Reload the chat page.")
    if method not in allowed:
        listed = ", ".join(allowed)
        text = f"{method} is not allowed here. Allowed: {listed}. Reload the chat page."
        raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, text, {"Allow": listed})


def _methods(path: str, parts: list[str]) -> tuple[str, ...]:
    """The methods that a path takes; none if nothing is behind it."""
    if path in ("/", "/favicon.ico", *FILES):
        return ("GET", "HEAD")
    if parts == ["studies"]:
        return ("POST",)
    if parts[:1] != ["studies"]:
        return ()
    of_study = parts[2:]
    if of_study in (["picture"], ["window"]):
        return ("GET", "HEAD")
    if of_study == ["files"]:
        return ("PUT",)
    is_attention = len(of_study) == 3 and of_study[0] == "answers" and of_study[2] == "attention"
    return ("POST",) if is_attention or of_study in (["open"], ["forget"], ["questions"]) else ()


def view_of(query: dict[str, str]) -> View:
    """The view that an address asks for."""
    numbers = {name: whole_number(query.get(name)) for name in ("item", "axis", "slice", "volume")}
    if None in numbers.values():
        raise Refused(HTTPStatus.BAD_REQUEST, "item, axis, slice and volume must all be given, as whole numbers.")
    return View(window=query.get("window", "file"), **numbers)  # type: ignore[arg-type]


def read_body(kind: type[_Model], body: bytes) -> _Model:
    """The JSON body of a request."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the request"
        raise Refused(HTTPStatus.BAD_REQUEST, f"{key}: {first['msg']}.") from error


def whole_number(text: Optional[str]) -> Optional[int]:
    """The number that a text of digits spells, else None."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 16 else None
