"""The ledger of a model's replies: one line of JSON for each reply that a server gave, written down before it is used.

Every line is on the disk (``fsync``) before the reply counts, a line that a killed process left torn is skipped and closed by the
next writer, and several processes write to the same file, one at a time (``flock``), and read what the others wrote. So no reply
is paid for twice: not by another process, not after a crash, not by the next run that is given the same file.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError

_COUNTS = ("prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Entry:
    """One reply.

    Attributes:
        model: that gave it.
        reply: its text; ``None`` when the model refused or wrote nothing.
        line: all that stands in the file about it.
    """

    model: str
    reply: str | None
    line: dict[str, Any]


@dataclass(frozen=True)
class Owner:
    """Who keeps a ledger, in the words of its messages.

    Attributes:
        name: "the judge".
        ends: what happens when it cannot be written, "Training stops".
        flag: that names another file.
    """

    name: str = "the model"
    ends: str = "The run stops"
    flag: str = "--ledger"


class Ledger:
    """Replies by question, in memory and in a file that only ever grows.

    Args:
        path: JSON lines; made when it is not there, unless ``read_only``.
        model: whose replies are looked up; ``None`` takes them from whichever one model the file has.
        read_only: never write.
        owner: for messages.

    Raises:
        UmedError: the file cannot be opened, or ``model`` is ``None`` and the file has replies of several.
    """

    def __init__(self, path: str | Path, model: str | None, *, read_only: bool = False, owner: Owner = Owner()) -> None:
        self.path, self._owner = Path(path), owner
        self._lock = threading.Lock()  # replies arrive in the client's thread, and are looked up in the main one
        self._entries: dict[tuple[str, str], Entry] = {}
        self._read_to = 0
        self.counts: Counter[str] = Counter()
        try:
            if not read_only:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_APPEND | os.O_CREAT
            self._file = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise UmedError(
                f"{self.path}: {owner.name}'s ledger cannot be opened ({error.strerror}). Needed: a file "
                f"{'to read' if read_only else 'that can be written'}; {owner.flag} names another."
            ) from error
        self.refresh()
        self.model = model if model is not None else self._only_model()

    def _only_model(self) -> str:
        models = sorted({model for model, _ in self._entries})
        if len(models) != 1:
            raise UmedError(
                f"{self.path}: has replies of {', '.join(models) or 'no model at all'}; replaying needs those of one model. "
                "Split the file by its field 'model'."
            )
        return models[0]

    def get(self, key: str) -> Entry | None:
        """The reply to the question with this key, if there is one."""
        with self._lock:
            return self._entries.get((self.model, key))

    def entries(self) -> list[Entry]:
        """All replies of the model."""
        with self._lock:
            return [entry for (model, _), entry in self._entries.items() if model == self.model]

    def refresh(self) -> None:
        """Read the whole lines that were written since the last time, by this process or another."""
        with self._lock:
            self._read_on()

    def append(self, key: str, reply: str | None, usage: dict[str, int], **more: Any) -> None:
        """Write a reply down and count it; returns when it is on the disk.

        Args:
            key: of the question.
            reply: text of the reply, ``None`` for a refusal.
            usage: ``prompt_tokens`` and ``completion_tokens``.
            more: what a person who reads the file may want to know. ``lost`` (why) marks a reply that came and cannot be used:
                it counts, as it may have been paid for, but answers nothing.

        Raises:
            UmedError: the file cannot be locked or written.
        """
        line = {"key": key, "model": self.model, "reply": reply, **usage, **more}
        data = json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        with self._lock:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX)
                try:
                    self._write(data)
                finally:
                    fcntl.flock(self._file, fcntl.LOCK_UN)
            except OSError as error:
                raise UmedError(
                    f"{self.path}: {self._owner.name}'s ledger cannot be written ({error.strerror}). {self._owner.ends}, "
                    "because replies would be paid for and lost. Needed: a disk with room and file locks; "
                    f"{self._owner.flag} names another."
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
        size = os.fstat(self._file).st_size
        data = b""
        while len(data) < size - self._read_to:
            piece = os.pread(self._file, size - self._read_to - len(data), self._read_to + len(data))
            if not piece:
                break
            data += piece
        whole = data.rfind(b"\n") + 1
        self._read_to += whole
        for line in data[:whole].splitlines():
            self._take(line)

    def _take(self, line: bytes) -> None:
        """Keep one line; one that is torn or no reply is nobody's, and stays in the file."""
        try:
            found = json.loads(line)
        except ValueError:
            return
        if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in ("key", "model")):
            return
        reply = found.get("reply")
        entry = Entry(found["model"], reply if isinstance(reply, str) else None, found)
        if "lost" not in found:
            self._entries.setdefault((entry.model, found["key"]), entry)
        self.counts["requests"] += 1
        self.counts.update({name: found[name] for name in _COUNTS if isinstance(found.get(name), int)})
