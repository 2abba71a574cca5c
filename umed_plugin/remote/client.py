"""Requests to a model on an OpenAI-compatible server, many at a time, from a thread of their own.

The ``openai`` package retries connection errors, timeouts, 408, 409, 429 and 5xx. Its pauses grow, are jittered, and follow the
server's ``Retry-After``. In addition, the rate limit that one response reports holds for all waiting requests
(:class:`_RateLimit`). The API key comes from the environment, is passed only to that package, and is removed from every text that
the server sends.

The thread is a daemon with an event loop. When the process ends, also by an error or Ctrl-C, requests that were not sent are
dropped. Requests that were sent are waited for and their replies kept, because they are paid for.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, cast
from urllib.parse import urljoin, urlsplit

import openai
from openai.types.chat import ChatCompletion

from umed_plugin.remote.bounded import BoundedAsyncClient
from umed_plugin.remote.keys import key_in, without_key
from umed_plugin.remote.redirects import origin
from umed_plugin.remote.replies import Failure, Message, Reply, RequestResult, Unreadable
from umed_plugin.remote.settings import KEY_VARIABLE, ServerSettings, address_from_environment, is_count

_LONGEST_PAUSE = 60.0  # seconds; if the server asks for a longer pause, the next request finds out
_NO_KEY = "none"
_SHOWN = 300  # characters of an error in a message
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_ENDPOINTS = re.compile(r"/(chat/completions|files|batches)(/.*)?$")  # behind a server's address
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


class ModelClient:
    """Sends requests to one model.

    Args:
        server: model, address, options, timeout and retries.
        on_reply: called in the client's thread with the request's key and its reply, before the result is available.
        concurrency: maximum number of requests that are with the server at the same time.
        last_wait: seconds to wait for replies in flight when the process ends.
    """

    def __init__(
        self,
        server: ServerSettings,
        on_reply: Callable[[str, Reply], None],
        *,
        concurrency: int = 8,
        last_wait: float = 10.0,
    ) -> None:
        self._server, self._on_reply = server, on_reply
        self._concurrency, self._last_wait = concurrency, last_wait
        self._key = key_from_environment()
        # For a server that sends its reply so slowly that no single read times out.
        self._deadline = (server.retries + 1) * (server.timeout + _LONGEST_PAUSE)
        self._rate_limit = _RateLimit()
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=server.base_url or address_from_environment(),
            timeout=server.timeout,
            max_retries=server.retries,
            http_client=BoundedAsyncClient(
                event_hooks={"request": [self._rate_limit.wait], "response": [self._rate_limit.learn]},
            ),
        )
        self._sent: set[asyncio.Task[Any]] = set()
        self._waiting: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._process = os.getpid()
        self._closing = threading.Lock()
        self._closed = self._stopped = False
        threading.Thread(target=self._run, name="umed-requests", daemon=True).start()
        atexit.register(self.close)

    def ask(self, key: str, messages: Sequence[Message]) -> Future[RequestResult]:
        """Send ``messages`` as soon as fewer than ``concurrency`` requests are in flight.

        The result is a `Failure`, never an exception, when the network or the server fails. After `close` it is cancelled. The
        key, a digest, is sent as ``X-Client-Request-Id``, so that the server's log can be compared with the ledger.
        """
        with self._closing:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(self._ask(key, messages), self._loop)
        dropped: Future[RequestResult] = Future()
        dropped.cancel()
        return dropped

    def close(self) -> None:
        """Drop unsent requests, wait up to ``last_wait`` seconds for those in flight, and end the thread.

        A call after that, such as the one at the end of the process, does nothing: it would wait for ever for a coroutine that
        the stopping loop no longer runs.
        """
        if os.getpid() != self._process or self._stopped or not self._loop.is_running():
            return
        with self._closing:
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
        self._stopped = True
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._slots = asyncio.Semaphore(self._concurrency)  # created here: in Python 3.9 it binds to this thread's loop
        self._loop.run_forever()

    async def _ask(self, key: str, messages: Sequence[Message]) -> RequestResult:
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            async with self._slots:
                # From here on the request may be paid for: `_finish` waits for it, and drops those that still wait for a slot.
                self._waiting.discard(task)
                self._sent.add(task)
                result = await self._request(key, messages)
                if isinstance(result, Reply):
                    self._on_reply(key, result)  # kept before anyone sees the result
                return result
        finally:
            self._waiting.discard(task)
            self._sent.discard(task)

    async def _request(self, key: str, messages: Sequence[Message]) -> RequestResult:
        request = self._client.chat.completions.create(
            model=self._server.model,
            messages=cast(Any, list(messages)),
            extra_body=dict(self._server.options),
            extra_headers={"X-Client-Request-Id": key},
        )
        try:
            return read_completion(await asyncio.wait_for(request, self._deadline), self._key)
        except asyncio.TimeoutError:
            return Failure(f"no reply within {self._deadline:g} s, retries included")
        except openai.APIStatusError as error:
            return Failure(short_message(self._key, refused(error)), error.status_code)
        except openai.OpenAIError as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            return Failure(short_message(self._key, f"{error}{cause}"))
        except (RecursionError, ValueError) as error:
            return Unreadable(short_message(self._key, f"the server's reply is not JSON: {error}"))

    async def _finish(self) -> None:
        for task in self._waiting:
            task.cancel()
        if self._sent:
            _, late = await asyncio.wait(set(self._sent), timeout=self._last_wait)
            for task in late:
                task.cancel()
        await self._client.close()


def key_from_environment() -> str:
    """The API key, or a placeholder: the package needs a key even if the user's own server does not.

    Raises:
        UmedError: no header can hold the key.
    """
    return key_in(KEY_VARIABLE) or _NO_KEY


def read_completion(completion: Any, key: str) -> RequestResult:
    """The first choice of a completion. The package does not validate the JSON that a server sends, so this does."""
    choices = completion.choices if isinstance(completion, ChatCompletion) else None
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        return Unreadable(short_message(key, f"the server's reply is not a chat completion: {completion!r}"))
    text = choices[0].message.content
    usage = {name: getattr(completion.usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
    counted = {name: count for name, count in usage.items() if isinstance(count, int) and is_count(count)}
    finish, model = (_without(key, str(value)) for value in (choices[0].finish_reason, completion.model))
    return Reply(_without(key, text) if isinstance(text, str) and text else None, counted, finish, model)


def refused(error: openai.APIStatusError) -> str:
    """What a server says in place of a reply. One that sends requests on to another server is not obeyed."""
    if not 300 <= error.status_code < 400:
        return f"HTTP {error.status_code}: {error.message}"
    try:
        target = urljoin(str(error.request.url), error.response.headers["location"])
        address = f"{origin(target)}{_ENDPOINTS.sub('', urlsplit(target).path)}"
    except (KeyError, ValueError):
        return f"HTTP {error.status_code}: the server sends the request on to an address that cannot be read"
    return (
        f"HTTP {error.status_code}: the server sends the request on to another one, which is not followed. If that is the right "
        f"one, give its address, in training by --umed_judge_base_url: --base-url {address}"
    )


def short_message(key: str, reason: str) -> str:
    """A message of a server or the package on one line, cut to `_SHOWN` characters, without the key."""
    return " ".join(_without(key, reason).split())[:_SHOWN]


def _without(key: str, text: str) -> str:
    """``text`` with the key replaced by stars; the placeholder is no secret, and is a word of many texts."""
    return text if key == _NO_KEY else without_key(key, text)


class _RateLimit:
    """Delays all requests until the time that the server named, with jitter so that they do not all arrive at once."""

    def __init__(self) -> None:
        self._until = 0.0

    async def wait(self, request: Any) -> None:
        """Called before a request is sent."""
        left = self._until - time.monotonic()
        if left > 0:
            await asyncio.sleep(left * random.uniform(1.0, 1.1))

    async def learn(self, response: Any) -> None:
        """Called with each response; reads its headers."""
        pauses = [0.0]
        headers = response.headers
        if response.status_code in (429, 503):
            pauses.append(
                _seconds(headers.get("retry-after-ms", "")) / 1000 or _seconds(headers.get("retry-after", ""))
            )
        for kind in ("requests", "tokens"):
            if headers.get(f"x-ratelimit-remaining-{kind}") == "0":
                pauses.append(_seconds(headers.get(f"x-ratelimit-reset-{kind}", "")))
        self._until = max(self._until, time.monotonic() + min(max(pauses), _LONGEST_PAUSE))


def _seconds(text: str) -> float:
    """``2``, ``1.5``, ``20ms`` or ``6m0s`` in seconds; 0 for anything else, such as a date."""
    parts = _DURATION.findall(text)
    if "".join(number + unit for number, unit in parts) != text.strip():
        return 0.0
    return sum(float(number) * _SECONDS[unit or None] for number, unit in parts)
