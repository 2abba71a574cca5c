"""Uploads to the chat page: recognized by content, shown as `umed_plugin.data.images` reads them, refused with a reason."""

from __future__ import annotations

import io
import os
import random
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian
from support.drawn import BOX, bright_box, scene, write_dicom, write_dicom_as, write_nifti, write_png, write_png16
from support.series import SLICES, write_series, write_volume

from umed_plugin.commands.serve import archives
from umed_plugin.commands.serve.studies import Study
from umed_plugin.commands.serve.uploads import Uploads, ending_of, shown_name
from umed_plugin.commands.serve.views import View
from umed_plugin.data.images import load_image
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.one_stack
PRESETS = ("abdomen", "bone", "brain", "liver", "lung", "mediastinum", "soft_tissue")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "case"
    made.mkdir()
    return made


def uploaded(folder: Path, *files: Path | tuple[str, bytes], most_bytes: int = 50_000_000) -> Uploads:
    uploads = Uploads(folder, most_bytes)
    for file in files:
        name, content = (file.name, file.read_bytes()) if isinstance(file, Path) else file
        uploads.take(io.BytesIO(content), len(content), name)
    return uploads


def study_of(folder: Path, *files: Any) -> Study:
    uploads = uploaded(folder, *files)
    return Study(folder, uploads.files, uploads.left_out)


def pixels(study: Study, **view: Any) -> np.ndarray:
    return np.asarray(study.picture(View(**view)))


def zipped(*entries: tuple[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return held.getvalue()


@pytest.mark.llava
def test_pictures_have_no_window(folder: Path, tmp_path: Path) -> None:
    file = write_png(tmp_path / "Scan of Ms. X.png", scene())
    study = study_of(folder, file)
    plane = {"axis": 2, "name": "", "slices": 1, "edges": None}
    assert study.described() == {
        "items": [{"label": "Scan of Ms. X.png", "planes": [plane], "volumes": 1, "windows": ()}],
        "left_out": [],
    }  # fmt: skip
    assert bright_box(pixels(study)) == BOX
    np.testing.assert_array_equal(pixels(study), load_image(file)[0])


@pytest.mark.llava
@pytest.mark.parametrize("kind", ["jpg", "tif", "bmp", "png16"])
def test_other_pictures(kind: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / f"a.{kind.replace('png16', 'png')}"
    write_png16(file, scene()) if kind == "png16" else Image.open(write_png(tmp_path / "b.png", scene())).save(file)
    study = study_of(folder, file)
    assert bright_box(pixels(study, window="full" if kind == "png16" else "file")) == BOX
    assert study.items[0].windows == (("full",) if kind == "png16" else ())


@pytest.mark.llava
def test_what_a_file_is_its_content_says_and_not_its_name(folder: Path, tmp_path: Path) -> None:
    dicom = write_dicom(tmp_path / "IM0001", scene()).read_bytes()
    picture = write_png(tmp_path / "a.png", scene()).read_bytes()
    study = study_of(folder, ("wrong.nii.gz", dicom), ("wrong.dcm", picture))
    assert [item.paths[0].suffix for item in study.items] == [".dcm", ".png"]
    assert [bright_box(pixels(study, item=item, window=w)) for item, w in ((0, "full"), (1, "file"))] == [BOX, BOX]


@pytest.mark.llava
def test_a_dicom_offers_its_own_window_and_the_presets(folder: Path, tmp_path: Path) -> None:
    file = write_dicom(tmp_path / "a.dcm", scene(), WindowCenter=0, WindowWidth=1000)
    study = study_of(folder, file)
    assert study.items[0].windows == ("file", "full", *PRESETS)
    for window in study.items[0].windows:
        np.testing.assert_array_equal(pixels(study, window=window), load_image(file, window=window)[0])
    mr = write_dicom(tmp_path / "b.dcm", scene(), Modality="MR")
    assert study_of(folder, mr).items[0].windows == ("full",), "Hounsfield presets do not apply to MR"


@pytest.mark.llava
def test_a_ct_without_a_window_opens_with_one_for_tissue(folder: Path, tmp_path: Path) -> None:
    item = study_of(folder, write_dicom(tmp_path / "a.dcm", scene())).items[0]
    assert item.windows[:2] == ("soft_tissue", "full") and set(item.windows) == {"full", *PRESETS}
    unnamed = write_dicom(tmp_path / "b.dcm", scene(), Modality="")
    assert study_of(folder, unnamed).items[0].windows == ("full",), "nothing says that these are Hounsfield units"
    unit = write_dicom(tmp_path / "c.dcm", scene(), Modality="", RescaleType="HU")
    assert study_of(folder, unit).items[0].windows[0] == "soft_tissue"


@pytest.mark.llava
def test_the_sides_are_known_where_the_file_says_how_it_lies(folder: Path, tmp_path: Path) -> None:
    coronal = [1, 0, 0, 0, 0, -1]
    files = [
        write_dicom(tmp_path / "axial.dcm", scene()),
        write_dicom(tmp_path / "coronal.dcm", scene(), orientation=coronal),
        write_dicom(tmp_path / "turned.dcm", scene(), orientation=[-1, 0, 0, 0, -1, 0]),
        write_png(tmp_path / "a.png", scene()),
        write_volume(tmp_path / "v.nii"),
    ]
    lone = write_dicom(tmp_path / "none.dcm", scene())
    header = pydicom.dcmread(lone)
    del header.ImageOrientationPatient
    header.save_as(lone)
    study = study_of(folder, *files, lone)
    edges = {item.label: [plane.edges for plane in item.planes] for item in study.items}
    axial, frontal, lateral = ("R", "L", "A", "P"), ("R", "L", "S", "I"), ("A", "P", "S", "I")
    assert edges["axial.dcm"] == edges["turned.dcm"] == [axial] and edges["coronal.dcm"] == [frontal]
    assert edges["a.png"] == edges["none.dcm"] == [None]
    assert [plane.name for plane in study.items[4].planes] == ["axial", "sagittal", "coronal"]
    assert edges["v.nii"] == [axial, lateral, frontal]


@pytest.mark.llava
def test_people_of_one_upload_are_told_apart_and_not_named(folder: Path, tmp_path: Path) -> None:
    """Also where two people's files share a series UID, as some tools that remove names leave them."""
    files = []
    for person in ("secret-1", "secret-2"):
        series = write_series(tmp_path / person, PatientID=person)
        files += [(f"{person}-{file.name}.dcm", file.read_bytes()) for file in series.glob("IM*")]
    study = study_of(folder, *files, write_png(tmp_path / "c.png", scene()))
    assert [item.label for item in study.items] == [
        "person 1: series 1 (12 slices)",
        "person 2: series 2 (12 slices)",
        "person unknown: c.png",
    ]
    assert study.left_out[-1] == ("2 people", "this upload holds images of each of them. Look at the labels")
    assert "secret" not in str(study.described())
    alone = study_of(folder, files[0])
    assert not alone.left_out and "person" not in alone.items[0].label


@pytest.mark.llava
@pytest.mark.parametrize("packed", [False, True])
def test_a_series_of_files_or_in_a_zip_is_ordered_by_place(packed: bool, folder: Path, tmp_path: Path) -> None:
    series = write_series(tmp_path / "s", feet_first=False)
    files = sorted(series.iterdir(), key=lambda path: random.Random(path.name).random())
    if packed:
        archive = zipped(*((f"CT/Doe^Jane/{file.name}", file.read_bytes()) for file in files))
        study = study_of(folder, ("export.zip", archive))
        assert study.left_out == [("readme.txt", "not an image")]
    else:
        study = study_of(folder, *(file for file in files if file.suffix != ".txt"))
    (item,) = study.items
    assert item.label == f"series 1 ({SLICES} slices)" and item.planes[0].slices == SLICES
    for index in (0, 3, SLICES - 1):
        expected = load_image(series, slice=index, window="full")[0]
        np.testing.assert_array_equal(pixels(study, slice=index, window="full"), expected)


@pytest.mark.llava
def test_two_series_and_a_picture_are_three_items(folder: Path, tmp_path: Path) -> None:
    first, second = write_series(tmp_path / "a"), write_series(tmp_path / "b", SeriesInstanceUID="1.2.4")
    files = [file for pair in zip(sorted(first.glob("IM*")), sorted(second.glob("IM*"))) for file in pair]
    study = study_of(folder, *files, write_png(tmp_path / "c.png", scene()))
    assert [item.label for item in study.items] == ["series 1 (12 slices)", "series 2 (12 slices)", "c.png"]


@pytest.mark.llava
def test_slices_without_places_are_shown_by_file_name(folder: Path, tmp_path: Path) -> None:
    """A time series has several images at each slice position."""
    for name in ("b", "a", "c"):
        write_dicom(tmp_path / name, scene((ord(name) - 90, 7, 42, 19)), SeriesInstanceUID="1.2")
    study = study_of(folder, *(tmp_path / name for name in "bca"))
    (item,) = study.items
    assert "sorted by file name" in item.label and item.planes[0].slices == 3
    assert [bright_box(pixels(study, slice=k, window="full"))[0] for k in range(3)] == [7, 8, 9]


@pytest.mark.llava
def test_a_series_with_its_scout_is_the_stack_that_recipes_read_and_the_page_says_so(
    folder: Path, tmp_path: Path
) -> None:
    series = write_series(tmp_path / "s")
    (series / "readme.txt").unlink()
    tags = {"SeriesInstanceUID": "1.2.3", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    write_dicom(series / "AAA", scene(), **tags, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    study = study_of(folder, *sorted(series.iterdir()))
    (item,) = study.items
    assert item.label == f"series 1 ({SLICES} slices)"
    assert study.left_out == [
        (f"series 1 ({SLICES} slices)", "no slices of it (a scout, a report or a second copy): AAA")
    ]
    for index in (0, 2, SLICES - 1):
        expected = load_image(series, slice=index, window="full")[0]
        np.testing.assert_array_equal(pixels(study, slice=index, window="full"), expected)


@pytest.mark.llava
@pytest.mark.parametrize("broken", ["missing slice", "turned slice", "same place"])
def test_a_stack_that_recipes_remark_on_or_refuse_is_not_shown_in_silence(
    broken: str, folder: Path, tmp_path: Path
) -> None:
    series = write_series(tmp_path / "s")
    (series / "readme.txt").unlink()
    if broken == "missing slice":
        (series / "IM007").unlink()
    else:
        where = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]} if broken == "turned slice" else {}
        write_dicom(series / "AAA", scene(), SeriesInstanceUID="1.2.3", ImagePositionPatient=[0, 0, -50], **where)
    study = study_of(folder, *sorted(series.iterdir()))
    ((label, why),) = study.left_out
    assert label == study.items[0].label
    assert ("sorted by file name" in label) == (broken != "missing slice")
    assert "a slice may be missing" in why if broken == "missing slice" else "not one stack of slices" in why
    assert study.described()["left_out"] == [f"{label}: {why}"]
    assert study.items[0].planes[0].slices == SLICES + (1 if broken != "missing slice" else -1)


@pytest.mark.llava
def test_frames_of_one_file_are_slices(folder: Path, tmp_path: Path) -> None:
    frames = np.stack([scene(), scene((50, 20, 60, 26))])
    study = study_of(folder, write_dicom(tmp_path / "a.dcm", frames, SeriesInstanceUID="1.2"))
    assert study.items[0].planes[0].slices == 2
    assert bright_box(pixels(study, slice=1, window="full")) == (50, 20, 60, 26)


@pytest.mark.llava
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_volume_can_be_cut_in_three_planes(ending: str, folder: Path, tmp_path: Path) -> None:
    file = write_volume(tmp_path / f"v{ending}")
    study = study_of(folder, file)
    (item,) = study.items
    assert [(plane.axis, plane.name) for plane in item.planes] == [(2, "axial"), (0, "sagittal"), (1, "coronal")]
    assert item.windows == ("full",), "NIfTI does not say that its values are Hounsfield units"
    for plane in item.planes:
        expected = load_image(file, slice=plane.slices // 2, slice_axis=plane.axis, window="full")[0]
        np.testing.assert_array_equal(pixels(study, axis=plane.axis, slice=plane.slices // 2, window="full"), expected)


@pytest.mark.llava
def test_volumes_over_time(folder: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((9, 8, 7, 3))
    file = write_nifti(tmp_path / "t.nii.gz", values, np.eye(4))
    study = study_of(folder, file)
    assert study.items[0].volumes == 3
    expected = load_image(file, slice=2, volume=1, window="full")[0]
    np.testing.assert_array_equal(pixels(study, slice=2, volume=1, window="full"), expected)


@pytest.mark.llava
@pytest.mark.parametrize(
    "view", [{"slice": 12}, {"slice": -1}, {"axis": 0}, {"volume": 1}, {"item": 1}, {"window": "lug"}]
)
def test_views_that_do_not_exist_are_refused(view: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    study = study_of(folder, *write_series(tmp_path / "s").glob("IM*"))
    with pytest.raises(UmedError, match="no such"):
        study.picture(View(**{"window": "full", **view}))


# Bad and hostile files.


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
