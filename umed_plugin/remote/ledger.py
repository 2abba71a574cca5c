"""The ledger of a model's replies: one JSON line per reply, written to disk before the reply is used.

No reply is paid for twice: not by another process, not after a crash, and not by a later run with the same file.

- Every line is on disk (``fsync``) before the reply counts.
- A line that a killed process left incomplete is skipped, and the next writer closes it with a newline.
- Several processes may write to the same file. They take turns (``flock``) and read each other's lines.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.files import json_lines, parse_json
from umed_plugin.remote.settings import is_count

_PIECE = 2**20  # bytes read at a time
_COUNTS = ("prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Entry:
    """One reply.

    Attributes:
        model: the model that was asked.
        reply: the text; ``None`` when the model refused or wrote nothing.
        line: the whole JSON line of the file.
    """

    model: str
    reply: str | None
    line: dict[str, Any]


@dataclass(frozen=True)
class LedgerUser:
    """Who uses a ledger: the words for its error messages.

    Attributes:
        name: such as "the judge".
        ends: what happens when the ledger cannot be written, such as "Training stops".
        flag: the flag that chooses another file.
    """

    name: str = "the model"
    ends: str = "The run stops"
    flag: str = "--ledger"


class Ledger:
    """Replies by request key, in an append-only file. In memory is only where the reply to each key begins.

    Args:
        path: JSON lines file; created if it does not exist, unless ``read_only``.
        model: the model whose replies are looked up. ``None``: the only model in the file.
        read_only: never write.
        user: for error messages.

    Attributes:
        counts: ``requests``, ``prompt_tokens`` and ``completion_tokens`` of all lines, including lost replies.

    Raises:
        UmedError: the file cannot be opened, or ``model`` is ``None`` and the file does not hold replies of exactly one model.
    """

    def __init__(
        self, path: str | Path, model: str | None, *, read_only: bool = False, user: LedgerUser = LedgerUser()
    ) -> None:
        self.path, self._user = Path(path), user
        self._lock = threading.Lock()  # replies arrive in the client's thread and are looked up in the main thread
        # Model -> key -> first byte and length of the line with the reply.
        self._places: dict[str, dict[str, tuple[int, int]]] = {}
        self._read_to = 0
        self.counts: Counter[str] = Counter()
        self._counts_of: dict[str, Counter[str]] = {}
        try:
            if not read_only:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_APPEND | os.O_CREAT
            self._file = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise UmedError(
                f"{self.path}: {user.name}'s ledger cannot be opened ({error.strerror}). Needed: a file that can be "
                f"{'read' if read_only else 'written'}. {user.flag} chooses another."
            ) from error
        self.refresh()
        self.model = model if model is not None else self._only_model()

    def _only_model(self) -> str:
        models = sorted(self._places)
        if len(models) != 1:
            raise UmedError(
                f"{self.path}: holds replies of {', '.join(models) or 'no model'}. A replay needs the replies of exactly one "
                "model. Split the file by its field 'model'."
            )
        return models[0]

    def get(self, key: str) -> Entry | None:
        """The reply to the request with this key, or None."""
        with self._lock:
            place = self._places.get(self.model, {}).get(key)
            return None if place is None else self._entry_at(*place)

    def entries(self) -> Iterator[Entry]:
        """All replies of the model, one after the other."""
        with self._lock:
            places = list(self._places.get(self.model, {}).values())
        for place in places:
            yield self._entry_at(*place)

    def _entry_at(self, start: int, length: int) -> Entry:
        entry = _entry_of(os.pread(self._file, length, start))
        if entry is None:
            raise UmedError(
                f"{self.path}: was changed while it was in use. Lines may only be added to a ledger. Start again."
            )
        return entry

    def counts_in(self, unit: str) -> Counter[str]:
        """What a budget in ``unit`` counts: in ``usd`` the model's own lines, because prices are one model's; else all lines."""
        return self._counts_of.get(self.model, Counter()) if unit == "usd" else self.counts

    def refresh(self) -> None:
        """Read the complete lines that this process or another has written since the last read."""
        with self._lock:
            self._read_on()

    def append(self, key: str, reply: str | None, usage: dict[str, int], **more: Any) -> None:
        """Append a reply and count it; returns when the line is on disk.

        Args:
            key: key of the request.
            reply: text of the reply; ``None`` for a refusal.
            usage: ``prompt_tokens`` and ``completion_tokens``.
            more: further fields for people who read the file. ``lost`` (the reason) marks a reply that arrived but cannot be
                used: it counts towards a budget, because it may have been paid for, but `get` does not return it.

        Raises:
            UmedError: the file cannot be locked or written.
        """
        line = {"key": key, "model": self.model, "reply": reply, **usage, **more}
        data = json_lines([line])
        with self._lock:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX)
                try:
                    self._write(data)
                finally:
                    fcntl.flock(self._file, fcntl.LOCK_UN)
            except OSError as error:
                raise UmedError(
                    f"{self.path}: {self._user.name}'s ledger cannot be written ({error.strerror}). {self._user.ends}, "
                    "because replies would be paid for and lost. Needed: a disk with free space and file locks. "
                    f"{self._user.flag} chooses another file."
                ) from error
            self._read_on()

    def _write(self, data: bytes) -> None:
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            data = b"\n" + data
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)

    def _read_on(self) -> None:
        """Note the complete lines after those that are known, a piece of the file at a time.

        Reading ends at the size that the file has now: a device such as /dev/full has size 0 and would be read without end.
        """
        rest, size = b"", os.fstat(self._file).st_size
        while piece := os.pread(
            self._file, max(0, min(_PIECE, size - self._read_to - len(rest))), self._read_to + len(rest)
        ):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                self._take(line, self._read_to)
                self._read_to += len(line) + 1

    def _take(self, line: bytes, start: int) -> None:
        """Note one line. A line that is incomplete or not a reply is ignored and stays in the file."""
        entry = _entry_of(line)
        if entry is None:
            return
        if "lost" not in entry.line:
            self._places.setdefault(entry.model, {}).setdefault(entry.line["key"], (start, len(line)))
        for counts in (self.counts, self._counts_of.setdefault(entry.model, Counter())):
            counts["requests"] += 1
            counts.update({name: entry.line[name] for name in _COUNTS if is_count(entry.line.get(name))})


def _entry_of(line: bytes) -> Entry | None:
    """The reply in a line; None for any other line."""
    try:
        fields = parse_json(line)
    except ValueError:
        return None
    if not isinstance(fields, dict) or not all(isinstance(fields.get(name), str) for name in ("key", "model")):
        return None
    reply = fields.get("reply")
    return Entry(fields["model"], reply if isinstance(reply, str) else None, fields)
