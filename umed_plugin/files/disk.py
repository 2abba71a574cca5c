"""What the disk answers: flush a file to it, and tell from an exception of any library that it could not be written."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

# What file systems answer that cannot flush, or folders that may be written and not read. The file itself is whole.
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM}
DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CANNOT_WRITE = {*DISK_IS_FULL, errno.EROFS}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors
_TORCH_WRITER = re.compile(
    r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed writing"
)  # torch.save, which hides the reason


def flush(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    if path.is_symlink():
        return  # it stands in its folder's list, and what it points to is not ours
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync(descriptor: int) -> None:
    """Bring an open file to the disk, where the file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Anything else is an error: the disk may be full or broken.
        if error.errno not in _CANNOT_FLUSH:
            raise


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
