"""Write files and folders so that they appear whole or not at all, and survive a power cut.

Everything goes through the same three steps: write beside the target, flush to the disk (``fsync``), rename over the target. A
process that is killed leaves the old file, or none, and a file that ends with ``.partial``; a later write of the same target
removes it. Several processes may write the same file: each has a partial file of its own, and the last rename wins.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError

PARTIAL = ".partial"
_STALE_SECONDS = 3600  # no file takes so long to write: its writer was killed
# What file systems answer that cannot flush, or folders that may be written and not read. The file itself is whole.
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM}


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
    try:
        write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
    except UnicodeEncodeError:  # a file name that is not UTF-8: only JSON's escapes can hold it
        write_text(path, json.dumps(value, indent=indent) + "\n")


@contextmanager
def replacing_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the place of ``path`` when the block ends without an error.

    What an earlier, killed process has left half written is removed first: checkpoints are too large to keep by mistake.

    Raises:
        UmedError: ``path`` exists and ``overwrite`` is False.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise UmedError(
            f"{target}: exists already and is left as it is. Choose another --out, or replace it with --overwrite."
        )
    partial, old = target.with_name(target.name + PARTIAL), target.with_name(f"{target.name}.old-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for entry in (*partial.rglob("*"), partial):
            _flush(entry)
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(partial, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        _flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    if path.is_symlink():
        return  # it stands in its folder's list, and what it points to is not ours
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Anything else is an error: the disk may be full or broken.
        if error.errno not in _CANNOT_FLUSH:
            raise
    finally:
        os.close(descriptor)


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
