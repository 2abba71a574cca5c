"""Write a folder so that it appears whole or not at all, in the place of an earlier one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from umed_plugin.errors import UmedError
from umed_plugin.files.disk import flush
from umed_plugin.files.locks import locked

PARTIAL = ".partial"


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
                flush(entry)
            _put_in_place(partial, target, overwrite, foreign)
            flush(target.parent)
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
