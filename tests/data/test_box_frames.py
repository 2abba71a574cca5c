"""EXIF, turned slices and pixels that are not square: the box is on the lesion in what LLaVA sees, or the frame is refused."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.drawn import (
    BOX,
    HEIGHT,
    IDENTITY,
    WIDTH,
    bright_box,
    scene,
    write_dicom,
    write_nifti,
    write_png,
    write_png16,
    write_recipe,
)

from umed_plugin.data.build import build_records
from umed_plugin.data.checking.check import check_recipe
from umed_plugin.data.checking.report import print_check
from umed_plugin.data.images import load_image, open_image, show_image
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.records import record_geometry, true_boxes
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.grounding.geometry import Orientation, exif_orientation

FORMATS = {"jpg": {"quality": 95}, "png": {}, "webp": {"lossless": True}, "tif": {}}
PRONE = (-1, 0, 0, 0, -1, 0)


def write_exif(path: Path, stored: np.ndarray, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.rint(stored * 255).astype(np.uint8)).convert("RGB").save(
        path, exif=exif, **FORMATS[path.suffix[1:]]
    )
    return path


def recipe_of(folder: Path, name: str, box: Any, size: Any = None, slice: Any = None, **image: Any) -> Any:
    """A COCO file with one box of one image, and a recipe with these options of ``image``."""
    x1, y1, x2, y2 = box
    if slice is None:
        width, height = size
        images = [{"id": 1, "file_name": name, "width": width, "height": height}]
        boxes = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}]
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "nod"}]}
        (folder / "a.json").write_text(json.dumps(content))
        reader = "{reader: coco, files: a.json}"
    else:
        (folder / "a.csv").write_text(f'file,box,lesion,slice\n{name},"{x1}, {y1}, {x2}, {y2}",nod,{slice}\n')
        reader = "{reader: csv, files: a.csv, columns: {file: file, box: box, lesion: lesion, slice: slice}}"
    return load_recipe(write_recipe(folder, reader, extra=f"image: {json.dumps(image)}\n"))


def pixels_of(record: Any, out: Path) -> np.ndarray:
    """What LLaVA's own reader shows."""
    with Image.open(out / record["image"]) as image:
        return np.asarray(image.convert("RGB"))


def said_by_check(recipe: Any) -> str:
    from rich.console import Console

    console = Console(width=500, record=True, file=io.StringIO())
    print_check(check_recipe(recipe), console)
    return console.export_text()


@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientations_are_pils(value: int) -> None:
    stored = np.rint(scene() * 255).astype(np.uint8)
    image = Image.fromarray(stored)
    image.getexif()[0x0112] = value
    shown = np.asarray(ImageOps.exif_transpose(image))
    turned = exif_orientation(value, WIDTH, HEIGHT)
    np.testing.assert_array_equal(turned.apply_array(stored), shown)
    assert turned.apply_boxes([BOX]) == [bright_box(shown)]
    assert turned.undo_boxes([bright_box(shown)]) == [BOX]


@pytest.mark.llava
@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("value", range(1, 9))
def test_one_frame_for_reader_records_and_llava(tmp_path: Path, ending: str, value: int) -> None:
    """Training, evaluation and serve show the pixels that LLaVA's own reader shows, and boxes are of these."""
    path = write_exif(tmp_path / f"a.{ending}", scene(), value)
    with Image.open(path) as image:
        seen = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(load_image(path)[0], seen)
    opened = open_image(path)
    np.testing.assert_array_equal(np.asarray(opened), seen)
    # Libraries such as datasets would turn a picture that still carries the tag.
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(opened)), seen)
    box = bright_box(seen)
    (record,) = build_records(recipe_of(tmp_path, path.name, box, opened.size), out_dir=tmp_path / "out")
    assert true_boxes(record) == [box]
    assert bright_box(pixels_of(record, tmp_path / "out")) == box


@pytest.mark.llava
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("value", range(2, 9))
def test_boxes_of_the_picture_as_shown_elsewhere(tmp_path: Path, ending: str, value: int) -> None:
    path = write_exif(tmp_path / f"a.{ending}", scene(), value)
    turned = exif_orientation(value, WIDTH, HEIGHT)
    (drawn,) = turned.apply_boxes([BOX])
    recipe = recipe_of(tmp_path, path.name, drawn, turned.size, box_frame="exif")
    (record,) = build_records(recipe, out_dir=tmp_path / "out")
    assert true_boxes(record) == [BOX]
    assert bright_box(pixels_of(record, tmp_path / "out")) == BOX
    assert re.search(r"images that carry an EXIF orientation.*│ +1 │ +1 │", said_by_check(recipe))
    plain = recipe_of(tmp_path, path.name, drawn, turned.size, other_size="scale")
    if value < 5:  # the size does not show it, so it is said
        said = said_by_check(plain)
        assert re.search(
            rf"as in stored pixels \(image.box_frame: stored\) +│ +1 │ +1 │ a.{ending}: orientation {value} ", said
        )
        return
    for other_size in ("stop", "scale", "stretch"):
        plain = recipe_of(tmp_path, path.name, drawn, turned.size, other_size=other_size)
        with pytest.raises(UmedError, match=rf"EXIF orientation is {value}.*image: {{box_frame: exif}}"):
            build_records(plain, out_dir=tmp_path / "out")


@pytest.mark.llava
def test_a_turned_tiff_whose_boxes_are_unturned_is_refused(tmp_path: Path) -> None:
    write_exif(tmp_path / "a.tif", scene(), 6)
    with pytest.raises(UmedError, match="TIFF with an orientation"):
        build_records(
            recipe_of(tmp_path, "a.tif", BOX, (WIDTH, HEIGHT), other_size="stretch"), out_dir=tmp_path / "out"
        )
    recipe = recipe_of(tmp_path, "a.tif", BOX, (HEIGHT, WIDTH))
    assert "are TIFF files with an orientation" in said_by_check(recipe)


@pytest.mark.llava
def test_an_exif_frame_without_exif_is_said(tmp_path: Path) -> None:
    write_exif(tmp_path / "a.png", scene(), 1)
    said = said_by_check(recipe_of(tmp_path, "a.png", BOX, (WIDTH, HEIGHT), box_frame="exif"))
    assert "image.box_frame of drawn has no effect: none of its 1 images are pictures with an EXIF orientation" in said


@pytest.mark.llava
@pytest.mark.parametrize("size", [(WIDTH * 2, HEIGHT * 2), (WIDTH // 2, HEIGHT // 2), (WIDTH * 2, HEIGHT)])
def test_scaling_needs_the_same_ratio_of_the_sides(tmp_path: Path, size: tuple[int, int]) -> None:
    write_exif(tmp_path / "a.png", scene(), 1)
    x, y = size[0] / WIDTH, size[1] / HEIGHT
    box = (BOX[0] * x, BOX[1] * y, BOX[2] * x, BOX[3] * y)
    if size == (WIDTH * 2, HEIGHT):
        with pytest.raises(UmedError, match="ratio of the sides differs.*other_size: stretch"):
            build_records(recipe_of(tmp_path, "a.png", box, size, other_size="scale"), out_dir=tmp_path / "out")
    how = "stretch" if size == (WIDTH * 2, HEIGHT) else "scale"
    (record,) = build_records(recipe_of(tmp_path, "a.png", box, size, other_size=how), out_dir=tmp_path / "out")
    assert true_boxes(record) == [BOX]


@pytest.mark.llava
def test_a_prone_slice_takes_its_boxes_along(tmp_path: Path) -> None:
    """Coordinates beside DICOM files are of stored pixels, and a recipe that says nothing means these."""
    for name, orientation in (("supine.dcm", IDENTITY), ("prone.dcm", PRONE)):
        write_dicom(tmp_path / name, scene(), orientation=orientation)
        recipe = recipe_of(tmp_path, name, BOX, (WIDTH, HEIGHT), window="full")
        (record,) = build_records(recipe, out_dir=tmp_path / "out")
        assert [bright_box(pixels_of(record, tmp_path / "out"))] == true_boxes(record)
        is_turned = re.search(r"images that were turned.*│ +1 │ +1 │", said_by_check(recipe)) is not None
        assert is_turned == (name == "prone.dcm")
    assert true_boxes(record) == [(WIDTH - BOX[2], HEIGHT - BOX[3], WIDTH - BOX[0], HEIGHT - BOX[1])]
    recipe = recipe_of(
        tmp_path, "prone.dcm", true_boxes(record)[0], (WIDTH, HEIGHT), window="full", box_frame="displayed"
    )
    assert true_boxes(build_records(recipe, out_dir=tmp_path / "out")[0]) == true_boxes(record)
    assert "taken as in displayed pixels (image.box_frame: displayed)" in said_by_check(recipe)


def mapped(box: Any, x: float, y: float) -> tuple[float, ...]:
    return (box[0] * x, box[1] * y, box[2] * x, box[3] * y)


@pytest.mark.llava
@pytest.mark.parametrize(
    ("tags", "factor"),
    [
        ({"PixelSpacing": [1.5, 0.5]}, (1, 3)),
        ({"PixelSpacing": [0.5, 1]}, (2, 1)),
        ({"PixelSpacing": None, "ImagerPixelSpacing": [0.2, 0.1]}, (1, 2)),
        ({"PixelSpacing": None, "PixelAspectRatio": [1, 2]}, (2, 1)),
        ({"PixelSpacing": [0.7, 0.7], "PixelAspectRatio": [1, 2]}, (1, 1)),
        ({"PixelSpacing": [0.7, 0.70001]}, (1, 1)),
        ({"PixelSpacing": None}, (1, 1)),
    ],
)
@pytest.mark.parametrize("orientation", [IDENTITY, PRONE, (0, 1, 0, 1, 0, 0)])
@pytest.mark.parametrize("frame", ["stored", "displayed"])
def test_pixels_that_are_not_square_are_resampled_with_their_boxes(
    tmp_path: Path, tags: dict[str, Any], factor: tuple[int, int], orientation: Any, frame: str
) -> None:
    write_dicom(tmp_path / "a.dcm", scene(), orientation=orientation, **tags)
    turned = load_image(tmp_path / "a.dcm", pixels="as_stored")[1]
    box = BOX if frame == "stored" else turned.apply_boxes([BOX])[0]
    size = (WIDTH, HEIGHT) if frame == "stored" else turned.size
    recipe = recipe_of(tmp_path, "a.dcm", box, size, window="full", box_frame=frame)
    (record,) = build_records(recipe, out_dir=tmp_path / "out")
    x, y = factor[::-1] if turned.transpose else factor
    assert record["image_size"] == [turned.size[0] * x, turned.size[1] * y]
    seen = pixels_of(record, tmp_path / "out")
    assert list(seen.shape[1::-1]) == record["image_size"]
    np.testing.assert_allclose(true_boxes(record)[0], mapped(turned.apply_boxes([BOX])[0], x, y), atol=1e-3)
    np.testing.assert_allclose(true_boxes(record)[0], bright_box(seen, 127), atol=1)
    assert ("were resampled together with their boxes" in said_by_check(recipe)) == (factor != (1, 1))
    # The square that the model sees follows from the record alone.
    assert record_geometry(record).width == seen.shape[1]
    as_stored = recipe_of(tmp_path, "a.dcm", box, size, window="full", box_frame=frame, pixels="as_stored")
    assert build_records(as_stored, out_dir=tmp_path / "o2")[0]["image_size"] == list(turned.size)


@pytest.mark.llava
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_thick_slices_seen_from_the_side(tmp_path: Path, axis: int) -> None:
    """1 x 1 x 10 mm: 20 slices of 60 x 50 are 60 x 50 x 200 mm."""
    volume = np.full((60, 50, 20), 0.1)
    volume[10:30, 20:40, 5:10] = 1.0
    write_nifti(tmp_path / "v.nii", volume, np.diag([-1, -1, 10, 1]))
    box = {0: (20, 5, 40, 10), 1: (10, 5, 30, 10), 2: (10, 20, 30, 40)}[axis]
    recipe = recipe_of(tmp_path, "v.nii", box, slice=(25, 25, 7)[axis], slice_axis=axis, window="full")
    (record,) = build_records(recipe, out_dir=tmp_path / "out")
    assert record["image_size"] == {0: [50, 200], 1: [60, 200], 2: [60, 50]}[axis]
    seen = pixels_of(record, tmp_path / "out")
    np.testing.assert_allclose(true_boxes(record)[0], bright_box(seen, 127), atol=1)
    flipped = {0: (20, 100, 40, 150), 1: (10, 100, 30, 150), 2: (10, 20, 30, 40)}[axis]
    assert true_boxes(record)[0] == flipped


@pytest.mark.llava
def test_records_from_before_resampling_keep_their_pixels(tmp_path: Path) -> None:
    """Their boxes are of the slice as it was shown then."""
    path = write_dicom(tmp_path / "a.dcm", scene(), PixelSpacing=[1, 0.5])
    old = {"window": "full", "offset": 0, "orientation": "canonical", "slice": None, "slice_axis": 2, "volume": None}
    assert open_image(path, old).size == (WIDTH, HEIGHT)
    assert open_image(path, {**old, "pixels": "square"}).size == (WIDTH, HEIGHT * 2)
    assert open_image(path).size == (WIDTH, HEIGHT * 2)


@pytest.mark.llava
def test_absurd_spacings_are_refused_and_can_be_overruled(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", scene(), PixelSpacing=[0.001, 1])
    with pytest.raises(UmedError, match=r"a pixel is 1 wide and 0\.001 high.*image\.pixels: as_stored"):
        load_image(path)
    assert load_image(path, pixels="as_stored")[1] == Orientation(WIDTH, HEIGHT)
    with pytest.raises(UsageError, match="Did you mean 'as_stored'"):
        load_image(path, pixels="asstored")


@pytest.mark.llava
def test_a_resolution_that_llava_ignores_is_said(tmp_path: Path) -> None:
    grey = Image.fromarray(np.rint(scene() * 255).astype(np.uint8))
    for ending, expected in itertools.product(("png", "tif", "jpg"), (True, False)):
        grey.save(tmp_path / f"a.{ending}", dpi=(300, 150) if expected else (300, 300))
        assert any("not square" in kind for kind, _ in show_image(tmp_path / f"a.{ending}").remarks) == expected


@pytest.mark.llava
@pytest.mark.parametrize(
    ("name", "options", "unused"),
    [
        ("a.png", {"window": "lung"}, "window"),
        ("a.png", {"offset": 5}, "offset"),
        ("a.png", {"slice_axis": 0}, "slice_axis"),
        ("a.png", {"volume": 1}, "volume"),
        ("a.png", {"orientation": "as_stored"}, "orientation"),
        ("a.png", {"pixels": "as_stored"}, "pixels"),
        ("a.png", {"slices": "montage"}, "slices"),
        ("a.png", {"box_frame": "displayed"}, "box_frame"),
        ("pages.tif", {"slices": "largest_lesion"}, None),
        ("pages.tif", {"slices": "montage", "tiles": 2}, None),
        ("pages.tif", {"slices": "largest_lesion", "tiles": 2}, "tiles"),
        ("turned.jpg", {"box_frame": "exif"}, None),
        ("c.dcm", {"slice_axis": 0}, "slice_axis"),
        ("c.dcm", {"offset": 5}, "offset"),
        ("c.dcm", {"volume": 1}, "volume"),
        ("c.dcm", {"window": "lung", "orientation": "as_stored"}, None),
        ("b.png", {"window": "full", "offset": 5}, None),
    ],
)
def test_options_that_change_nothing_are_said(
    tmp_path: Path, name: str, options: dict[str, Any], unused: str | None
) -> None:
    write_dicom(tmp_path / "c.dcm", scene())
    write_png16(tmp_path / "b.png", scene())
    write_exif(tmp_path / "a.png", scene(), 1)
    write_exif(tmp_path / "turned.jpg", scene(), 3)
    page = write_png(tmp_path / "page.png", scene())
    Image.open(page).save(tmp_path / "pages.tif", save_all=True, append_images=[Image.open(page)] * 2)
    index = 1 if name == "pages.tif" else None
    said = said_by_check(recipe_of(tmp_path, name, BOX, (WIDTH, HEIGHT), slice=index, **options))
    assert ("has no effect" in said) == (unused is not None)
    if unused:
        lines = said.split("Plausibility")[0]
        assert len(re.findall(rf"image\.{unused}(?::| of drawn) has no effect", lines)) == 1, "told once"
