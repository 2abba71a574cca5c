"""How boxes move with an augmented square: against MONAI's own box transforms, and against the pixels that MONAI moves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from umed_plugin.grounding.boxes import Box
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.square_move import SquareMove, clipped, image_in_square, kept_fraction

BOXES = [(0.125, 0.25, 0.375, 0.875), (0.5, 0.0, 1.0, 0.25)]


def test_a_box_goes_where_the_picture_goes() -> None:
    assert SquareMove().boxes(BOXES) == BOXES
    assert SquareMove(left_right=True).boxes(BOXES) == [(0.625, 0.25, 0.875, 0.875), (0.0, 0.0, 0.5, 0.25)]
    assert SquareMove(up_down=True).boxes(BOXES) == [(0.125, 0.125, 0.375, 0.75), (0.5, 0.75, 1.0, 1.0)]
    (zoomed,) = SquareMove(zoom=2.0, shift=(0.1, -0.2)).boxes([(0.25, 0.25, 0.5, 0.5)])
    assert zoomed == pytest.approx((0.1, -0.2, 0.6, 0.3))
    # A quarter turn clockwise takes the top to the right.
    (turned,) = SquareMove(angle=90).boxes([(0.4, 0.0, 0.6, 0.1)])
    assert turned == pytest.approx((0.9, 0.4, 1.0, 0.6))
    # Mirrored first, then turned.
    (both,) = SquareMove(left_right=True, angle=90).boxes([(0.0, 0.0, 0.2, 0.1)])
    assert both == pytest.approx((0.9, 0.8, 1.0, 1.0))


def test_a_turned_box_fits_the_ellipse_inside_it() -> None:
    angle, points = 25.0, np.linspace(0, 2 * math.pi, 7201)
    x, y = 0.15 * np.cos(points), 0.05 * np.sin(points)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    across, down = 0.5 + cos * x - sin * y, 0.5 + sin * x + cos * y
    (box,) = SquareMove(angle=angle).boxes([(0.35, 0.45, 0.65, 0.55)])
    assert box == pytest.approx((across.min(), down.min(), across.max(), down.max()), abs=1e-6)


def test_what_is_left_of_a_box_in_the_square() -> None:
    assert kept_fraction((0.2, 0.2, 0.4, 0.4)) == pytest.approx(1)
    assert kept_fraction((-0.1, 0.2, 0.3, 0.4)) == pytest.approx(0.75)
    assert kept_fraction((-0.2, -0.2, 0.2, 0.2)) == pytest.approx(0.25)
    assert kept_fraction((1.1, 0.2, 1.3, 0.4)) == 0 == kept_fraction((0.3, 0.2, 0.3, 0.4))
    assert clipped((-0.1, 0.2, 0.3, 1.4)) == (0.0, 0.2, 0.3, 1.0)


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        ({"left_right": True, "up_down": True, "shift": [0.0, 0.0]}, (0.0, 0.25, 1.0, 0.75)),
        ({"zoom": 0.5, "shift": [0.125, -0.25]}, (0.375, 0.125, 0.875, 0.375)),
        ({"zoom": 2.0, "shift": [0.0, 0.25]}, (0.0, 0.25, 1.0, 1.0)),
        ({"angle": 90.0, "shift": [0.0, 0.0]}, (0.25, 0.0, 0.75, 1.0)),
        # Its corners, not those of the ellipse that fills it, and within the square.
        ({"angle": 30.0, "zoom": 0.5, "shift": [0.0, 0.0]}, (0.2209936, 0.2667468, 0.7790064, 0.7332532)),
        ({"angle": 45.0, "shift": [0.0, 0.0]}, (0.0, 0.0, 1.0, 1.0)),
        ("by hand", (0.0, 0.25, 1.0, 0.75)),  # somebody's own key
    ],
)
def test_the_image_moves_in_the_square(moved: Any, expected: Box) -> None:
    wide = ImageGeometry(200, 100)
    assert image_in_square({}, wide) == (0.0, 0.25, 1.0, 0.75)
    assert image_in_square({"augmented": moved}, wide) == pytest.approx(expected)
    for own in (True, {"shift": 0.05}, {"shift": [0, 0], "rotation": 5}, {"zoom": 2.0}):  # in somebody's own records
        assert image_in_square({"augmented": own}, wide) == image_in_square({}, wide)


@pytest.mark.llava
def test_mirrored_and_zoomed_boxes_are_those_of_monai() -> None:
    torch = pytest.importorskip("torch")
    from monai.apps.detection.transforms.dictionary import FlipBoxd, ZoomBoxd

    size = 64
    rows_first = torch.tensor([[y1, x1, y2, x2] for x1, y1, x2, y2 in BOXES], dtype=torch.float32) * size
    data = {"image": torch.rand(3, size, size), "boxes": rows_first}
    keys = {"image_keys": ["image"], "box_keys": ["boxes"], "box_ref_image_keys": ["image"]}
    for axis, move in ((1, SquareMove(left_right=True)), (0, SquareMove(up_down=True))):
        found = FlipBoxd(**keys, spatial_axis=axis)(data)["boxes"]
        assert np.allclose(found[:, [1, 0, 3, 2]] / size, move.boxes(BOXES))
    found = ZoomBoxd(**keys, zoom=[1.25, 1.25], keep_size=True)(data)["boxes"]
    assert np.allclose(found[:, [1, 0, 3, 2]] / size, SquareMove(zoom=1.25).boxes(BOXES), atol=1e-6)
