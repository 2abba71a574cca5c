"""Uploaded files: stored up to a size limit, recognized by content, and unpacked. Their content is not trusted.

A file is stored under a number and the extension of its detected type. Its original name is only shown to the user who sent it.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Optional, Protocol

from umed_plugin.commands.serve.archives import Damaged, entries
from umed_plugin.errors import UmedError

MOST_FILES = 5000
_HEAD_BYTES = 8192  # enough of a compressed NIfTI file to read its header
_PIECE = 1 << 20
_MOST_NAME = 80

_PICTURES = {
    b"\x89PNG\r\n\x1a\n": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"BM": ".bmp",
}
_OLD_DICOM = (".dcm", ".dicom", ".ima")  # DICOM files of the 1990s lack the DICM mark
ALLOWED = "PNG, JPEG, TIFF or BMP, DICOM (several files or a zip of a series too), NIfTI (.nii, .nii.gz)"


class Readable(Protocol):
    """A stream to read a file from."""

    def read(self, most: int, /) -> bytes: ...


@dataclass(frozen=True)
class Received:
    """A stored file.

    Attributes:
        path: where it is stored.
        name: its original name, without folders.
        kind: ``picture``, ``dicom`` or ``nifti``.
    """

    path: Path
    name: str
    kind: str


@dataclass
class Uploads:
    """The uploaded files of one study.

    Attributes:
        folder: where they are stored.
        most_bytes: maximum total size, unpacked.
        files: the images, in upload order.
        left_out: (name, reason) of files in archives that are not images.
        size: of all of them, in bytes.
    """

    folder: Path
    most_bytes: int
    files: list[Received] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    size: int = 0
    _count: int = 0

    def take(self, stream: Readable, length: int, name: str) -> None:
        """Store one file, or the images in a zip archive.

        Args:
            stream: source of the bytes.
            length: number of bytes, as the sender states it.
            name: the original file name.

        Raises:
            UmedError: the file is too large, truncated, not an image, or an archive that cannot be unpacked.
        """
        name = shown_name(name)
        self._check_room(length, name)
        path = self._stored(_pieces(stream, length, name), name)
        ending = ending_of(_head(path), name)
        if ending == ".zip":
            try:
                self._unpack(path, name)
            finally:
                self.size -= path.stat().st_size
                path.unlink()
        elif ending is None:
            path.unlink()
            raise UmedError(f"{name}: is not a supported image. Allowed: {ALLOWED}.")
        else:
            self._keep(path, name, ending)

    def _stored(self, pieces: Iterator[bytes], name: str) -> Path:
        """Write the pieces to a new file. It is removed if they exceed the limit or the connection breaks."""
        self._count_file(name)
        path, before = self.folder / f"{self._count:05d}", self.size
        try:
            with path.open("xb") as file:
                for piece in pieces:
                    self._check_room(len(piece), name)
                    self.size += len(piece)
                    file.write(piece)
        except BaseException:
            self.size = before
            path.unlink(missing_ok=True)
            raise
        return path

    def _check_room(self, more: int, name: str) -> None:
        if self.size + more > self.most_bytes:
            raise UmedError(
                f"{name}: with this file the upload is larger than {self.most_bytes / 1e6:.0f} MB, unpacked. Send fewer files, "
                "or restart the server with a larger --upload-mb."
            )

    def _count_file(self, name: str) -> None:
        self._count += 1
        if self._count > MOST_FILES:
            raise UmedError(f"{name}: more than {MOST_FILES} files. Send one series at a time.")

    def _keep(self, path: Path, name: str, ending: str) -> None:
        if ending == ".nii.gz":
            inflated = self._inflated(path, name)
            if inflated is None:
                return
            path, ending = inflated, ".nii"
        kind = {".dcm": "dicom", ".nii": "nifti"}.get(ending, "picture")
        self.files.append(Received(path.rename(path.with_name(path.name + ending)), name, kind))

    def _inflated(self, path: Path, name: str) -> Optional[Path]:
        """Unpack a compressed volume, so that any slice of any plane can be read alone and at once; None if it is damaged."""
        try:
            with gzip.open(path) as file:
                return self._stored(iter(lambda: file.read(_PIECE), b""), name)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            self.left_out.append((name, "cannot be read as an image. It is damaged or truncated."))
            return None
        finally:
            self.size -= path.stat().st_size
            path.unlink()

    def _unpack(self, archive: Path, name: str) -> None:
        """Store the images in a zip archive. Unpacked bytes are counted; sizes stated in the archive are not trusted."""
        try:
            with entries(archive) as held:
                for entry, pieces in held:
                    self._unpack_one(shown_name(entry), pieces)
        except Damaged as error:
            raise UmedError(
                f"{name}: cannot be unpacked: {error}. Pack it again as an ordinary zip, without a password."
            ) from error
        except UmedError as error:
            raise error if str(error).startswith(f"{name}: ") else UmedError(f"{name}: {error}") from error

    def _unpack_one(self, name: str, pieces: Iterator[bytes]) -> None:
        """Store an entry if its first bytes are those of an image. The rest of anything else is not even unpacked."""
        head = b""
        for piece in pieces:
            head += piece
            if len(head) >= _HEAD_BYTES:
                break
        ending = ending_of(head[:_HEAD_BYTES], name)
        if ending is None or ending == ".zip":
            self._count_file(name)
            self.left_out.append((name, "an archive inside an archive" if ending else "not an image"))
        else:
            self._keep(self._stored(chain([head], pieces), name), name, ending)


def shown_name(name: str) -> str:
    """The last component of a file's path, printable and at most 80 characters long."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return "".join(c if c.isprintable() else "?" for c in last)[:_MOST_NAME] or "file"


def ending_of(head: bytes, name: str) -> Optional[str]:
    """The extension for a file's first bytes: an image type, ``.zip``, or None if unknown."""
    if head[128:132] == b"DICM":
        return ".dcm"
    if head.startswith(b"PK\x03\x04"):
        return ".zip"
    if head.startswith(b"\x1f\x8b"):
        return ".nii.gz" if _is_nifti(_inflated(head)) else None
    if _is_nifti(head):
        return ".nii"
    for mark, ending in _PICTURES.items():
        if head.startswith(mark):
            return ending
    return ".dcm" if name.lower().endswith(_OLD_DICOM) else None


def _is_nifti(head: bytes) -> bool:
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


def _inflated(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(head, 1024)
    except zlib.error:
        return b""


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _pieces(stream: Readable, length: int, name: str) -> Iterator[bytes]:
    while length > 0:
        piece = stream.read(min(length, _PIECE))
        if not piece:
            raise UmedError(f"{name}: the connection was lost before the whole file arrived. Send it again.")
        length -= len(piece)
        yield piece
