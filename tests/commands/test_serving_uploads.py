"""Bad and hostile uploads to the chat page: refused or left out with a reason, and never more than allowed."""

from __future__ import annotations

import io
import os
import random
import tracemalloc
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from pydicom.uid import ExplicitVRLittleEndian
from support.drawn import scene, write_dicom, write_dicom_as, write_png
from support.series import write_volume
from support.serving_uploads import study_of, uploaded, zipped

from umed_plugin.commands.serve import archives
from umed_plugin.commands.serve.uploads import Uploads, ending_of, shown_name
from umed_plugin.commands.serve.views import View
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.one_stack


@pytest.mark.llava
def test_bad_files_beside_good_ones_are_left_out(folder: Path, tmp_path: Path) -> None:
    good = write_dicom(tmp_path / "good.dcm", scene()).read_bytes()
    study = study_of(folder, ("good.dcm", good), ("cut.dcm", good[:600]), ("cut.png", b"\x89PNG\r\n\x1a\n" + bytes(40)))
    assert [item.label for item in study.items] == ["good.dcm"]
    assert [name for name, _ in study.left_out] == ["cut.dcm", "cut.png"]
    assert all("damaged" in reason for _, reason in study.left_out)


@pytest.mark.llava
def test_messages_hold_neither_folders_nor_header_text(folder: Path, tmp_path: Path) -> None:
    odd = write_dicom(tmp_path / "odd.dcm", scene(), PhotometricInterpretation="MONOCHROME2")
    content = odd.read_bytes().replace(b"-1000", b"Doe^J", 1)
    assert content != odd.read_bytes()
    with pytest.raises(UmedError) as raised:
        study_of(folder, ("odd.dcm", content))
    message = str(raised.value)
    assert "odd.dcm" in message and "Doe" not in message and str(tmp_path) not in message
    assert "odd.dcm: odd.dcm" not in message


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b"text"), ("a.png", b"not a png"), ("a.nii", b"short"), ("a.gz", b"\x1f\x8b rubbish"), ("a.exe", b"MZ")],
)  # fmt: skip
def test_what_is_no_image_is_refused_with_what_is_allowed(name: str, content: bytes, folder: Path) -> None:
    with pytest.raises(UmedError, match=f"{name}: is not a supported image. Allowed: PNG"):
        uploaded(folder, (name, content))
    assert list(folder.iterdir()) == []


def test_no_more_is_stored_than_is_allowed(folder: Path, tmp_path: Path) -> None:
    picture = write_png(tmp_path / "a.png", scene()).read_bytes()
    with pytest.raises(UmedError, match=r"larger than 0 MB.*--upload-mb"):
        uploaded(folder, ("a.png", picture), ("b.png", picture), most_bytes=len(picture) + 5)
    assert sum(file.stat().st_size for file in folder.iterdir()) == len(picture)


def test_a_zip_bomb_ends_at_the_limit(folder: Path) -> None:
    bomb = zipped(("a.png", b"\x89PNG\r\n\x1a\n" + bytes(30_000_000)))
    assert len(bomb) < 100_000
    with pytest.raises(UmedError, match="unpacked"):
        uploaded(folder, ("bomb.zip", bomb), most_bytes=1_000_000)
    assert list(folder.iterdir()) == []


@pytest.mark.llava
def test_a_zip_writes_nothing_outside_and_unpacks_no_zip_in_it(folder: Path, tmp_path: Path) -> None:
    picture = write_png(tmp_path / "a.png", scene()).read_bytes()
    archive = zipped(("../../evil.png", picture), ("/etc/evil.png", picture), ("inner.zip", zipped(("x.png", picture))))
    study = study_of(folder, ("a.zip", archive))
    assert [item.label for item in study.items] == ["evil.png", "evil.png"]
    assert study.left_out == [("inner.zip", "an archive inside an archive")]
    assert {file.parent for file in tmp_path.rglob("*evil*")} == set()
    assert sorted(file.name for file in folder.iterdir()) == ["00002.png", "00003.png"]


def encrypted_zip() -> bytes:
    content = bytearray(zipped(("a.png", b"\x89PNG\r\n\x1a\n" + bytes(100))))
    for mark, flag in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + flag] |= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [(encrypted_zip(), "encrypted"), (zipped(("a.png", bytes(999)))[:60], "damaged"), (b"PK\x03\x04" + bytes(99), "damaged")],
    ids=["encrypted", "cut", "a header and zeros"],  # not the content: it holds the time, which differs between workers
)  # fmt: skip
def test_zips_that_cannot_be_unpacked(content: bytes, said: str, folder: Path) -> None:
    with pytest.raises(UmedError, match=f"a.zip: cannot be unpacked: it is {said}"):
        uploaded(folder, ("a.zip", content))
    assert list(folder.iterdir()) == []


METHODS = {"deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}


def packed_by(method: int, content: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", method) as archive:
        archive.writestr("a.png", content)
    return held.getvalue()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_zip_bomb_is_inflated_in_pieces(method: int, folder: Path) -> None:
    bomb = packed_by(method, b"\x89PNG\r\n\x1a\n" + bytes(60_000_000))
    tracemalloc.start()
    with pytest.raises(UmedError, match="larger than 20 MB, unpacked"):
        uploaded(folder, ("a.zip", bomb), most_bytes=20_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000 and list(folder.iterdir()) == []


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_damaged_entry_is_one_sentence(method: int, folder: Path, tmp_path: Path) -> None:
    picture = write_png(tmp_path / "a.png", scene()).read_bytes()
    whole = packed_by(method, picture)
    assert (folder / uploaded(folder, ("a.zip", whole)).files[0].path.name).read_bytes() == picture
    for place in range(40, len(whole) - 80, 7):
        damaged, made = bytearray(whole), folder.with_name(f"damaged-{place}")
        made.mkdir()
        damaged[place] ^= 0x55
        try:
            uploads = uploaded(made, ("a.zip", bytes(damaged)))
        except UmedError as error:
            assert str(error).startswith("a.zip: cannot be unpacked: it") and "\n" not in str(error)
        else:
            # The damage is in bytes without a meaning, such as the size of LZMA's dictionary.
            assert [file.path.read_bytes() for file in uploads.files] in ([picture], [])


def test_a_compression_that_cannot_be_read_is_named(folder: Path) -> None:
    content = bytearray(packed_by(zipfile.ZIP_DEFLATED, b"\x89PNG\r\n\x1a\n"))
    for mark, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        content[content.index(mark) + place] = 9  # Deflate64, of Windows
    with pytest.raises(UmedError, match=r"a.zip: cannot be unpacked: its compression \(method 9\) is not supported"):
        uploaded(folder, ("a.zip", bytes(content)))


def test_a_zip_of_too_many_entries_is_refused_before_they_are_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = zipped(*((f"{number}/", b"") for number in range(300)))
    uploaded(folder, ("a.zip", folders))
    monkeypatch.setattr(archives, "MOST_ENTRIES", 299)
    with pytest.raises(UmedError, match="a.zip: it has 300 entries. Allowed: 299"):
        uploaded(folder, ("a.zip", folders))
    monkeypatch.setattr(archives, "_MOST_LIST_BYTES", 10_000)
    with pytest.raises(UmedError, match="a.zip: it has too many entries"):
        uploaded(folder, ("a.zip", folders))


def test_what_is_no_image_is_not_unpacked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many entries may share the same bytes of an archive: 10 MB unpack to terabytes."""
    seen: list[int] = []
    crc32 = archives.zlib.crc32
    monkeypatch.setattr(archives.zlib, "crc32", lambda piece, value: seen.append(len(piece)) or crc32(piece, value))
    uploads = uploaded(folder, ("a.zip", packed_by(zipfile.ZIP_DEFLATED, bytes(30_000_000))), most_bytes=10**6)
    assert uploads.left_out == [("a.png", "not an image")] and sum(seen) < 10**6


def test_a_connection_that_is_cut_leaves_nothing(folder: Path) -> None:
    uploads = Uploads(folder, 1000)
    with pytest.raises(UmedError, match="lost before the whole file arrived"):
        uploads.take(io.BytesIO(b"\x89PNG"), 100, "a.png")
    assert list(folder.iterdir()) == [] and uploads.files == []


@pytest.mark.llava
def test_a_header_that_claims_a_huge_volume_is_refused_at_once(folder: Path) -> None:
    header = nibabel.Nifti2Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((50_000, 50_000, 50_000))
    header["vox_offset"], header["magic"] = 544, b"n+2\0\r\n\x1a\n"
    with pytest.raises(UmedError, match="damaged, truncated"):
        study_of(folder, ("huge.nii", header.binaryblock + bytes(100)))


def test_names_are_shortened_and_made_printable() -> None:
    assert (
        shown_name("C:\\scans\\Doe\\a.dcm") == "a.dcm" and shown_name("x/../y/") == "y" and shown_name("..//") == ".."
    )
    assert (
        shown_name("a\x1b[31m\n.png") == "a?[31m?.png" and len(shown_name("x" * 500)) == 80 and shown_name("") == "file"
    )


def test_old_dicom_without_a_mark_goes_by_its_ending(folder: Path, tmp_path: Path) -> None:
    marked = write_dicom_as(tmp_path / "a.dcm", np.arange(600, dtype=np.int16).reshape(20, 30), ExplicitVRLittleEndian)
    content = marked.read_bytes()
    assert ending_of(content[132:], "a.png") is None and ending_of(content[132:], "a.DCM") == ".dcm"


@pytest.mark.llava
def test_changed_bytes_never_do_more_than_leave_a_file_out(tmp_path: Path) -> None:
    """Files of every kind with bytes changed or cut at random are either shown or refused with a reason."""
    rng = random.Random(0)
    kinds = [
        write_dicom(tmp_path / "a.dcm", scene(), WindowCenter=1, WindowWidth=2),
        write_png(tmp_path / "a.png", scene()),
        write_volume(tmp_path / "a.nii"),
        write_volume(tmp_path / "a.nii.gz"),
    ]
    packed = zipped(*((file.name, file.read_bytes()) for file in kinds))
    sources = [*((file.name, file.read_bytes()) for file in kinds), ("a.zip", packed)]
    shown = refused = 0
    for number in range(200):
        name, content = sources[number % len(sources)]
        changed = bytearray(content)
        for _ in range(rng.choice((1, 3, 30))):
            changed[rng.randrange(min(len(changed), rng.choice((400, len(changed)))))] = rng.randrange(256)
        if rng.random() < 0.2:
            changed = changed[: rng.randrange(len(changed))]
        folder = tmp_path / f"case-{number}"
        folder.mkdir()
        try:
            study = study_of(folder, (name, bytes(changed)))
            for index, item in enumerate(study.items):
                plane = item.planes[-1]
                study.picture(View(index, plane.axis, plane.slices - 1, 0, (item.windows or ("file",))[0]))
            shown += 1
        except UmedError as error:
            refused += 1
            assert str(tmp_path) not in str(error) and os.sep not in str(error).replace("DICOM (several", "")
    assert shown > 40 and refused > 40
