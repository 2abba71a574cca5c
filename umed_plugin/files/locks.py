"""Locks on the files and folders that commands write: a second run is refused, and a lock ends with its process, even by -9.

The lock is the kernel's (``flock``) on a small file, which says whose it is. The file alone means nothing: one that a killed
process has left is locked anew. A file system without locks is said, and the run goes on.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from umed_plugin.errors import UmedError, warn

INSIDE = ".lock"
# What file systems answer that have no locks.
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_OWNER = re.compile(rb"(\d+) ([\w.-]+)")
# Descriptors that hold locks. A forked child has them too, and would keep the lock when its parent is killed.
_HELD: set[int] = set()
_FOR_THE_PROCESS = contextlib.ExitStack()
_KEPT: set[Path] = set()


class HeldByAnotherError(UmedError):
    """Another process holds the lock."""


@dataclass(frozen=True)
class _Asked:
    """What is locked, by which file, and the words for those who come second."""

    target: Path
    file: Path
    shared: bool
    busy: str
    flag: str | None


@contextmanager
def locked(
    path: str | Path,
    *,
    inside: bool = False,
    shared: bool = False,
    busy: str = "another process is writing it",
    flag: str | None = "--out",
) -> Iterator[None]:
    """Hold a file or folder for this process; a second process that writes it is refused. The lock ends with its process.

    Args:
        path: what is written. The lock is a file beside it, which is removed at the end.
        inside: ``path`` is a folder to which files are added; the lock is a file in it. The folder is made if need be.
        shared: others may hold it too, if they also ask for a shared lock.
        busy: what the second process is told, before the number of the first.
        flag: that names another place; None if there is none.

    Raises:
        HeldByAnotherError: another process holds it.
        UmedError: the folder around it cannot be written.

    Example:
        >>> import tempfile
        >>> with locked(Path(tempfile.mkdtemp()) / "model"):
        ...     pass
    """
    target = Path(os.path.realpath(path))
    file = target / INSIDE if inside else target.with_name(f".{target.name}.lock")
    made, holder = [folder for folder in file.parents if not folder.exists()], os.getpid()
    try:
        descriptor = _lock(_Asked(target, file, shared, busy, flag))
        _HELD.add(descriptor)
        try:
            yield
        finally:
            # A forked child leaves this block too, if only when it forgets the block: the lock and the folder are its parent's.
            if os.getpid() == holder:
                _release(descriptor, file, shared)
    finally:
        if os.getpid() == holder:  # nothing is left of a run that was refused before it wrote
            with contextlib.suppress(OSError):
                for folder in made:
                    folder.rmdir()


def lock_for_the_process(path: str | Path, busy: str, flag: str) -> None:
    """`locked` on the inside of a folder until this process ends; a second call for the same folder does nothing."""
    target = Path(os.path.realpath(path))
    if target not in _KEPT:
        _FOR_THE_PROCESS.enter_context(locked(target, inside=True, busy=busy, flag=flag))
        _KEPT.add(target)


def holder(folder: str | Path) -> str | None:
    """Who holds the inside of a folder, such as ``process 123 on node7``; None if nobody does."""
    try:
        descriptor = os.open(Path(folder) / INSIDE, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(descriptor).strip(" ()") or "a process"
    except OSError:  # this file system has no locks
        return None
    finally:
        os.close(descriptor)
    return None


def _lock(asked: _Asked) -> int:
    """Open and lock the file; return its descriptor, which holds the lock."""
    while True:
        descriptor = _open(asked)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if asked.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            other = "or stop it" if asked.flag is None else f"stop it, or choose another {asked.flag}"
            raise HeldByAnotherError(f"{asked.target}: {asked.busy}{owner}. Wait for that one, {other}.") from None
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                os.close(descriptor)
                raise
            warn(
                f"{asked.target}: its file system has no locks ({error.strerror}). Start no second run that writes it."
            )
            return descriptor
        # Its last holder may have removed the file meanwhile: then another process can lock a new one of that name.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(asked.file)):
                _sign(descriptor)
                return descriptor
        os.close(descriptor)


def _open(asked: _Asked) -> int:
    try:
        asked.file.parent.mkdir(parents=True, exist_ok=True)
        return os.open(asked.file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        remedy = "Make it writable" if asked.flag is None else f"Choose another {asked.flag}"
        raise UmedError(f"{asked.target}: cannot be written ({error.strerror}). {remedy}.") from error


def _release(descriptor: int, file: Path, shared: bool) -> None:
    """Remove the file, unless others share the lock; then give it up."""
    _HELD.discard(descriptor)
    try:
        if shared:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink(missing_ok=True)
    except OSError:
        pass  # another holds it, or the folder cannot be written any more: the next run locks the same file
    finally:
        os.close(descriptor)


def _sign(descriptor: int) -> None:
    """Write whose lock it is, for the message; on a full disk it stays empty."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)


def _owner(descriptor: int) -> str:
    """The holder in parentheses, such as ``(process 123)``, with its machine where that is another; empty if unknown."""
    with contextlib.suppress(OSError):
        found = _OWNER.match(os.pread(descriptor, 300, 0))
        if found:
            host = found[2].decode()
            return f" (process {found[1].decode()}{'' if host == socket.gethostname() else f' on {host}'})"
    return ""


def _forget_in_child() -> None:
    """A child keeps no lock of its parent: data loaders and the like outlive one that is killed by some seconds."""
    for descriptor in _HELD:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _HELD.clear()
    _KEPT.clear()
    _FOR_THE_PROCESS.pop_all()


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_FOR_THE_PROCESS.close)
