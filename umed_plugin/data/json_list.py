"""A long JSON list, one item after the other: the file is never in memory as a whole."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from umed_plugin.data.texts import without_duplicates

_PIECE = 2**22  # bytes read at a time
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_STRICT = json.JSONDecoder(object_pairs_hook=without_duplicates)


class Placed(NamedTuple):
    """An item of the list, and where its text is in the file, in bytes."""

    start: int
    length: int
    item: Any


def items_of(path: Path, *, strict: bool = False) -> Iterator[Placed]:
    """The items of a JSON list in UTF-8.

    Args:
        strict: refuse an object that has a key twice.

    Raises:
        ValueError: the file is not a list in JSON, or not in UTF-8.
        RecursionError: it is nested too deeply.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "list.json"
        >>> _ = file.write_text('[{"id": 1}, {"id": 2}]')
        >>> [(placed.start, placed.length, placed.item["id"]) for placed in items_of(file)]
        [(1, 9, 1), (12, 9, 2)]
    """
    with path.open("rb") as file:
        text = _Text(file)
        text.take("[")
        if text.next() == "]":
            text.take("]")
        else:
            while True:
                yield text.item(_STRICT if strict else _DECODER)
                if text.next() == "]":
                    text.take("]")
                    break
                text.take(",")
        if text.next():
            raise ValueError("there is text after the end of the list")


class _Text:
    """The rest of the file: what is in memory of it, and how to get more."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._start = "", 0, 0
        self._is_ended = False
        if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            self._start = len(codecs.BOM_UTF8)
        else:
            file.seek(0)

    def next(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            self._move(self._after_space(self._at))
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, expected: str) -> None:
        """Go over the next character."""
        if self.next() != expected:
            raise ValueError(f"{expected!r} is missing")
        self._move(self._at + 1)

    def item(self, decoder: json.JSONDecoder) -> Placed:
        """Decode the next value."""
        self.next()
        while True:
            try:
                item, end = decoder.raw_decode(self._text, self._at)
            except ValueError:
                if not self._more():
                    raise
                continue
            # A number may go on in the next piece.
            after = self._after_space(end)
            if self._text[after : after + 1] in (",", "]") or not self._more():
                break
        start = self._start
        self._move(end)
        return Placed(start, self._start - start, item)

    def _after_space(self, at: int) -> int:
        found = _SPACE.match(self._text, at)
        return at if found is None else found.end()

    def _move(self, at: int) -> None:
        passed = self._text[self._at : at]
        self._start += len(passed) if passed.isascii() else len(passed.encode())
        self._at = at

    def _more(self) -> bool:
        """Read on, the more the longer the item is; False at the end of the file."""
        if self._is_ended:
            return False
        data = self._file.read(max(_PIECE, len(self._text) - self._at))
        self._is_ended = not data
        self._text = self._text[self._at :] + self._decoder.decode(data, final=self._is_ended)
        self._at = 0
        return not self._is_ended
