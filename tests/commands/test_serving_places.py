"""Where boxes stand in an answer, and what was half a box."""

from __future__ import annotations

import pytest

from umed_plugin.commands.serve.box_places import box_places, boxes_on_picture
from umed_plugin.grounding.boxes import parse_boxes
from umed_plugin.grounding.geometry import ImageGeometry


@pytest.mark.parametrize(
    ("text", "unread"),
    [
        ("A nodule is visible.40.49, 0.38, 0.49, 0.54]", [".40.49, 0.38, 0.49, 0.54]"]),
        ("A nodule at [0.40, 0.49, 0.38", ["[0.40, 0.49, 0.38"]),
        ("At [0.1, 0.2, 0.3, 0.4], and a mass 0.38, 0.49, 0.54]", ["0.38, 0.49, 0.54]"]),
        ("A cyst at [0.1, 0.2, 0.3, 0.4].", []),
        ("The sizes (about 0.5, 0.7 and 1.2 cm) are 3, 4 and 5.", []),
        ("A value of 0.5] is odd.", []),
        ("It measures 1.2, 0.8 cm.", []),
        ("", []),
    ],
)
def test_half_a_box_is_found_and_prose_is_not(text: str, unread: list[str]) -> None:
    places = box_places(text)
    assert [text[place.start : place.end] for place in places if place.box is None] == unread
    assert [place.box for place in places if place.box is not None] == list(range(len(parse_boxes(text))))


def test_the_places_are_those_of_the_boxes() -> None:
    text = "Lobe [0.10, 0.20, 0.30, 0.40] and then (0.5, 0.5, 0.9, 0.9)."
    assert [text[place.start : place.end] for place in box_places(text)] == [
        "[0.10, 0.20, 0.30, 0.40]",
        "(0.5, 0.5, 0.9, 0.9)",
    ]


def test_a_box_in_the_padding_is_none_and_one_that_reaches_into_it_is_clipped() -> None:
    """200 x 100 stands in the middle of a square of 200, between two bands of padding."""
    geometry = ImageGeometry(200, 100, "pad", 336, 14)
    in_padding, reaching, inside = (0.1, 0.0, 0.3, 0.2), (0.1, 0.1, 0.3, 0.5), (0.1, 0.3, 0.3, 0.5)
    found = boxes_on_picture([in_padding, reaching, inside, (0.3, 0.4, 0.1, 0.5), (0.5, 0.5, 0.9, 1.2)], geometry)
    expected = [None, (20, 0, 60, 50), (20, 10, 60, 50), None, None]
    assert [box and tuple(round(value, 6) for value in box) for box in found] == expected
