"""The entries of a PyTorch file that is a zip archive, exactly as `torch.load` finds them.

PyTorch reads archives with miniz. Another reader, such as Python's `zipfile`, can find other entries in a file that was made for
it. It skips bytes before the archive, takes the directory from another place, or tells ``DATA.PKL`` from ``data.pkl``. So only
the layout that PyTorch writes is accepted: entries, one directory, one end, and no byte between the last two or after them.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import IO

from umed_plugin.checkpoints.stored import BadFile

PROGRAM = "pickle-runs-code"  # code of the finding
_LOCAL, _CENTRAL, _END = b"PK\3\4", b"PK\1\2", b"PK\5\6"
_END_64, _LOCATOR_64 = b"PK\6\6", b"PK\6\7"
# Layouts of the records; the format is described in PKWARE's APPNOTE.
_LOCAL_RECORD, _CENTRAL_RECORD, _END_RECORD = "<4s5H3I2H", "<4s6H3I5H2I", "<4s4H2IH"
_END_RECORD_64, _LOCATOR_RECORD_64 = "<4sQ2H2I4Q", "<4sIQI"
_LARGE = 0xFFFFFFFF  # in place of a number that stands in the 64-bit field
_FIELD_64 = 1


@dataclass(frozen=True)
class Entry:
    """One entry of an archive.

    Attributes:
        name: as it is stored.
        size: of its data in the file, in bytes.
        is_plain: whether its data is neither compressed nor encrypted, as PyTorch writes every entry.
        header: byte offset of the header before its data.
    """

    name: bytes
    size: int
    is_plain: bool
    header: int


def is_archive(stream: IO[bytes]) -> bool:
    """Whether `torch.load` would read a stream as an archive. The stream is left at its start."""
    stream.seek(0)
    start = stream.read(len(_LOCAL))
    stream.seek(0)
    return start == _LOCAL


def read_entries(stream: IO[bytes]) -> dict[bytes, Entry]:
    """The entries by their names in lower case, as PyTorch compares them, in the order of the directory.

    Raises:
        BadFile: the archive is truncated, or PyTorch did not write it.
    """
    offset, end, count = _directory(stream)
    data = _at(stream, offset, end - offset)
    entries: dict[bytes, Entry] = {}
    place = number = 0
    while place < len(data):
        entry, place = _entry(data, place)
        number += 1
        if entry.name.lower() in entries:
            raise _odd("two of its entries have one name")
        entries[entry.name.lower()] = entry
    if number != count or not entries:
        raise _odd(f"its directory has {number} entries, and its end says {count}")
    return entries


def begin_of(stream: IO[bytes], entry: Entry) -> int:
    """Byte offset of an entry's data; the entry's header states the lengths of its name and padding."""
    signature, *_, name, padding = _record(_LOCAL_RECORD, _at(stream, entry.header, struct.calcsize(_LOCAL_RECORD)))
    if signature != _LOCAL:
        raise _odd("its directory names a place where no entry is")
    return entry.header + struct.calcsize(_LOCAL_RECORD) + name + padding


def _directory(stream: IO[bytes]) -> tuple[int, int, int]:
    """Where the directory begins and ends, and the number of its entries."""
    last = stream.seek(0, os.SEEK_END) - struct.calcsize(_END_RECORD)
    signature, *disks, here, count, size, offset, comment = _record(_END_RECORD, _at(stream, last))
    if signature != _END or comment:
        raise BadFile("file-truncated", "is a zip archive that does not end as PyTorch ends it")
    wide = _end_64(stream, last)
    if wide is not None:
        last, disks, here, count, size, offset = wide
    if any(disks) or here != count or offset + size != last:
        raise _odd("its directory does not lie where its end says")
    return offset, last, count


def _end_64(stream: IO[bytes], last: int) -> tuple[int, list[int], int, int, int, int] | None:
    """What the end says in numbers of 64 bits, which PyTorch writes: the record's offset, disks, entries, size and offset."""
    locator = last - struct.calcsize(_LOCATOR_RECORD_64)
    if locator < 0 or _at(stream, locator, 4) != _LOCATOR_64:
        return None
    _, disk, place, total = _record(_LOCATOR_RECORD_64, _at(stream, locator))
    length = struct.calcsize(_END_RECORD_64)
    if disk or total != 1 or place != locator - length:
        raise _odd("its two ends do not lie side by side")
    signature, size, _, _, *disks, here, count, bytes_, offset = _record(_END_RECORD_64, _at(stream, place))
    if signature != _END_64 or size != length - 12:
        raise _odd("its two ends do not lie side by side")
    return place, disks, here, count, bytes_, offset


def _entry(data: bytes, place: int) -> tuple[Entry, int]:
    """The directory's entry at a place, and the place of the next."""
    values = _record(_CENTRAL_RECORD, data, place)
    signature, _, _, flags, method, _, _, _, packed, size, name, fields, comment, _, _, _, header = values
    begin = place + struct.calcsize(_CENTRAL_RECORD)
    end = begin + name + fields + comment
    name_bytes = data[begin : begin + name]
    if signature != _CENTRAL or end > len(data) or b"\0" in name_bytes:
        raise _odd("its directory holds more than entries")
    size, packed, header = _wide(data[begin + name : begin + name + fields], [size, packed, header])
    is_plain = method == 0 and not flags & 1 and packed == size
    return Entry(name_bytes, packed, is_plain, header), end


def _wide(fields: bytes, numbers: list[int]) -> list[int]:
    """The three numbers, with those that are too large for 32 bits from the entry's field of 64-bit numbers."""
    found = []
    while fields:
        kind, length = _record("<2H", fields)
        if kind == _FIELD_64:
            found.append(fields[4 : 4 + length])
        fields = fields[4 + length :]
    if len(found) > 1:
        raise _odd("an entry states its place twice")
    left = found[0] if found else b""
    wide = []
    for number in numbers:
        if number == _LARGE:
            (number,), left = _record("<Q", left), left[8:]
        wide.append(number)
    return wide


def _record(layout: str, data: bytes, place: int = 0) -> tuple:
    """The values at a place of ``data``."""
    if len(data) - place < struct.calcsize(layout):
        raise _odd("a record of it ends too early")
    return struct.unpack_from(layout, data, place)


def _at(stream: IO[bytes], place: int, length: int = 64) -> bytes:
    """Bytes of the file from a place that it states; fewer if the file ends there."""
    stream.seek(max(place, 0))
    return stream.read(length)


def _odd(fault: str) -> BadFile:
    return BadFile(
        PROGRAM, f"is a zip archive that PyTorch did not write ({fault}): each reader could find other things in it"
    )
