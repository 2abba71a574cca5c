"""Paths that libraries in C++ can open: sentencepiece encodes names in UTF-8, whatever the locale of the process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_utf8(path: Path) -> Iterator[Path]:
    """The path, or a link to it where the locale of this process is not UTF-8 and the path is not ASCII."""
    if os.fsencode(path) == str(path).encode("utf-8", "replace"):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="umed-path-") as folder:
        link = Path(folder) / "link"
        link.symlink_to(path.absolute(), target_is_directory=True)
        yield link
