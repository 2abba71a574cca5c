"""Uploads to the chat page and the studies that they become, without a server."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from umed_plugin.commands.serve.studies import Study
from umed_plugin.commands.serve.uploads import Uploads
from umed_plugin.commands.serve.views import View


def uploaded(folder: Path, *files: Path | tuple[str, bytes], most_bytes: int = 50_000_000) -> Uploads:
    """Take files, or pairs of a name and a content, into the folder."""
    uploads = Uploads(folder, most_bytes)
    for file in files:
        name, content = (file.name, file.read_bytes()) if isinstance(file, Path) else file
        uploads.take(io.BytesIO(content), len(content), name)
    return uploads


def study_of(folder: Path, *files: Any) -> Study:
    """What the page shows of these files."""
    uploads = uploaded(folder, *files)
    return Study(folder, uploads.files, uploads.left_out)


def pixels(study: Study, **view: Any) -> np.ndarray:
    """The picture of a view, uint8 ``[rows, columns, 3]``."""
    return np.asarray(study.picture(View(**view)))


def zipped(*entries: tuple[str, bytes]) -> bytes:
    """An archive of pairs of a name and a content."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return held.getvalue()
