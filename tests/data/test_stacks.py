"""A series folder is one stack: what is no slice is left out and said, what may be a lost slice is refused or said."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from support.drawn import WIDTH, scene, write_dicom, write_dicom_as, write_recipe
from support.series import SLICES, write_series

from umed_plugin.data.build import build_records
from umed_plugin.data.checking.check import check_recipe
from umed_plugin.data.checking.report import print_check
from umed_plugin.data.images import read_stored, show_image, slice_count
from umed_plugin.data.images.series import series_stack
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.llava  # images are read through MONAI, which needs torch

OWN = {"SeriesInstanceUID": "1.2.3"}
CORONAL = (1, 0, 0, 0, 0, -1)


def kinds(folder: Path) -> list[str]:
    return [f"{kind} ({detail})" for kind, detail in series_stack(folder).remarks]


def value_of(folder: Path, index: int) -> float:
    return float(read_stored(folder, slice=index).values[0, 0])


def numbered(folder: Path, positions: list[float], **tags: Any) -> Path:
    """Slice k holds the value 2 k - 1000 at its corner."""
    folder.mkdir()
    for k, z in enumerate(positions):
        own = {**OWN, "ImagePositionPatient": [0, 0, z], "InstanceNumber": k + 1}
        write_dicom(folder / f"{k}.dcm", np.full((9, 11), k / 1000), **{**own, **tags})
    return folder


def test_a_scout_in_the_folder_is_no_slice_and_said(tmp_path: Path) -> None:
    folder = numbered(tmp_path / "s", [0, 5, 10, 15])
    tags = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "ImagePositionPatient": [0, -200, 300], **OWN}
    write_dicom(folder / "a_scout.dcm", scene(), orientation=CORONAL, **tags)
    assert [value_of(folder, k) for k in range(4)] == [-1000, -998, -996, -994]
    assert slice_count(folder) == 4
    assert kinds(folder) == [
        "are of series folders from which scouts, reports or screenshots were left out (a_scout.dcm)"
    ]


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        (
            {"orientation": CORONAL, "ImagePositionPatient": [0, -200, 300]},
            r"2 orientations: 1\\0\\0\\0\\1\\0 in 4 \(0\.dcm\)",
        ),
        ({"PixelSpacing": [0.9, 0.9]}, "2 pixel spacings: .*odd"),
        ({"ImagePositionPatient": None}, "some images have an ImagePositionPatient and others have none"),
        ({"SeriesInstanceUID": "9.9"}, r"has 2 series: 1\.2\.3 \(4 images\), 9\.9 \(1 images\)"),
        ({"ImagePositionPatient": [0, 0, 10.004]}, "1 positions have more than one image"),
        ({"ImagePositionPatient": [0, 0, 7]}, None),
    ],
)
def test_another_image_in_the_folder_is_refused(tmp_path: Path, tags: dict[str, Any], said: str | None) -> None:
    folder = numbered(tmp_path / "s", [0, 5, 10, 15])
    orientation = tags.pop("orientation", (1, 0, 0, 0, 1, 0))
    own = {**OWN, "ImagePositionPatient": [0, 0, 20], "InstanceNumber": 99, **tags}
    write_dicom(folder / "odd.dcm", np.full((9, 11), 0.5), orientation=orientation, **own)
    if said is None:  # a slice between two others: distances of 5, 2, 3 and 5 mm
        assert "uneven distances" in kinds(folder)[0]
        return
    with pytest.raises(UmedError, match=said):
        read_stored(folder, slice=2)


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = numbered(tmp_path / "s", [0, 5, 10])
    write_dicom(folder / "odd.dcm", scene(), ImagePositionPatient=[0, 0, 15], **OWN)
    with pytest.raises(UmedError, match=r"2 image sizes: 11\\9 in 3 \(0\.dcm\); 97\\61 in 1 \(odd\.dcm\)"):
        read_stored(folder, slice=0)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 128 + b"DICM", b"\0" * 128 + b"DICM" + b"\1" * 60, b"<html>404</html>"]
)
@pytest.mark.parametrize("name", ["1.dcm", "IM0001", "slice.7"])
def test_a_file_that_may_be_a_broken_slice_is_refused(tmp_path: Path, content: bytes, name: str) -> None:
    folder = numbered(tmp_path / "s", [0, 5, 10])
    (folder / name).write_bytes(content)
    with pytest.raises(UmedError, match=rf"1 files cannot be read as DICOM, .*the first: {name}, {len(content)} bytes"):
        read_stored(folder, slice=1)


def test_other_files_and_objects_and_copies_are_left_out_and_said(tmp_path: Path) -> None:
    folder = numbered(tmp_path / "s", [0, 5, 10])
    for name in ("notes.txt", "DICOMDIR", ".DS_Store", "Thumbs.db", "preview.jpg"):
        (folder / name).write_bytes(b"something")
    shutil.copy(folder / "1.dcm", folder / "1 (1).dcm")
    report = pydicom.dcmread(folder / "0.dcm")
    for name in ("Rows", "Columns", "PixelData"):
        delattr(report, name)
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.67"
    report.SOPInstanceUID = "1.2.77"
    report.save_as(folder / "dose.dcm")
    shot = {**OWN, "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "ImagePositionPatient": None}
    write_dicom(folder / "shot.dcm", scene(), **shot)
    assert [value_of(folder, k) for k in range(3)] == [-1000, -998, -996]
    said = "\n".join(kinds(folder))
    for part in (
        "files of other kinds",
        "objects without an image",
        "second copies",
        "screenshots",
        "dose.dcm",
        "shot.dcm",
    ):
        assert part in said


def test_a_missing_slice_is_said(tmp_path: Path) -> None:
    even = numbered(tmp_path / "even", [0, 5, 10.02, 15, 20])
    assert kinds(even) == []
    (even / "1.dcm").unlink()
    (said,) = kinds(even)
    assert "uneven distances" in said
    assert "10.02 (1x), 4.98 (1x), 5 (1x) mm" in said
    assert "uneven after slice 0" in said
    by_number = numbered(tmp_path / "numbers", [0, 0, 0, 0], ImagePositionPatient=None)
    (by_number / "2.dcm").unlink()
    assert "1 (1x), 2 (1x), uneven after slice 1" in kinds(by_number)[0]


def test_a_tilted_gantry_keeps_its_order(tmp_path: Path) -> None:
    """Slices are shifted along y, so their positions are not along the normal; the distance along it is what counts."""
    folder = tmp_path / "s"
    folder.mkdir()
    tilted = (1, 0, 0, 0, float(np.cos(0.3)), float(np.sin(0.3)))
    for k in range(4):
        place = {"ImagePositionPatient": [0, -50, 100 - 5 * k], "InstanceNumber": k, **OWN}
        write_dicom(folder / f"{k}.dcm", np.full((9, 11), k / 1000), orientation=tilted, **place)
    assert [value_of(folder, k) for k in range(4)] == [-994, -996, -998, -1000]
    assert kinds(folder) == []


def test_multi_frame_files_are_no_slices_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    write_dicom(folder / "a.dcm", np.stack([scene()] * 3), **OWN)
    with pytest.raises(UmedError, match=r"a\.dcm: has 3 frames, but a file of a series folder is one slice"):
        read_stored(folder, slice=0)


def test_mosaics_and_several_stacks_in_one_file_are_said(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", scene(), ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])
    assert "Siemens mosaics" in show_image(path).remarks[0].kind
    groups = []
    for stack in ("1", "1", "2"):
        content = pydicom.Dataset()
        content.StackID = stack
        group = pydicom.Dataset()
        group.FrameContentSequence = pydicom.Sequence([content])
        groups.append(group)
    stored = np.zeros((3, 9, 11), np.uint16)
    tags = {"PerFrameFunctionalGroupsSequence": pydicom.Sequence(groups)}
    path = write_dicom_as(tmp_path / "b.dcm", stored, pydicom.uid.ExplicitVRLittleEndian, **tags)
    assert "several stacks" in show_image(path, slice=2).remarks[0].kind


def test_check_and_build_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    folder = write_series(tmp_path / "s")
    sorted(folder.glob("IM*"))[3].unlink()
    (tmp_path / "a.csv").write_text('file,box,lesion,slice\ns,"11, 7, 20, 12",nod,2\n')
    csv = "{reader: csv, files: a.csv, columns: {file: file, box: box, lesion: lesion, slice: slice}}"
    recipe = load_recipe(write_recipe(tmp_path, csv))
    check = check_recipe(recipe)
    assert check.ok
    console = Console(width=500, record=True, file=io.StringIO())
    print_check(check, console)
    text = console.export_text()
    build_records(recipe, out_dir=tmp_path / "out")
    assert re.search(r"images that are of series folders with uneven distances.*│ +1 │ +1 │", text)
    by_build = capsys.readouterr().err
    assert "1 of 1 images are of series folders with uneven distances" in by_build
    assert all("readme.txt" in said for said in (text, by_build))
    assert slice_count(folder) == SLICES - 1
    assert show_image(folder, slice=0).orientation.width == WIDTH


def test_a_link_that_leads_nowhere_is_a_slice_that_is_not_there(tmp_path: Path) -> None:
    folder = numbered(tmp_path / "s", [0, 5, 10, 15, 20, 25])
    (folder / "0.dcm").unlink()
    (folder / "0.dcm").symlink_to("../.git/annex/objects/XX")
    with pytest.raises(
        UmedError, match=r"s: 1 of its files are not there, so slices may be missing.*: 0\.dcm is a link"
    ) as e:
        value_of(folder, 2)
    assert "to ../.git/annex/objects/XX, which is not there. Fetch it: git annex get, or datalad get." in str(e.value)
    write_dicom(tmp_path / "fetched.dcm", np.full((9, 11), 0), **{**OWN, "ImagePositionPatient": [0, 0, 0]})
    (tmp_path / ".git" / "annex" / "objects").mkdir(parents=True)
    (tmp_path / "fetched.dcm").rename(tmp_path / ".git" / "annex" / "objects" / "XX")
    assert value_of(folder, 2) == -996
    (folder / "readme.txt").symlink_to("nowhere")
    assert value_of(folder, 2) == -996


def test_slices_in_a_sub_folder_are_missed_and_other_files_there_are_said(tmp_path: Path) -> None:
    folder = numbered(tmp_path / "s", [0, 5, 10, 15, 20, 25])
    (folder / "more").mkdir()
    write_dicom(folder / "more" / "scout.dcm", scene(), SeriesInstanceUID="1.2.4")
    (folder / "more" / "notes.txt").write_text("")
    assert value_of(folder, 2) == -996
    assert kinds(folder) == [
        "are of series folders from which DICOM files in sub folders were left out (more/scout.dcm)"
    ]
    (folder / "0.dcm").rename(folder / "more" / "0.dcm")
    with pytest.raises(
        UmedError, match=r"s: 1 DICOM files of the same series are in sub folders.*first: more/0\.dcm\. Move"
    ):
        value_of(folder, 2)
    (folder / "more" / "0.dcm").unlink()
    (folder / "more" / "0.dcm").symlink_to("XX")
    with pytest.raises(UmedError, match=r"slices may be missing\. The first: more/0\.dcm is a link to XX"):
        value_of(folder, 2)
