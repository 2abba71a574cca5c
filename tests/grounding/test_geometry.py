"""The geometry against LLaVA's own preprocessing, and against itself."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from umed_plugin.errors import UsageError
from umed_plugin.grounding.geometry import ImageGeometry, Orientation
from umed_plugin.grounding.processor import missing_size, processor_fault

SIZES = [(97, 61), (61, 97), (512, 512), (400, 301), (301, 400), (1000, 337), (640, 200), (45, 44)]


def seen_by_llava(width: int, height: int, box: tuple[int, int, int, int], mode: str, size: int) -> np.ndarray:
    """``[size, size]`` share of red, after LLaVA's real expand2square and the real CLIPImageProcessor; the box is red."""
    from llava.mm_utils import process_images
    from transformers import CLIPImageProcessor

    image = Image.new("RGB", (width, height))
    image.paste((255, 0, 0), box)
    processor = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_normalize=False
    )
    config = SimpleNamespace(image_aspect_ratio="pad" if mode == "pad" else None)
    pixels = process_images([image], processor, config)[0].numpy()
    # Padding has the mean colour, in which red and green are nearly equal.
    return pixels[0] - pixels[1]


@pytest.mark.parametrize("mode", ["pad", "square"])
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("size", [336, 64])
def test_boxes_are_where_llava_puts_them(width: int, height: int, mode: str, size: int) -> None:
    box = (math.floor(width * 0.4), math.floor(height * 0.25), math.floor(width * 0.62), math.floor(height * 0.45))
    geometry = ImageGeometry(width, height, mode, size)
    red = seen_by_llava(width, height, box, mode, size)
    rows, columns = np.nonzero(red > 0.5)
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    expected = np.array(geometry.to_square([box])[0]) * size
    np.testing.assert_allclose(found, expected, atol=1.0)


@pytest.mark.parametrize(("width", "height", "box"), [(640, 200, (0, 20, 230, 90)), (200, 640, (30, 500, 180, 640))])
def test_the_centre_crop_cuts_what_the_geometry_says(width: int, height: int, box: tuple[int, int, int, int]) -> None:
    geometry = ImageGeometry(width, height, "square")
    red = seen_by_llava(width, height, box, "square", 336)
    scale = 336 / min(width, height)
    whole = (box[2] - box[0]) * (box[3] - box[1]) * scale**2
    assert geometry.visible_fraction(box) == pytest.approx((red > 0.5).sum() / whole, abs=0.01)
    assert ImageGeometry(width, height, "pad").visible_fraction(box) == 1.0


def test_a_lesion_that_is_cut_off_comes_back_without_area() -> None:
    geometry = ImageGeometry(640, 200, "square")
    assert geometry.visible_fraction((0, 10, 100, 90)) == 0.0
    (box,) = geometry.to_square([(0, 10, 100, 90)])
    assert box[2] <= box[0]
    assert geometry.patch_cover([(0, 10, 100, 90)]).sum() == 0


@st.composite
def image_and_box(draw: st.DrawFn) -> tuple[int, int, tuple[float, float, float, float]]:
    width, height = draw(st.integers(10, 2000)), draw(st.integers(10, 2000))
    x = sorted(draw(st.lists(st.floats(0, width), min_size=2, max_size=2)))
    y = sorted(draw(st.lists(st.floats(0, height), min_size=2, max_size=2)))
    return width, height, (x[0], y[0], x[1] + 1e-3, y[1] + 1e-3)


@given(image_and_box())
def test_round_trip_in_pad_mode(case: tuple[int, int, tuple[float, ...]]) -> None:
    width, height, box = case
    box = (box[0], box[1], min(box[2], width), min(box[3], height))
    geometry = ImageGeometry(width, height, "pad")
    if box[2] <= box[0] or box[3] <= box[1]:
        return
    assert geometry.from_square(geometry.to_square([box]))[0] == pytest.approx(box, abs=1e-6)


@given(image_and_box())
def test_round_trip_in_square_mode_gives_the_visible_part(case: tuple[int, int, tuple[float, ...]]) -> None:
    width, height, box = case
    geometry = ImageGeometry(width, height, "square")
    share = geometry.visible_fraction(box)
    (back,) = geometry.from_square(geometry.to_square([box]))
    area = (box[2] - box[0]) * (box[3] - box[1])
    assert (back[2] - back[0]) * (back[3] - back[1]) / area == pytest.approx(share, abs=1e-3)
    if 0.01 < share < 1:
        assert back[0] >= box[0] - 1e-6
        assert back[3] <= box[3] + 1e-6


def test_a_box_outside_0_to_1_overlaps_nothing_in_pixels() -> None:
    geometry = ImageGeometry(300, 200)
    assert geometry.from_square([(0.2, 0.2, 1.01, 0.5), (0.2, 0.2, 0.4, 0.5)])[0] == (0, 0, 0, 0)
    assert geometry.from_square([(0.2, 0.2, 0.4, 0.5)])[0] == pytest.approx((60, 10, 120, 100))


@given(st.lists(st.tuples(*[st.integers(0, 56)] * 4), max_size=4))
def test_patch_cover_is_what_a_raster_counts(boxes: list[tuple[int, int, int, int]]) -> None:
    geometry = ImageGeometry(56, 56, "pad", image_size=56, patch_size=14)
    ordered = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in boxes]
    raster = np.zeros((56, 56))
    for x1, y1, x2, y2 in ordered:
        raster[y1:y2, x1:x2] = 1
    expected = raster.reshape(4, 14, 4, 14).mean(axis=(1, 3)).ravel()
    np.testing.assert_allclose(geometry.patch_cover(ordered), expected, atol=1e-9)


def test_patch_cover_follows_the_padding_and_goes_row_by_row() -> None:
    """400 x 200 is padded by 100 above: the image's upper left quarter fills patches of the second row."""
    geometry = ImageGeometry(400, 200, "pad", image_size=64, patch_size=16)
    cover = geometry.patch_cover([(0, 0, 200, 100)]).reshape(4, 4)
    expected = np.zeros((4, 4))
    expected[1, :2] = 1
    np.testing.assert_allclose(cover, expected, atol=1e-9)


def test_an_edge_one_rounding_step_before_the_squares_is_covered() -> None:
    """As of a box that was cut at the square, written in pixels and read again."""
    end = math.nextafter(336.0, 0.0)
    cover = ImageGeometry(336, 336).patch_cover([(14.0, 14.0, end, end)]).reshape(24, 24)
    assert np.allclose(cover[1:, 1:], 1) and not cover[0].any() and not cover[:, 0].any()


def test_a_remainder_that_fills_no_patch_is_not_covered() -> None:
    geometry = ImageGeometry(100, 100, "pad", image_size=100, patch_size=14)
    cover = geometry.patch_cover([(0, 0, 100, 100)])
    assert cover.shape == (49,)
    np.testing.assert_allclose(cover, 1.0)


def test_unknown_mode() -> None:
    with pytest.raises(UsageError, match="Did you mean 'square'"):
        ImageGeometry(10, 10, "sqare")


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("flip_x", [False, True])
@pytest.mark.parametrize("flip_y", [False, True])
def test_boxes_move_along_with_pixels(transpose: bool, flip_x: bool, flip_y: bool) -> None:
    turned = Orientation(97, 61, transpose, flip_x, flip_y)
    values = np.zeros((61, 97))
    values[7:19, 11:42] = 1
    image = turned.apply_array(values)
    assert image.shape[::-1] == turned.size
    ((x1, y1, x2, y2),) = turned.apply_boxes([(11, 7, 42, 19)])
    assert image[y1:y2, x1:x2].all()
    assert image.sum() == (x2 - x1) * (y2 - y1)


@pytest.mark.parametrize(
    ("mode", "values", "fault"),
    [
        ("pad", {"size": 64, "crop_size": 64}, None),
        ("square", {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}, None),
        ("pad", {"size": {"shortest_edge": 73}, "crop_size": 64}, "size is 73 x 73, and crop_size 64 x 64"),
        ("pad", {"crop_size": 64}, "size is 224 x 224, and crop_size 64 x 64"),
        ("pad", {"size": {"height": 64, "width": 64}, "crop_size": 64}, None),
        (
            "square",
            {"size": {"height": 64, "width": 64}, "crop_size": 64},
            "size is 64 x 64 and not a shortest_edge, which",
        ),
        ("pad", {"size": 64, "crop_size": 64, "do_resize": False}, "do_resize is false"),
        ("pad", {"size": 64, "do_center_crop": False}, None),
        ("square", {"size": 64, "do_center_crop": False}, "do_center_crop is false"),
        ("square", {"size": 64, "crop_size": 64, "do_center_crop": None}, "do_center_crop is false"),
        ("square", {"size": None, "crop_size": {"height": 224, "width": 224}}, None),
        ("square", {"size": {"shortest_edge": 224}, "crop_size": None}, None),
        ("square", {"size": None, "crop_size": 64}, "size is 224 x 224, and crop_size 64 x 64"),
        ("pad", {"size": [64, 64], "crop_size": [64, 64]}, None),
        ("pad", {"size": 64, "crop_size": (64, 48)}, "size is 64 x 64, and crop_size 64 x 48"),
        ("square", {"size": [64, 64], "crop_size": 64}, "size is 64 x 64 and not a shortest_edge, which"),
    ],
)
def test_an_image_processor_that_shows_another_square_is_found(mode: str, values: dict, fault: str | None) -> None:
    found = processor_fault(values, mode)
    assert found is None if fault is None else found is not None and found.startswith(fault)


@pytest.mark.llava
@pytest.mark.parametrize(
    ("values", "missing"),
    [
        ({"size": None, "crop_size": 64}, "size is null"),
        ({"size": 64, "crop_size": None}, "crop_size is null"),
        ({"size": None, "crop_size": None}, "size and crop_size are null"),
        ({"size": None, "crop_size": 64, "do_resize": False}, None),
        ({"size": 64, "crop_size": 64}, None),
        ({}, None),
    ],
)
def test_a_missing_size_is_found_where_the_processor_prepares_no_image(values: dict, missing: str | None) -> None:
    """The installed transformers either fills the size in, or fails at the image. The file itself is told in both cases."""
    from llava.model.multimodal_encoder.clip_encoder import CLIPImageProcessor

    assert missing_size(values) == missing
    processor = CLIPImageProcessor(**values)
    found = missing_size(processor.to_dict())
    assert found in (None, missing)
    try:
        processor(Image.new("RGB", (64, 64)), return_tensors="np")
    except ValueError:
        assert found is not None
    else:
        assert found is None
