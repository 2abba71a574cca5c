"""Write files and folders so that they appear whole or not at all, and survive a power cut; read JSON that may be damaged.

Everything goes through the same three steps: write beside the target, flush to the disk (``fsync``), rename over the target. A
process that is killed leaves the old file, or none, and a file that ends with ``.partial``; a later write of the same target
removes it. Several processes may write the same file: each has a partial file of its own, and the last rename wins. A folder is
written by one process at a time: `umed_plugin.files.locks`.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.files.disk import DISK_IS_FULL, failed_write, flush, fsync
from umed_plugin.files.folders import PARTIAL, replacing_folder

__all__ = [
    "PARTIAL",
    "append_json_lines",
    "failed_write",
    "file_stamp",
    "is_stale_partial",
    "json_lines",
    "parse_json",
    "read_object",
    "replacing",
    "replacing_folder",
    "text_bytes",
    "write_bytes",
    "write_json",
    "write_json_lines",
    "write_text",
]
_STALE_SECONDS = 3600  # no file takes so long to write: its writer was killed


@contextmanager
def replacing(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a path to write to; its file replaces ``path`` when the block ends without an error.

    Args:
        path: the target; its folder is made if need be.
        durable: flush to the disk before the rename. False for what can be made again, such as a cache entry.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "settings.txt"
        >>> with replacing(target) as partial:
        ...     size = partial.write_text("seed: 0")
        >>> target.read_text()
        'seed: 0'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        yield partial
        if durable:
            flush(partial)
        os.replace(partial, target)
        if durable:
            flush(target.parent)
            _remove_stale(target)
    except OSError as error:
        unnamed = error.filename is None and error.errno in DISK_IS_FULL  # a write fails without saying in which file
        if unnamed or str(error.filename) == str(partial):  # a name that nobody has given
            error.filename, error.filename2 = str(target), None
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes, *, durable: bool = True) -> None:
    """Replace the file's content. See `replacing` for ``durable``."""
    with replacing(path, durable=durable) as partial:
        partial.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Replace the file's content with text, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any, *, indent: int | None = 1) -> None:
    """Replace the file's content with JSON and a final newline; letters that are not ASCII stay readable."""
    write_bytes(path, _json_bytes(value, indent))


def write_json_lines(path: str | Path, values: Iterable[Any]) -> None:
    """Replace the file's content with JSON, a line for each value."""
    write_bytes(path, json_lines(values))


def append_json_lines(path: str | Path, values: Iterable[Any], *, durable: bool = True) -> None:
    """Add lines of JSON at the end of a file, which is made if need be; its folder must exist.

    A line that a killed process left incomplete is closed first.

    Args:
        path: the file.
        values: JSON values, a line each.
        durable: return once the lines are on the disk.

    Raises:
        OSError: it cannot be written; the error has the file's name.
    """
    try:
        with open(path, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            closed = not size or os.pread(file.fileno(), 1, size - 1) == b"\n"
            content = (b"" if closed else b"\n") + json_lines(values)
            while content:
                content = content[file.write(content) :]
            if durable:
                fsync(file.fileno())
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)  # a write fails without saying in which file
        raise


def file_stamp(file: Path) -> tuple[int, int]:
    """(size in bytes, modification time in ns): what tells the file from one that is written over it."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def text_bytes(text: str) -> bytes:
    r"""A text in UTF-8, also one with a file name that is not UTF-8, whose bytes Python keeps as half characters.

    For digests, and as the seed of random numbers: `random.Random` takes other text alone.

    Example:
        >>> text_bytes("l\u00e4sion.png"), text_bytes("\udcff.png")
        (b'l\xc3\xa4sion.png', b'\xed\xb3\xbf.png')
    """
    return text.encode("utf-8", "surrogatepass")


def json_lines(values: Iterable[Any]) -> bytes:
    r"""Values as lines of JSON in UTF-8; letters that are not ASCII stay readable.

    Example:
        >>> json_lines([{"answer": "no"}, 1])
        b'{"answer": "no"}\n1\n'
    """
    return b"".join(_json_bytes(value, None) for value in values)


def _json_bytes(value: Any, indent: int | None) -> bytes:
    """JSON and a newline."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # a file name that is not UTF-8: only JSON's escapes can hold it
        text = json.dumps(value, indent=indent).encode("utf-8")
    return text + b"\n"


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is not JSON. So is text that is nested too deeply, for which `json.loads` raises a RecursionError.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UmedError: it is not JSON, or not an object.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UmedError(f"{file}: is not JSON ({error}). Was its writing cut off? Write it again.") from error
    if not isinstance(content, dict):
        raise UmedError(f"{file}: holds a {type(content).__name__}; expected an object.")
    return content


def is_stale_partial(file: os.DirEntry[str]) -> bool:
    """Whether a killed writer left this file half written: it ends with `PARTIAL` and is an hour old.

    Raises:
        FileNotFoundError: its writer has renamed or removed it since it was listed.
    """
    return file.name.endswith(PARTIAL) and time.time() - file.stat().st_mtime > _STALE_SECONDS


def _remove_stale(target: Path) -> None:
    """Remove what earlier writers of ``target`` left half written when they were killed."""
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.name.startswith(f"{target.name}.") and is_stale_partial(entry):
                    os.unlink(entry)
