"""Asks a model on an OpenAI-compatible server, many questions at a time, in a thread of its own.

Retries are the ``openai`` package's: connection errors, timeouts, 408, 409, 429 and 5xx, with growing pauses that jitter, or for
as long as the server's ``Retry-After`` says. On top of it, what one reply tells about the rate limit holds for all questions that
wait (:class:`_Gate`). The key comes from the environment, is handed to the package and to nothing else, and is blotted out of
every text that the server sends.

A thread with an event loop, and a daemon: at the end of the process, by error or Ctrl-C too, questions that were not sent are
dropped, and replies that are on their way are waited for and kept, as they are paid for.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, cast

import openai
from openai.types.chat import ChatCompletion

from umed_plugin.remote.replies import Answer, Failure, Message, Reply, Unreadable
from umed_plugin.remote.settings import KEY_VARIABLE

_LONGEST_PAUSE = 60.0  # seconds; what servers ask for beyond it is asked again then
_NO_KEY = "none"
_SHOWN = 300  # characters of an error in a message
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


class ModelClient:
    """Sends questions to one model.

    Args:
        model: its name on the server.
        base_url: of the server; ``None`` is OpenAI's, or what ``OPENAI_BASE_URL`` says.
        options: further fields of each request.
        concurrency: questions that are with the server at the same time.
        timeout: seconds for one try.
        retries: further tries after the first.
        on_reply: called in the client's thread with the question's key and its reply, before the reply counts.
        last_wait: seconds that the end of the process waits for replies on their way.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None,
        options: Mapping[str, Any],
        concurrency: int,
        timeout: float,
        retries: int,
        on_reply: Callable[[str, Reply], None],
        last_wait: float = 10.0,
    ) -> None:
        self._model, self._options, self._on_reply = model, dict(options), on_reply
        self._last_wait = last_wait
        self._concurrency = concurrency
        self._key = key_from_environment()
        self._deadline = (retries + 1) * (timeout + _LONGEST_PAUSE)  # for a server that trickles
        self._gate = _Gate()
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=base_url,
            timeout=timeout,
            max_retries=retries,
            http_client=openai.DefaultAsyncHttpxClient(
                event_hooks={"request": [self._gate.wait], "response": [self._gate.learn]}
            ),
        )
        self._sent: set[asyncio.Task[Any]] = set()
        self._waiting: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._process = os.getpid()
        threading.Thread(target=self._run, name="umed-asking", daemon=True).start()
        atexit.register(self.close)

    def ask(self, key: str, messages: Sequence[Message]) -> Future[Answer]:
        """Send ``messages`` as soon as there is a place; the result is never an exception of the network.

        The key, a digest, goes along as ``X-Client-Request-Id``, by which the server's own log can be compared with ours.
        """
        return asyncio.run_coroutine_threadsafe(self._ask(key, messages), self._loop)

    def close(self) -> None:
        """Drop what was not sent, wait a little for what was, and end the thread."""
        if os.getpid() == self._process and not self._loop.is_closed() and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._slots = asyncio.Semaphore(self._concurrency)  # made here: in Python 3.9 it belongs to its thread's loop
        self._loop.run_forever()

    async def _ask(self, key: str, messages: Sequence[Message]) -> Answer:
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            async with self._slots:
                self._waiting.discard(task)
                self._sent.add(task)
                answer = await self._request(key, messages)
                if isinstance(answer, Reply):
                    self._on_reply(key, answer)
                return answer
        finally:
            self._waiting.discard(task)
            self._sent.discard(task)

    async def _request(self, key: str, messages: Sequence[Message]) -> Answer:
        request = self._client.chat.completions.create(
            model=self._model,
            messages=cast(Any, list(messages)),
            extra_body=self._options,
            extra_headers={"X-Client-Request-Id": key},
        )
        try:
            return read_completion(await asyncio.wait_for(request, self._deadline), self._key)
        except asyncio.TimeoutError:
            return Failure(f"no reply within {self._deadline:g} s, retries included")
        except openai.APIStatusError as error:
            return Failure(shown(self._key, f"HTTP {error.status_code}: {error.message}"), error.status_code)
        except openai.OpenAIError as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            return Failure(shown(self._key, f"{error}{cause}"))
        except ValueError as error:
            return Unreadable(shown(self._key, f"the server's reply is not JSON: {error}"))

    async def _finish(self) -> None:
        for task in self._waiting:
            task.cancel()
        if self._sent:
            _, late = await asyncio.wait(set(self._sent), timeout=self._last_wait)
            for task in late:
                task.cancel()
        await self._client.close()


def key_from_environment() -> str:
    """The key; a server of one's own often wants none, and the package wants one."""
    return os.environ.get(KEY_VARIABLE) or _NO_KEY


def read_completion(completion: Any, key: str) -> Answer:
    """The first choice of a completion; the package lets through whatever JSON a server sends."""
    choices = completion.choices if isinstance(completion, ChatCompletion) else None
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        return Unreadable(shown(key, f"the server's reply is no chat completion: {completion!r}"))
    text = choices[0].message.content
    usage = {name: getattr(completion.usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
    counted = {name: count for name, count in usage.items() if isinstance(count, int)}
    finish, model = (blotted(key, str(said)) for said in (choices[0].finish_reason, completion.model))
    return Reply(blotted(key, text) if isinstance(text, str) and text else None, counted, finish, model)


def shown(key: str, reason: str) -> str:
    """What a server or the package said, short, on one line and without the key."""
    return blotted(key, " ".join(reason.split()))[:_SHOWN]


def blotted(key: str, text: str) -> str:
    """``text`` with stars in place of the key."""
    return text if key == _NO_KEY else text.replace(key, "***")


class _Gate:
    """Holds all requests back until the time that the server has named, spread a little so that they do not come at once."""

    def __init__(self) -> None:
        self._until = 0.0

    async def wait(self, request: Any) -> None:
        """Before a request is sent."""
        left = self._until - time.monotonic()
        if left > 0:
            await asyncio.sleep(left * random.uniform(1.0, 1.1))

    async def learn(self, response: Any) -> None:
        """From the head of a response."""
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
    """``2``, ``1.5``, ``20ms`` or ``6m0s`` in seconds; anything else, a date for instance, is 0."""
    parts = _DURATION.findall(text)
    if "".join(number + unit for number, unit in parts) != text.strip():
        return 0.0
    return sum(float(number) * _SECONDS[unit or None] for number, unit in parts)
