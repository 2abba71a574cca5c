"""Arrays that `numpy.savez` has kept beside a user's files, read without trust: whoever made the folder may have made them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def kept_arrays(file: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an archive, each read when it is asked for.

    Raises:
        ValueError: the archive is compressed, which `numpy.savez` does not do: unpacked it could be of any size.
        Exception: whatever zip, zlib and NumPy raise where it is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
            raise ValueError(f"{file}: holds more than its size")
    with np.load(file, allow_pickle=False) as arrays:
        yield arrays
