"""Requests by the Batch API: many requests in one file, answered within a day, at OpenAI for half the price.

A notes file beside the ledger lets a batch that was paid for survive kill -9. It has one JSON line per step, written before the
next step begins: ``file`` when a file is uploaded, ``batch`` when its batch is created, ``ended`` when all its replies are kept.
A batch that a killed process created but could not note is identified on the server by its input file. The first two lines name
the model and the server: another model's replies must not be kept as this one's. Notes of earlier versions do not say; they count
as this run's.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletion

from umed_plugin.errors import UmedError, note
from umed_plugin.files import append_json_lines, parse_json
from umed_plugin.remote.bounded import MOST_BYTES as MOST_BYTES_OF_A_REPLY
from umed_plugin.remote.bounded import TOO_LONG, BoundedClient
from umed_plugin.remote.client import key_from_environment, read_completion, refused, short_message
from umed_plugin.remote.replies import Failure, Message, RequestResult, Unreadable
from umed_plugin.remote.settings import ServerSettings, address_from_environment

POLL_SECONDS = 30.0
MAX_REQUESTS, MAX_BYTES = 50_000, 150_000_000  # per file; OpenAI allows 50,000 and 200 MB
_LONGEST_LINE = 64 * 1024  # bytes that a batch's files may hold for each request, on average
_ENDED = ("completed", "failed", "expired", "cancelled")
_ENDPOINT: Final = "/v1/chat/completions"


class BatchClient:
    """Sends requests to one model in batches, one batch at a time.

    Args:
        server: model, address, options, timeout and retries.
        notes: JSON lines file that records uploaded files and batches.
        on_result: called with each request's key and result. When it returns, a reply must have been kept.
        on_wait: called with a batch's status each time it is polled.
    """

    def __init__(
        self,
        server: ServerSettings,
        notes: Path,
        on_result: Callable[[str, RequestResult], None],
        on_wait: Callable[[str], None] = lambda status: None,
    ) -> None:
        self._server, self._notes = server, notes
        self._on_result, self._on_wait = on_result, on_wait
        self._key = key_from_environment()
        self._http = BoundedClient()
        self._client = openai.OpenAI(
            api_key=self._key,
            base_url=server.base_url or address_from_environment(),
            timeout=server.timeout,
            max_retries=server.retries,
            http_client=self._http,
        )
        self._asked = {"model": server.model, "base_url": _address(str(self._client.base_url))}

    def finish_old(self) -> int:
        """Collect the batches that an earlier run left open; returns their number. Those of other models and servers stay there.

        Raises:
            UmedError: the server cannot be reached, refuses, or has lost a batch.
        """
        files, batches, ended = self._read_notes()
        with_batch = {of_batch["file"] for of_batch in batches.values()}
        without_batch = [name for name, of_file in files.items() if name not in with_batch and self._is_ours(of_file)]
        if without_batch:
            with self._readable_errors():
                listed = {batch.input_file_id: batch.id for batch in self._client.batches.list(limit=100)}
            for file in without_batch:
                if file in listed:
                    self._note(batch=listed[file], file=file, **self._asked)
                    batches[listed[file]] = {"file": file, **self._asked}
        open_batches = {batch: of_batch for batch, of_batch in batches.items() if batch not in ended}
        ours = [batch for batch, of_batch in open_batches.items() if self._is_ours(of_batch)]
        self._tell_left(of_batch for batch, of_batch in open_batches.items() if batch not in ours)
        for batch in ours:
            self._collect(batch)
        return len(ours)

    def _is_ours(self, noted: dict[str, str]) -> bool:
        """Whether what a note tells of was asked of this run's model and server."""
        return all(noted.get(name, value) == value for name, value in self._asked.items())

    def _tell_left(self, noted: Iterable[dict[str, str]]) -> None:
        """Say which open batches are left to another command."""
        for (model, url), count in Counter((of["model"], of["base_url"]) for of in noted).items():
            batches = "batch was" if count == 1 else "batches were"
            note(
                f"{self._notes}: {count} open {batches} asked of {model} at {url} and not collected. To collect, run the "
                f"command with --model {model} --base-url {url}."
            )

    def ask(self, requests: Iterable[tuple[str, Sequence[Message]]]) -> int:
        """Send requests, each a key and its messages, in as many batches as needed; wait until all batches have ended.

        Returns:
            the number of requests sent.

        Raises:
            UmedError: the server cannot be reached or refuses.
        """
        total = 0
        remaining = iter(requests)
        while True:
            with tempfile.NamedTemporaryFile("wb", dir=self._notes.parent, suffix=".batch.jsonl") as file:
                count = self._write(file, remaining)
                if not count:
                    return total
                total += count
                batch = self._begin(Path(file.name))
            self._collect(batch, count)

    def _write(self, file: Any, requests: Iterable[tuple[str, Sequence[Message]]]) -> int:
        """Write requests until the file is full; returns their number."""
        count = size = 0
        for key, messages in requests:
            body = {"model": self._server.model, "messages": list(messages), **self._server.options}
            line = {"custom_id": key, "method": "POST", "url": _ENDPOINT, "body": body}
            size += file.write(json.dumps(line).encode() + b"\n")
            count += 1
            if count == MAX_REQUESTS or size >= MAX_BYTES:
                break
        file.flush()
        return count

    def _begin(self, file: Path) -> str:
        with self._readable_errors():
            with file.open("rb") as content:
                uploaded = self._client.files.create(file=("umed.jsonl", content), purpose="batch").id
            self._note(file=uploaded, **self._asked)
            batch = self._client.batches.create(input_file_id=uploaded, endpoint=_ENDPOINT, completion_window="24h").id
        self._note(batch=batch, file=uploaded, **self._asked)
        return batch

    def _collect(self, name: str, sent: int = 0) -> None:
        """Wait until a batch has ended, and pass every result in it on; this run has ``sent`` so many requests in it."""
        while True:
            with self._readable_errors(name):
                batch = self._client.batches.retrieve(name)
            counts = batch.request_counts
            progress = f"{counts.completed} of {counts.total} answered" if counts else ""
            self._on_wait(f"batch {name}: {batch.status} {progress}")
            if batch.status in _ENDED:
                break
            time.sleep(POLL_SECONDS)
        # Some servers count nothing.
        counted = counts is not None and isinstance(counts.total, int) and counts.total > 0
        asked = min(max(counts.total, sent), MAX_REQUESTS) if counts and counted else MAX_REQUESTS
        self._http.most_bytes = MOST_BYTES_OF_A_REPLY + asked * _LONGEST_LINE
        for file in (batch.output_file_id, batch.error_file_id):
            if file:
                with self._readable_errors(name):
                    text = self._client.files.content(file).text
                # Not splitlines(): a reply may hold U+2028 or U+0085, which JSON leaves as they are.
                for line in text.split("\n"):
                    self._pass_on(line)
        self._note(ended=name)
        if batch.status == "failed":
            raise UmedError(short_message(self._key, f"the server refuses batch {name}: {batch.errors}"))

    def _pass_on(self, line: str) -> None:
        """Pass on the result in one line of a batch's output or error file."""
        try:
            fields = parse_json(line)
            key = fields["custom_id"]
            response = fields.get("response") or {}
            status = response.get("status_code")
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # a line without a request's key has no result: the request will be sent again
        if status != 200:
            reason = fields.get("error") or response.get("body")
            self._on_result(key, Failure(short_message(self._key, f"in the batch: {status or ''} {reason}"), status))
            return
        try:
            completion = ChatCompletion.model_validate(response.get("body"))
        except ValueError as error:
            reason = short_message(self._key, f"the server's reply is not a chat completion: {error}")
            self._on_result(key, Unreadable(reason))
            return
        self._on_result(key, read_completion(completion, self._key))

    @contextmanager
    def _readable_errors(self, batch: str | None = None) -> Iterator[None]:
        """Turn the package's errors into one message without the API key; ``batch`` is the noted one that is asked for."""
        try:
            yield
        except openai.NotFoundError as error:
            reason = short_message(self._key, str(error))
            if batch is None:
                raise UmedError(_unusable(reason)) from None
            raise UmedError(
                f"{self._notes}: lists batch {batch}, and the server at {self._asked['base_url']} does not have it or its "
                f"replies ({reason}). If another --base-url or API key made it, use that one. If the server has deleted it, "
                f"delete the lines with {batch} from the file: its requests are sent, and paid for, again."
            ) from None
        except openai.APIStatusError as error:
            if batch is not None and error.status_code == TOO_LONG:
                raise UmedError(
                    f"{self._notes}: lists batch {batch}, of which the server at {self._asked['base_url']} sends a file of more "
                    f"than {self._http.most_bytes} bytes, the most that is read. If that cannot be mended there, delete the "
                    f"lines with {batch} from the file: its requests are sent, and paid for, again."
                ) from None
            raise UmedError(_unusable(short_message(self._key, refused(error)))) from None
        except (openai.OpenAIError, RecursionError, ValueError) as error:
            raise UmedError(_unusable(short_message(self._key, str(error)))) from None

    def _read_notes(self) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]], set[str]]:
        """Notes of uploaded files and of batches, by name, and the batches whose replies are all kept."""
        files: dict[str, dict[str, str]] = {}
        batches: dict[str, dict[str, str]] = {}
        ended: set[str] = set()
        lines = self._notes.read_bytes().split(b"\n") if self._notes.is_file() else []
        for line in lines:
            try:
                noted = parse_json(line)
            except ValueError:  # a line that a kill left incomplete: the server still knows what it was to record
                continue
            if "batch" in noted:
                batches[noted["batch"]] = noted
            elif "file" in noted:
                files[noted["file"]] = noted
            elif "ended" in noted:
                ended.add(noted["ended"])
        return files, batches, ended

    def _note(self, **fields: str) -> None:
        append_json_lines(self._notes, [fields])


def _address(url: str) -> str:
    """A server's address as notes name it, without a user name or password that an environment variable may hold."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")


def _unusable(reason: str) -> str:
    return (
        f"the Batch API cannot be used: {reason}. Run the same command again to continue. If the server has no Batch API, run "
        "it without --batch."
    )
