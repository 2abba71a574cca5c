"""Write files and folders so that they appear whole or not at all, and survive a power cut; read JSON that may be damaged.

Everything goes through the same three steps: write beside the target, flush to the disk (``fsync``), rename over the target. A
process that is killed leaves the old file, or none, and a file that ends with ``.partial``; a later write of the same target
removes it. Several processes may write the same file: each has a partial file of its own, and the last rename wins. A folder is
written by one process at a time: `umed_plugin.files.locks`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.files.locks import locked

PARTIAL = ".partial"
_STALE_SECONDS = 3600  # no file takes so long to write: its writer was killed
# What file systems answer that cannot flush, or folders that may be written and not read. The file itself is whole.
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM}


_DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CANNOT_WRITE = {*_DISK_IS_FULL, errno.EROFS}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors
_TORCH_WRITER = re.compile(
    r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed writing"
)  # torch.save, which hides the reason


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
            _flush(partial)
        os.replace(partial, target)
        if durable:
            _flush(target.parent)
            _remove_stale(target)
    except OSError as error:
        unnamed = error.filename is None and error.errno in _DISK_IS_FULL  # a write fails without saying in which file
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
                _fsync(file.fileno())
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


@contextmanager
def replacing_folder(
    path: str | Path,
    *,
    overwrite: bool = False,
    inputs: Iterable[str | Path] = (),
    foreign: Callable[[Path], str | None] = lambda folder: None,
) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the place of ``path`` when the block ends without an error.

    What an earlier, killed process has left half written is removed first: checkpoints are too large to keep by mistake. Links
    are followed: the folder to which ``path`` leads is replaced.

    Args:
        path: the folder.
        overwrite: replace what is there.
        inputs: files and folders that are read meanwhile; ``path`` must not be, hold, or replace a part of one of them.
        foreign: why an existing folder must not be replaced, as text; None if it may.

    Raises:
        UmedError: ``path`` exists and must not be replaced, or another process is writing it.
    """
    target = Path(os.path.realpath(path))
    _refuse_inputs(target, [Path(item) for item in inputs])
    _refuse_existing(target, overwrite, foreign)
    with locked(target):
        _tidy(target)
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
        partial.mkdir()
        try:
            yield partial
            for entry in (*partial.rglob("*"), partial):
                _flush(entry)
            _put_in_place(partial, target, overwrite, foreign)
            _flush(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _refuse_existing(target: Path, overwrite: bool, foreign: Callable[[Path], str | None]) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise UmedError(
            f"{target}: exists already and is left as it is. Choose another --out, or replace it with --overwrite."
        )
    is_empty = target.is_dir() and not any(target.iterdir())
    reason = "it is a file" if not target.is_dir() else None if is_empty else foreign(target)
    if reason:
        raise UmedError(
            f"{target}: is left as it is, in spite of --overwrite: {reason}. --overwrite replaces only a folder of the kind that "
            "is written. Choose another --out, or remove the folder yourself."
        )


def _refuse_inputs(target: Path, inputs: list[Path]) -> None:
    """Refuse a target that is an input, holds one, or is a part of one."""
    for item in inputs:
        real = Path(os.path.realpath(item))
        # Links inside an input may lead into the target, as in the cache of the Hub.
        reached = [real, *(Path(os.path.realpath(entry.path)) for entry in _links(real))]
        if any(_is_same(target, place) for path in reached for place in (path, *path.parents)):
            held = "is" if _is_same(target, real) else "holds"
            raise UmedError(f"{target}: {held} the input {item}, which would be deleted. Choose another --out.")
        if target.exists() and real in target.parents:
            raise UmedError(f"{target}: is a part of the input {item}. Choose another --out.")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:
        return False


def _links(folder: Path) -> list[os.DirEntry[str]]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [entry for entry in entries if entry.is_symlink()]
    return []


def _tidy(target: Path) -> None:
    """Remove what killed processes left beside ``target``; the lock says that none of them is alive.

    One that was killed between its two renames left the old folder under another name, and nothing at ``target``.
    """
    left = [entry for entry in target.parent.iterdir() if entry.name.startswith(f"{target.name}.")]
    for entry in left:
        middle = entry.name[len(target.name) :]
        if re.fullmatch(r"(\.[0-9a-f]{8})?\.partial", middle) and entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif re.fullmatch(r"\.old-(\d+|[0-9a-f]{8})", middle):
            if target.exists():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                os.rename(entry, target)


def _put_in_place(partial: Path, target: Path, overwrite: bool, foreign: Callable[[Path], str | None]) -> None:
    """Rename the finished folder. What appeared at ``target`` meanwhile is never deleted without ``overwrite``."""
    try:
        if not overwrite:
            os.replace(partial, target)  # fails if there is anything but an empty folder
            return
        _refuse_existing(target, overwrite, foreign)
    except (OSError, UmedError) as error:
        if not target.exists():
            raise
        kept = target.with_name(f"{target.name}.finished-{uuid.uuid4().hex[:8]}")
        os.rename(partial, kept)
        raise UmedError(
            f"{target}: appeared while it was being written, and is left as it is. What was to be there is {kept}."
        ) from error
    old = target.with_name(f"{target.name}.old-{uuid.uuid4().hex[:8]}")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(partial, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    if path.is_symlink():
        return  # it stands in its folder's list, and what it points to is not ours
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Anything else is an error: the disk may be full or broken.
        if error.errno not in _CANNOT_FLUSH:
            raise


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


def failed_write(error: BaseException) -> str | None:
    """Why a file could not be written, if that is what an exception of any library means: the disk is full, or read-only.

    Returns:
        Text such as ``runs/a/optimizer.pt: No space left on device``; None for any other exception.

    Example:
        >>> failed_write(OSError(28, "No space left on device", "optimizer.pt"))
        'optimizer.pt: No space left on device'
        >>> failed_write(RuntimeError("[enforce fail at inline_container.cc:337] . unexpected pos 196032 vs 195920"))
        'a file could not be written to its end, as on a full disk or beyond a quota'
    """
    seen: BaseException | None = error
    while seen is not None:
        found = _RUST_ERROR.search(str(seen))
        number = seen.errno if isinstance(seen, OSError) else int(found[1]) if found else None
        if number is not None and number in _CANNOT_WRITE:
            name = getattr(seen, "filename", None) or "writing a file"
            return f"{name}: {os.strerror(number)}"
        if isinstance(seen, RuntimeError) and _TORCH_WRITER.search(str(seen)):
            return "a file could not be written to its end, as on a full disk or beyond a quota"
        seen = seen.__cause__ or seen.__context__
    return None
