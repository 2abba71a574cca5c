"""Folders and links on disk, as every reader sees them: links are followed, and one that leads nowhere is named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Optional, Union

from umed_plugin.errors import UmedError


def not_fetched(path: Union[str, Path]) -> Optional[str]:
    """What to say of a link whose target is not there, as git-annex and DataLad leave it; None for everything else."""
    if not os.path.islink(path) or os.path.exists(path):
        return None
    return f"is a link to {os.readlink(path)}, which is not there. Fetch it: git annex get, or datalad get"


def check_fetched(path: Union[str, Path]) -> None:
    """Refuse a link whose target is not there.

    Raises:
        UmedError: it is one.
    """
    if text := not_fetched(path):
        raise UmedError(f"{path}: {text}")


def folders_below(folder: Path, seen: Optional[set[str]] = None) -> Iterator[Path]:
    """A folder and all below it, hidden ones apart, each once: a link back to a folder above would have no end."""
    seen = set() if seen is None else seen
    real = os.path.realpath(folder)
    if real in seen or not folder.is_dir():
        return
    seen.add(real)
    yield folder
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            yield from folders_below(Path(entry.path), seen)
