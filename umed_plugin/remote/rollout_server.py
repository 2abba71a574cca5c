"""Requests to a vLLM server that holds the language model and samples answers: ``umed rollout-server`` starts one.

Only the standard library is used, because LLaVA's pins cannot hold vLLM's client. A proxy of the environment is not asked, and a
redirect is followed on the same server only: embedded images go to the address that the user has named and nowhere else.

A lost connection and the statuses 429 and 5xx are tried again, with growing pauses. A reply that does not come in time is
not: the server would sample the same answers twice. Nor is the unloading of an adapter, which may fail. Every other failure is a
`RolloutServerError`, which says what to do.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from umed_plugin.errors import UmedError
from umed_plugin.remote.keys import key_in, without_key
from umed_plugin.remote.redirects import MOST_HOPS, may_follow, origin
from umed_plugin.remote.settings import ROLLOUT_KEY_VARIABLE

_PIECE = 2**20
_MOST_BYTES = 2**30
_SHOWN = 300  # characters of a server's words in a message
_CHECK_SECONDS = 30.0  # for requests that sample nothing
_TRIED_AGAIN = (429, 500, 502, 503, 504)
_KEY_REFUSED = (401, 403)
_KEY_REMEDY = f" Put the server's key (VLLM_API_KEY there) into the environment variable {ROLLOUT_KEY_VARIABLE} here."


class RolloutServerError(UmedError):
    """The rollout server cannot be used."""


class _Refused(RolloutServerError):
    """The server answered with an error status.

    Attributes:
        status: of the answer.
        tried_before: whether an earlier attempt of the same request has failed.
    """

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status, self.tried_before = status, False


@dataclass(frozen=True)
class RolloutServer:
    """A vLLM server on an address such as ``http://127.0.0.1:8000/v1``.

    Attributes:
        url: its address.
        timeout: seconds for one request.
        retries: further attempts after a lost connection or a busy server.
        pause: seconds before the first retry; each further pause is twice as long.
        timeout_flag: flag of the command that sets ``timeout``, for messages; None: the command has none.
        adapters_flag: flag of the command that says where it writes adapters, for messages.
    """

    url: str
    timeout: float = 600.0
    retries: int = 3
    pause: float = 1.0
    timeout_flag: str | None = "--umed_rollout_timeout"
    adapters_flag: str = "--umed_rollout_adapters"

    def base_model(self) -> str:
        """The name under which the server holds the model without an adapter.

        Raises:
            RolloutServerError: it does not answer, or holds no model.
        """
        try:
            listed = self._ask("GET", "/models", None, min(self.timeout, _CHECK_SECONDS))
        except _Refused as error:
            if error.status != 404:
                raise
            behind = "" if urlsplit(self.url).path.rstrip("/").endswith("/v1") else f", {self.url.rstrip('/')}/v1"
            raise RolloutServerError(
                f"{error} The address of a vLLM server ends with /v1{behind}. Is it one, as umed rollout-server CKPT starts it?"
            ) from None
        models = listed.get("data") if isinstance(listed, dict) else None
        for model in models if isinstance(models, list) else ():
            if isinstance(model, dict) and isinstance(model.get("id"), str) and not model.get("parent"):
                return str(model["id"])
        raise RolloutServerError(f"{self.url}: lists no model. Start a server with: umed rollout-server CKPT")

    def complete(self, body: Mapping[str, Any]) -> list[Any]:
        """The choices of ``POST /completions``, in the server's order.

        Raises:
            RolloutServerError: the server is gone, slow, refuses, or another model has answered.
        """
        try:
            reply = self._ask("POST", "/completions", body, self.timeout)
        except _Refused as error:
            if error.status != 404:
                raise
            raise RolloutServerError(
                f"{error} The model {body['model']!r} is not loaded there (any more): was the server started anew?"
            ) from None
        answered = reply.get("model") if isinstance(reply, dict) else None
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list):
            raise RolloutServerError(f"{self.url}: the reply is not a completion. Is it a vLLM server?")
        if answered != body["model"]:
            raise RolloutServerError(
                f"{self.url}: {_shown(answered)!r} has answered, and not {body['model']!r}. Is something between this run and "
                "the server that chooses models?"
            )
        return choices

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load a LoRA adapter at run time.

        Raises:
            RolloutServerError: the server is gone, slow, busy, cannot, or does not allow it.
        """
        body = {"lora_name": name, "lora_path": str(folder.resolve())}
        try:
            self._ask("POST", "/load_lora_adapter", body, self.timeout)
        except _Refused as error:
            if error.tried_before and "already been loaded" in str(error):
                return  # by an earlier attempt, whose reply was lost
            if error.status in (*_TRIED_AGAIN, *_KEY_REFUSED) or error.status >= 500 or error.status < 400:
                raise
            raise RolloutServerError(
                f"{error} The adapter in {folder} could not be loaded. The server needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, "
                "--enable-lora, a --max-lora-rank of at least the adapter's rank, and must see and read that folder. `umed "
                f"rollout-server CKPT` sets the first three; {self.adapters_flag} names another folder."
            ) from None

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; one that the server does not have is forgotten already.

        Raises:
            RolloutServerError: the server does not answer.
        """
        try:
            self._ask("POST", "/unload_lora_adapter", {"lora_name": name}, min(self.timeout, _CHECK_SECONDS), times=0)
        except _Refused as error:
            if error.status != 404:
                raise

    def _ask(self, method: str, path: str, body: Any, timeout: float, times: int | None = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        pause, times = self.pause, self.retries if times is None else times
        for left in range(times, -1, -1):
            try:
                return self._once(method, path, content, timeout)
            except _Refused as error:
                error.tried_before = left < times
                if error.status not in _TRIED_AGAIN or not left:
                    raise
            except (TimeoutError, socket.timeout):  # in Python 3.9 two types
                remedy = (
                    "Give the same command again"
                    if self.timeout_flag is None
                    else f"Allow more with {self.timeout_flag}"
                )
                raise RolloutServerError(
                    f"{self.url}: no reply within {timeout:g} s. The first request after its start may compile for minutes. "
                    f"{remedy}, or see what the server prints."
                ) from None
            except (OSError, http.client.HTTPException) as error:
                if not left:
                    raise RolloutServerError(
                        f"{self.url}: cannot be reached ({_shown(error) or type(error).__name__}). Is the server running? Start "
                        "it with: umed rollout-server CKPT"
                    ) from None
            time.sleep(pause)
            pause *= 2
        raise AssertionError("the last attempt returns or raises")

    def _once(self, method: str, path: str, content: bytes | None, timeout: float) -> Any:
        asked, end = self.url.rstrip("/") + path, time.monotonic() + timeout
        for left in range(MOST_HOPS, -1, -1):
            response, read = self._sent(method, asked, content, end)
            target = _target(response, asked)
            if target is None or not left or not may_follow(response.status, asked, target):
                break
            asked = target
        if response.status != 200:
            words = self._not_followed(target, path) or _words_of(read)
            said = f"{self.url}{path}: HTTP {response.status}: {words}."
            raise _Refused(f"{said}{_KEY_REMEDY * (response.status in _KEY_REFUSED)}", response.status)
        if not path.endswith("adapter"):
            return _parsed(read, self.url)
        return None

    def _sent(self, method: str, address: str, content: bytes | None, end: float) -> tuple[Any, bytes]:
        """(reply, its body) of one request, which must be there at the time ``end``."""
        parts = urlsplit(address)
        kind: Callable[..., http.client.HTTPConnection] = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        connection = kind(parts.hostname or "", parts.port, timeout=max(end - time.monotonic(), 0.001))
        try:
            where = f"{parts.path}?{parts.query}" if parts.query else parts.path
            connection.request(method, where, content, self._headers())
            response = connection.getresponse()
            return response, _read_all(response, end)
        finally:
            connection.close()

    def _not_followed(self, target: str | None, path: str) -> str:
        """What to say of a redirect that is not followed; empty for other replies."""
        if target is None:
            return ""
        address = f"{origin(target)}{urlsplit(target).path.rstrip('/').removesuffix(path)}"
        if address == self.url.rstrip("/"):
            return f"the server sends the request on to itself. {MOST_HOPS} times are followed, if the status is 307 or 308"
        return (
            "the server sends the request on to another one, which is not followed. If that is the right one, give its address: "
            f"{_shown(address)}"
        )

    def _headers(self) -> dict[str, str]:
        key = key_in(ROLLOUT_KEY_VARIABLE)
        return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}


def _target(response: http.client.HTTPResponse, asked: str) -> str | None:
    """Where a reply sends the request for the address ``asked``; None if it does not, to no address or to this one."""
    location = response.headers.get("Location", "")
    if not 300 <= response.status < 400 or not location.isascii():
        return None
    try:
        target = urljoin(asked, location)
        return target if urlsplit(target).port != 0 and target != asked else None
    except ValueError:
        return None


def _read_all(response: http.client.HTTPResponse, end: float) -> bytes:
    """The body, unless it is still coming at the time ``end``: a server that drips never lets a single read time out.

    A connection that breaks looks like the end to ``read1``. It is a lost connection, and the request is sent again.
    """
    pieces, size = [], 0
    while piece := response.read1(_PIECE):
        pieces.append(piece)
        size += len(piece)
        if time.monotonic() > end:
            raise TimeoutError
        if size > _MOST_BYTES:
            raise http.client.HTTPException(f"a reply of more than {_MOST_BYTES} bytes")
    if response.length:
        raise http.client.IncompleteRead(b"".join(pieces), response.length)
    return b"".join(pieces)


def _parsed(content: bytes, url: str) -> Any:
    try:
        return json.loads(content)
    except (RecursionError, ValueError):
        raise RolloutServerError(f"{url}: the reply is not JSON. Is it a vLLM server?") from None


def _words_of(content: bytes) -> str:
    """What a server says in an error, on one line; vLLM puts it under ``error.message``."""
    try:
        told = json.loads(content)
        told = told.get("error", told)
        text = told.get("message", told) if isinstance(told, dict) else told
    except (AttributeError, RecursionError, ValueError):
        text = content.decode("utf-8", "replace")
    return _shown(text).rstrip(".") or "no reason given"


def _shown(text: Any) -> str:
    """What a server or a library says, on one line, without the key."""
    return " ".join(without_key(key_in(ROLLOUT_KEY_VARIABLE), str(text)).split())[:_SHOWN]
