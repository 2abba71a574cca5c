"""Zip archives from strangers: entries are decompressed in pieces of bounded size, whatever their compression method.

`zipfile` bounds its reads for deflate alone; one read of a bzip2 or LZMA entry may inflate a kilobyte to gigabytes. So it only
reads the list of entries here, up to a size. Sizes that the archive states are not trusted.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from umed_plugin.errors import UmedError

MOST_ENTRIES = 20_000
# The list of entries is read at once, and takes ten times its size in memory.
_MOST_LIST_BYTES = 4 << 20
_MOST_DICTIONARY = 64 << 20  # of LZMA, which allocates what the archive asks for; 7-Zip's largest preset
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x1
PIECE = 1 << 18


class _Decompressor(Protocol):
    """`bz2.BZ2Decompressor` and `lzma.LZMADecompressor`."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class Damaged(Exception):
    """The archive cannot be read; the message is the reason."""


class _ShortReads:
    """A file of which at most `_MOST_LIST_BYTES` can be read at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(min(size, _MOST_LIST_BYTES + 1) if size >= 0 else _MOST_LIST_BYTES + 1)
        if len(content) > _MOST_LIST_BYTES:
            raise UmedError(f"it has too many entries. Allowed: {MOST_ENTRIES}. Send one series at a time.")
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def entries(archive: Path) -> Iterator[Iterator[tuple[str, Iterator[bytes]]]]:
    """Give the name and the content of every file in an archive, the content as pieces that may be left unread.

    Raises:
        Damaged: it, or one of its entries, is not as the format demands, is encrypted, or uses another compression.
        UmedError: it has more entries than `MOST_ENTRIES`.
    """
    with archive.open("rb") as file:
        try:
            listed = zipfile.ZipFile(_ShortReads(file)).infolist()
        except UmedError:
            raise
        except Exception as error:  # zipfile raises what struct, codecs and its own checks raise
            raise Damaged("it is damaged or truncated") from error
        if len(listed) > MOST_ENTRIES:
            raise UmedError(f"it has {len(listed)} entries. Allowed: {MOST_ENTRIES}. Send one series at a time.")
        yield ((entry.filename, _content(file, entry)) for entry in listed if not entry.is_dir())


def _content(file: IO[bytes], entry: zipfile.ZipInfo) -> Iterator[bytes]:
    if entry.flag_bits & _ENCRYPTED:
        raise Damaged("it is encrypted")
    method = _METHODS.get(entry.compress_type)
    if method is None:
        raise Damaged(f"its compression (method {entry.compress_type}) is not supported")
    try:
        checksum = 0
        for piece in method(_compressed(file, entry)):
            checksum = zlib.crc32(piece, checksum)
            yield piece
        if checksum != entry.CRC:
            raise ValueError("wrong checksum")
    except (zlib.error, lzma.LZMAError, struct.error, ValueError, EOFError, OSError) as error:  # bz2 raises OSError
        raise Damaged("it is damaged or truncated") from error


def _compressed(file: IO[bytes], entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """The entry's bytes as they are in the archive."""
    file.seek(entry.header_offset)
    mark, *_, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if mark != b"PK\x03\x04":
        raise ValueError("not a local header")
    place, end = file.tell() + name_length + extra_length, entry.compress_size
    while end > 0:
        file.seek(place)  # another entry may have been read in between
        piece = file.read(min(PIECE, end))
        if not piece:
            raise EOFError("truncated")
        place, end = place + len(piece), end - len(piece)
        yield piece


def _deflated(pieces: Iterator[bytes]) -> Iterator[bytes]:
    inflate = zlib.decompressobj(-15)
    for piece in pieces:
        while piece and not inflate.eof:
            yield inflate.decompress(piece, PIECE)
            piece = inflate.unconsumed_tail
    yield inflate.flush()
    if not inflate.eof:
        raise EOFError("truncated")


def _bzipped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    return _bounded(bz2.BZ2Decompressor(), pieces)


def _lzma(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """LZMA of a zip entry: version, size of the properties, properties (lc, lp, pb and dictionary), raw stream."""
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= 9:
            break
    _, size, packed, dictionary = struct.unpack("<HHBL", head[:9])
    if size != 5 or packed >= 9 * 5 * 5 or dictionary > _MOST_DICTIONARY:
        raise ValueError("properties of LZMA")
    lc, lp, pb = packed % 9, packed // 9 % 5, packed // 45
    filters = [{"id": lzma.FILTER_LZMA1, "dict_size": max(dictionary, 4096), "lc": lc, "lp": lp, "pb": pb}]
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)

    def rest() -> Iterator[bytes]:
        yield head[9:]
        yield from pieces

    return _bounded(unpacker, rest(), has_end=False)


def _bounded(unpacker: _Decompressor, pieces: Iterator[bytes], has_end: bool = True) -> Iterator[bytes]:
    for piece in pieces:
        yield unpacker.decompress(piece, PIECE)
        while not unpacker.eof and not unpacker.needs_input:
            yield unpacker.decompress(b"", PIECE)
    if has_end and not unpacker.eof:
        raise EOFError("truncated")


_METHODS = {
    zipfile.ZIP_STORED: lambda pieces: pieces,
    zipfile.ZIP_DEFLATED: _deflated,
    zipfile.ZIP_BZIP2: _bzipped,
    zipfile.ZIP_LZMA: _lzma,
}
