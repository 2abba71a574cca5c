"""PyTorch's zip archives: only the layout that it writes is read, with small numbers and with large ones."""

from __future__ import annotations

import io
import struct
import zipfile

import pytest

from umed_plugin.checkpoints.archives import begin_of, is_archive, read_entries
from umed_plugin.checkpoints.stored import BadFile

FILES = {"archive/data.pkl": b"pickle", "archive/data/0": bytes(64), "archive/version": b"3\n"}


def archive(files: dict[str, bytes] = FILES, **options: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as written:
        for name, data in files.items():
            written.writestr(name, data)
    return stream.getvalue()


def contents(data: bytes) -> dict[bytes, bytes]:
    stream = io.BytesIO(data)
    found = {}
    for name, entry in read_entries(stream).items():
        stream.seek(begin_of(stream, entry))
        found[name] = stream.read(entry.size)
    return found


def with_large_numbers(data: bytes, record_64: bool = True) -> bytes:
    """The archive with sizes and places in their 64-bit fields, as PyTorch writes those above 4 GB, and with both ends."""
    end = data[-22:]
    count, _, offset = struct.unpack("<H2I", end[10:20])
    directory, place = b"", offset
    while place < len(data) - 22:
        values = list(struct.unpack_from("<4s6H3I5H2I", data, place))
        name = data[place + 46 : place + 46 + values[10]]
        place += 46 + len(name)
        field = struct.pack("<2H3Q", 1, 24, values[9], values[8], values[16])
        values[8] = values[9] = values[16] = 0xFFFFFFFF
        values[11] = len(field)
        directory += struct.pack("<4s6H3I5H2I", *values) + name + field
    numbers = (45, 45, 0, 0, count, count, len(directory), offset)
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, *numbers)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, offset + len(directory), 1)
    small = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data[:offset] + directory + wide + locator + small


@pytest.mark.parametrize("change", [bytes, with_large_numbers], ids=["small", "large"])
def test_entries_are_read_as_they_are_stored(change):
    data = change(archive())
    assert contents(data) == {name.encode(): value for name, value in FILES.items()}
    with zipfile.ZipFile(io.BytesIO(data)) as read:
        assert {name: read.read(name) for name in read.namelist()} == FILES


def commented(data: bytes) -> bytes:
    return data[:-2] + b"\2\0ab"


def counted(data: bytes) -> bytes:
    """The end names one entry less, and PyTorch reads no further."""
    return data[:-14] + b"\2\0\2\0" + data[-10:]


def moved(data: bytes) -> bytes:
    """A second directory lies between the first and the end."""
    offset = struct.unpack("<I", data[-6:-2])[0]
    return data[:-22] + data[offset:-22] + data[-22:]


FAULTS = {
    "bytes before": lambda data: b"PK\3\4" + bytes(30) + data,
    "bytes after": lambda data: data + b"\0",
    "a comment": commented,
    "two directories": moved,
    "another count": counted,
    "the locator names another place": lambda data: with_large_numbers(data).replace(
        b"PK\6\7\0\0\0\0", b"PK\6\7\0\0\0\1"
    ),
    "cut": lambda data: data[:-30],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_archive_of_another_layout_is_refused(fault):
    data = FAULTS[fault](archive())
    assert is_archive(io.BytesIO(data))
    with pytest.raises(BadFile, match="zip archive that"):
        read_entries(io.BytesIO(data))


def test_names_that_differ_in_case_alone_are_refused():
    data = archive({"archive/data.pkl": b"a", "archive/DATA.PKL": b"b"})
    with pytest.raises(BadFile, match="two of its entries have one name"):
        read_entries(io.BytesIO(data))


def test_a_compressed_entry_is_told():
    data = archive(FILES, compression=zipfile.ZIP_DEFLATED)
    assert not read_entries(io.BytesIO(data))[b"archive/data/0"].is_plain
    assert read_entries(io.BytesIO(archive()))[b"archive/data/0"].is_plain


def test_two_letters_make_no_archive():
    assert not is_archive(io.BytesIO(b"PKx" + archive()))
