"""Volumes and series become one image each, and the box stays on its lesion."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from support.drawn import HEIGHT, WIDTH, bright_box, scene, write_dicom, write_nifti, write_png, write_recipe
from support.series import LESIONS, SLICES, slices, write_series, write_volume

from umed_plugin.data.build import build_records
from umed_plugin.data.images import burned_in_annotation, load_image, read_stored, slice_count
from umed_plugin.data.images.nifti import read_nifti
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.volumes import montage_slices
from umed_plugin.errors import UmedError
from umed_plugin.grounding.geometry import Montage

CSV = "{reader: csv, files: a.csv, columns: {file: file, box: box, lesion: lesion, slice: slice}}"


def annotate(folder: Path, name: str, boxes: dict[int, tuple[int, int, int, int]] = LESIONS) -> None:
    rows = [f'{name},"{", ".join(map(str, box))}",nod,{k}' for k, box in boxes.items()]
    (folder / "a.csv").write_text("\n".join(["file,box,lesion,slice", *rows]) + "\n")


@pytest.mark.llava
@pytest.mark.parametrize("feet_first", [True, False])
def test_a_series_is_ordered_by_where_its_slices_lie(tmp_path: Path, feet_first: bool) -> None:
    folder = write_series(tmp_path / "s", feet_first=feet_first)
    assert slice_count(folder) == SLICES
    for k, values in enumerate(slices()):
        np.testing.assert_array_equal(read_stored(folder, slice=k).values, np.rint(values * 1000) * 2 - 1000)


@pytest.mark.llava
def test_a_series_without_positions_goes_by_its_numbers(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", feet_first=False, ImagePositionPatient=None)
    np.testing.assert_array_equal(read_stored(folder, slice=0).values[0, 0], -800)
    assert bright_box(load_image(folder, slice=SLICES - 1 - 7, window="full")[0]) == LESIONS[7]


@pytest.mark.llava
def test_a_slice_that_is_added_is_noticed(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s")
    assert slice_count(folder) == SLICES
    extra = {"SeriesInstanceUID": "1.2.3", "ImagePositionPatient": [0, 0, -99]}
    write_dicom(folder / "more", scene((50, 20, 60, 50)), **extra)
    assert slice_count(folder) == SLICES + 1
    assert bright_box(load_image(folder, slice=0, window="full")[0]) == (50, 20, 60, 50)


@pytest.mark.llava
def test_folders_that_are_no_series_are_refused(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s")
    with pytest.raises(UmedError, match="has 12 slices and none is chosen"):
        load_image(folder)
    write_dicom(folder / "twice", scene(), SeriesInstanceUID="1.2.3", ImagePositionPatient=[0, 0, -50])
    with pytest.raises(UmedError, match=r"1 positions have more than one image \(the first: -50\)"):
        load_image(folder, slice=0)
    write_dicom(folder / "twice", scene(), SeriesInstanceUID="9.9")
    with pytest.raises(UmedError, match=r"has 2 series: 1\.2\.3 \(12 images\), 9\.9 \(1 images\)"):
        load_image(folder, slice=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UmedError, match="has no DICOM images"):
        load_image(tmp_path / "empty", slice=0)


@pytest.mark.llava
@pytest.mark.parametrize("kind", ["volume", "series"])
@pytest.mark.parametrize("how", ["annotated", "largest_lesion", "montage"])
def test_boxes_go_with_their_slices(tmp_path: Path, kind: str, how: str) -> None:
    name = write_volume(tmp_path / "v.nii.gz").name if kind == "volume" else write_series(tmp_path / "s").name
    annotate(tmp_path, name)
    recipe = load_recipe(write_recipe(tmp_path, CSV, extra=f"image: {{window: full, slices: {how}, tiles: 5}}\n"))
    records = build_records(recipe, out_dir=tmp_path / "out")
    assert len(records) == (3 if how == "annotated" else 1)
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        image = np.asarray(Image.open(tmp_path / "out" / record["image"]))
        assert list(image.shape[1::-1]) == record["image_size"]
        boxes = [tuple(map(int, box)) for box in record["objects"]["bbox"]]
        bright = np.zeros(image.shape[:2], bool)
        for x1, y1, x2, y2 in boxes:
            bright[y1:y2, x1:x2] = True
        inside = image[:, :, 0] > 200
        # In a montage of `full` windows a slice without lesion has a white corner mark.
        marks = np.zeros_like(bright)
        if how == "montage":
            plan = Montage(WIDTH, HEIGHT, 5)
            for tile in range(5):
                x, y = plan.corner(tile)
                marks[y + HEIGHT - 4 : y + HEIGHT, x + WIDTH - 6 : x + WIDTH] = True
        np.testing.assert_array_equal(inside & ~marks, bright)
    if how == "largest_lesion":
        assert records[0]["provenance"]["slice"] == 7
    if how == "montage":
        assert set(LESIONS) < set(records[0]["provenance"]["slice"])
        assert len(records[0]["objects"]["bbox"]) == 3


@pytest.mark.llava
@pytest.mark.parametrize("how", ["largest_lesion", "montage"])
def test_a_montage_is_turned_tile_by_tile(tmp_path: Path, how: str) -> None:
    """Stored upside down and mirrored, with boxes of the stored slice."""
    volume = np.stack([values.T for values in slices()], axis=2)
    write_nifti(tmp_path / "v.nii.gz", volume, np.diag([0.7, 0.7, 3, 1]))
    annotate(tmp_path, "v.nii.gz")
    options = f"image: {{window: {{low: 0, high: 1000}}, box_frame: stored, slices: {how}, tiles: 4}}\n"
    (record,) = build_records(load_recipe(write_recipe(tmp_path, CSV, extra=options)), out_dir=tmp_path / "out")
    image = np.asarray(Image.open(tmp_path / "out" / record["image"]))[:, :, 0]
    bright = np.zeros(image.shape, bool)
    for x1, y1, x2, y2 in np.array(record["objects"]["bbox"], int):
        bright[y1:y2, x1:x2] = True
    np.testing.assert_array_equal(image > 200, bright)
    x1, y1, x2, y2 = LESIONS[7]
    assert [WIDTH - x2, HEIGHT - y2] in [[box[0] % WIDTH, box[1] % HEIGHT] for box in record["objects"]["bbox"]]


@pytest.mark.llava
def test_a_volume_without_lesion_shows_its_middle(tmp_path: Path) -> None:
    write_volume(tmp_path / "v.nii.gz")
    (tmp_path / "a.csv").write_text("file,box,lesion\nv.nii.gz,,\n")
    annotations = "{reader: csv, files: a.csv, columns: {file: file, box: box, lesion: lesion}}"
    extra = "image: {window: full, slices: largest_lesion}\n"
    (record,) = build_records(load_recipe(write_recipe(tmp_path, annotations, extra=extra)), out_dir=tmp_path / "out")
    assert record["answer_type"] == "negative"
    assert record["provenance"]["slice"] == SLICES // 2


@pytest.mark.llava
def test_pictures_stay_as_they_are(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", scene())
    (tmp_path / "a.csv").write_text('file,box,lesion\na.png,"11, 7, 42, 19",nod\n')
    annotations = "{reader: csv, files: a.csv, columns: {file: file, box: box, lesion: lesion}}"
    extra = "image: {slices: largest_lesion}\n"
    (record,) = build_records(load_recipe(write_recipe(tmp_path, annotations, extra=extra)), out_dir=tmp_path / "out")
    assert record["objects"]["bbox"] == [[11, 7, 42, 19]]


@pytest.mark.parametrize(
    ("count", "most", "wanted", "expected"),
    [
        (12, 4, [], (1, 4, 7, 10)),
        (3, 9, [], (0, 1, 2)),
        (12, 4, [7, 2], (2, 4, 7, 10)),
        (12, 2, [7, 2, 9], (2, 7)),
        (100, 3, [0, 1], (0, 1, 83)),
        (1, 4, [0], (0,)),
    ],
)
def test_tiles_are_spread_and_moved_onto_lesions(
    count: int, most: int, wanted: list[int], expected: tuple[int, ...]
) -> None:
    assert montage_slices(count, most, wanted) == expected


@pytest.mark.llava
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, None),
        ({5: "YES"}, "YES"),
        (dict.fromkeys(range(SLICES), "NO"), "NO"),
        (dict.fromkeys(range(5), "NO"), None),
    ],
    ids=["none says", "one says yes", "all say no", "some say no"],
)
def test_a_series_has_text_burnt_in_as_soon_as_one_file_says_so(
    flags: dict[int, str], said: str | None, tmp_path: Path
) -> None:
    folder = write_series(tmp_path / "s")
    for k, flag in flags.items():
        file = sorted(folder.glob("IM*"))[k]
        header = pydicom.dcmread(file)
        header.BurnedInAnnotation = flag
        header.save_as(file)
    assert burned_in_annotation(folder) == said


@pytest.mark.llava
def test_a_header_that_nibabel_repairs_is_named_with_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "odd.nii"
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 3), np.int16), np.eye(4)), file)
    content = bytearray(file.read_bytes())
    content[252:254] = struct.pack("<h", 0)  # no qform code, so nibabel looks at qfac
    content[76:80] = struct.pack("<f", 0.0)  # qfac
    file.write_bytes(bytes(content))
    with caplog.at_level(logging.DEBUG, "nibabel.global"):
        read_nifti(file, 0, 2, None)
        logging.getLogger("nibabel.global").info("of another file")
    *repairs, other = [record.getMessage() for record in caplog.records]
    assert repairs and all(message.startswith(f"{file}: ") for message in repairs)
    assert other == "of another file"
