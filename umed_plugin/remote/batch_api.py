"""Asks a model by the Batch API: many questions in one file, answered within a day, at OpenAI for half the price.

A note file beside the ledger, one line of JSON for each step, written before the next one is taken, makes a batch that was paid
for survive kill -9: a file is noted when it is uploaded, its batch when it is made, and its end when all replies are kept.
What a killed process made and could not note is found again on the server by the file that it was made from.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import openai
from openai.types.chat import ChatCompletion

from umed_plugin.errors import UmedError
from umed_plugin.remote.client import key_from_environment, read_completion, shown
from umed_plugin.remote.replies import Answer, Failure, Message, Unreadable

POLL_SECONDS = 30.0
MOST_REQUESTS, MOST_BYTES = 50_000, 150_000_000  # of one file; OpenAI allows 50,000 and 200 MB
_ENDED = ("completed", "failed", "expired", "cancelled")
_ENDPOINT: Final = "/v1/chat/completions"


class BatchClient:
    """Sends questions to one model in batches, one batch at a time.

    Args:
        model: its name on the server.
        notes: JSON lines; which files and batches there are.
        base_url, options, timeout, retries: as of `umed_plugin.remote.client.ModelClient`.
        on_answer: called with a question's key and its answer; must have kept the reply when it returns.
        on_wait: called with the state of a batch whenever it was looked at.
    """

    def __init__(
        self,
        model: str,
        notes: Path,
        *,
        base_url: str | None,
        options: Mapping[str, Any],
        timeout: float,
        retries: int,
        on_answer: Callable[[str, Answer], None],
        on_wait: Callable[[str], None] = lambda state: None,
    ) -> None:
        self._model, self._notes, self._options = model, notes, dict(options)
        self._on_answer, self._on_wait = on_answer, on_wait
        self._key = key_from_environment()
        self._client = openai.OpenAI(api_key=self._key, base_url=base_url, timeout=timeout, max_retries=retries)

    def finish_old(self) -> int:
        """Collect batches that an earlier run has begun; returns how many there were.

        Raises:
            UmedError: the server cannot be asked.
        """
        files, batches, ended = self._noted()
        lost = [file for file in files if file not in batches.values()]
        if lost:
            with self._told():
                listed = {batch.input_file_id: batch.id for batch in self._client.batches.list(limit=100)}
            for file in lost:
                if file in listed:
                    self._note(batch=listed[file], file=file)
                    batches[listed[file]] = file
        open_batches = [batch for batch in batches if batch not in ended]
        for batch in open_batches:
            self._collect(batch)
        return len(open_batches)

    def ask(self, questions: Iterable[tuple[str, Sequence[Message]]]) -> int:
        """Send questions in as many batches as they need, and wait until each is answered or has failed.

        Returns:
            how many were sent.

        Raises:
            UmedError: the server cannot be asked.
        """
        count = 0
        waiting = iter(questions)
        while True:
            with tempfile.NamedTemporaryFile("wb", dir=self._notes.parent, suffix=".batch.jsonl") as file:
                held = self._write(file, waiting)
                if not held:
                    return count
                count += held
                batch = self._begin(Path(file.name))
            self._collect(batch)

    def _write(self, file: Any, questions: Iterable[tuple[str, Sequence[Message]]]) -> int:
        count = size = 0
        for key, messages in questions:
            body = {"model": self._model, "messages": list(messages), **self._options}
            line = {"custom_id": key, "method": "POST", "url": _ENDPOINT, "body": body}
            size += file.write(json.dumps(line).encode() + b"\n")
            count += 1
            if count == MOST_REQUESTS or size >= MOST_BYTES:
                break
        file.flush()
        return count

    def _begin(self, file: Path) -> str:
        with self._told():
            with file.open("rb") as content:
                uploaded = self._client.files.create(file=("umed.jsonl", content), purpose="batch").id
            self._note(file=uploaded)
            batch = self._client.batches.create(input_file_id=uploaded, endpoint=_ENDPOINT, completion_window="24h").id
        self._note(batch=batch, file=uploaded)
        return batch

    def _collect(self, batch: str) -> None:
        """Wait for a batch to end and hand on every answer in it."""
        while True:
            with self._told():
                found = self._client.batches.retrieve(batch)
            counts = found.request_counts
            told = f"{counts.completed} of {counts.total} answered" if counts else ""
            self._on_wait(f"batch {batch}: {found.status} {told}")
            if found.status in _ENDED:
                break
            time.sleep(POLL_SECONDS)
        for file in (found.output_file_id, found.error_file_id):
            if file:
                with self._told():
                    text = self._client.files.content(file).text
                for line in text.splitlines():
                    self._hand_on(line)
        if found.status == "failed":
            self._note(ended=batch)
            raise UmedError(shown(self._key, f"the server refuses batch {batch}: {found.errors}"))
        self._note(ended=batch)

    def _hand_on(self, line: str) -> None:
        try:
            found = json.loads(line)
            key = found["custom_id"]
            response = found.get("response") or {}
            status = response.get("status_code")
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # a line that names no question answers none: that question is asked again
        if status != 200:
            reason = found.get("error") or response.get("body")
            self._on_answer(key, Failure(shown(self._key, f"in the batch: {status or ''} {reason}"), status))
            return
        try:
            completion = ChatCompletion.model_validate(response.get("body"))
        except ValueError as error:
            self._on_answer(key, Unreadable(shown(self._key, f"the server's reply is no chat completion: {error}")))
            return
        self._on_answer(key, read_completion(completion, self._key))

    def _told(self) -> _Told:
        return _Told(self._key)

    def _noted(self) -> tuple[list[str], dict[str, str], set[str]]:
        """Uploaded files, batches with their files, and batches whose replies are all kept."""
        files: list[str] = []
        batches: dict[str, str] = {}
        ended: set[str] = set()
        lines = self._notes.read_text(encoding="utf-8").splitlines() if self._notes.is_file() else []
        for line in lines:
            try:
                found = json.loads(line)
            except ValueError:  # torn by a kill: what it was to say is found again on the server
                continue
            if "batch" in found:
                batches[found["batch"]] = found["file"]
            elif "file" in found:
                files.append(found["file"])
            elif "ended" in found:
                ended.add(found["ended"])
        return files, batches, ended

    def _note(self, **facts: str) -> None:
        # A torn line before it is closed by the newline in front.
        with self._notes.open("ab") as file:
            file.write(b"\n" + json.dumps(facts).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


class _Told:
    """Turns the package's errors into one message without the key."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __enter__(self) -> None:
        """Nothing is to be done beforehand."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, openai.OpenAIError):
            raise UmedError(
                shown(self._key, f"the Batch API cannot be used: {error}") + ". The same command goes on where it was; "
                "a server without a Batch API is asked without --batch."
            ) from None
