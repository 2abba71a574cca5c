"""Uploads to the chat page: recognized by content, and shown as `umed_plugin.data.images` reads them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from support.drawn import BOX, bright_box, scene, write_dicom, write_nifti, write_png, write_png16
from support.series import SLICES, write_series, write_volume
from support.serving_uploads import pixels, study_of, zipped

from umed_plugin.commands.serve.views import View
from umed_plugin.data.images import load_image
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.one_stack
PRESETS = ("abdomen", "bone", "brain", "liver", "lung", "mediastinum", "soft_tissue")


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
