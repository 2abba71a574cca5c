"""Tasks of Label Studio that show several images: whose a region is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.annotation_files import boxes, put, read

from umed_plugin.data.annotations import AnnotationSet

STUDIO = "{reader: label_studio, files: a.json%s}"
IMAGES = ("front.png", "lat.png", "front2.png", "lat2.png")
FRONT = [pytest.approx((0.1, 0.1, 0.3, 0.3))]
LATERAL = [pytest.approx((0.6, 0.6, 0.8, 0.8))]


def studio(folder: Path, content: list[Any], more: str = "") -> AnnotationSet:
    for name in IMAGES:
        put(folder / name)
    put(folder / "a.json", json.dumps(content))
    return read(folder, STUDIO % more)


def region(number: int, at: int) -> dict[str, Any]:
    value = {"x": at, "y": at, "width": 20, "height": 20, "rotation": 0, "rectanglelabels": ["nod"]}
    size = {"original_width": 100, "original_height": 80, "image_rotation": 0}
    names = {"id": f"r{number}", "from_name": "label", "to_name": f"img{number}", "type": "rectanglelabels"}
    return {**names, **size, "value": value}


def task(*regions: dict[str, Any], number: str = "") -> dict[str, Any]:
    data = {"image": f"/data/front{number}.png", "image2": f"/data/lat{number}.png"}
    return {"id": 1, "data": data, "annotations": [{"id": 5, "completed_by": 1, "result": list(regions)}]}


BOTH = task(region(1, 10), region(2, 60))


def test_regions_of_two_images_are_a_fault(tmp_path: Path) -> None:
    (message,) = studio(tmp_path, [BOTH]).faults.messages
    assert "annotation 5: has regions of 2 images (img1, img2); say which one by annotations.to_name" in message
    # Each annotation has regions of one image, but the two do not have them of the same.
    (message,) = studio(tmp_path, [task(region(1, 10)), task(region(2, 60), number="2")]).faults.messages
    assert "a.json: has regions of 2 images (img1, img2), as in" in message


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (", to_name: img1", {"front.png": FRONT}),
        (", to_name: img2, image: image2", {"lat.png": LATERAL}),
    ],
)
def test_regions_of_the_other_image_are_counted(tmp_path: Path, more: str, expected: dict[str, Any]) -> None:
    found = studio(tmp_path, [BOTH], more)
    assert boxes(found) == expected
    assert found.faults.left_out == {("regions", "of another image of their task; annotations.to_name"): 1}


def test_an_image_without_a_region_is_no_negative_where_its_neighbour_has_one(tmp_path: Path) -> None:
    found = studio(tmp_path, [BOTH, task(region(2, 60), number="2")], ", to_name: img1")
    assert boxes(found) == {"front.png": FRONT}
    assert found.left_out == {"has regions or choices on other images of its task alone; annotations.to_name": 1}
    assert boxes(studio(tmp_path, [BOTH, task(number="2")], ", to_name: img1")) == {
        "front.png": FRONT,
        "front2.png": [],
    }


def test_a_choice_about_the_other_image_says_nothing_of_this_one(tmp_path: Path) -> None:
    def normal(number: int) -> dict[str, Any]:
        value = {"choices": ["Normal"]}
        return {"id": f"c{number}", "from_name": "c", "to_name": f"img{number}", "type": "choices", "value": value}

    more = ", to_name: img1, no_finding: [Normal]"
    both_normal = task(normal(1), normal(2), number="2")
    found = studio(tmp_path, [task(region(1, 10), normal(2)), both_normal], more)
    assert boxes(found) == {"front.png": FRONT, "front2.png": []}
    assert found.faults.left_out == {("choices or texts", "of another image of their task; annotations.to_name"): 2}
    # Nothing is said of the image itself, so it is no negative.
    found = studio(tmp_path, [BOTH, task(normal(2), number="2")], more)
    assert boxes(found) == {"front.png": FRONT}
    assert found.left_out == {"has regions or choices on other images of its task alone; annotations.to_name": 1}


def test_an_image_tag_that_no_region_has(tmp_path: Path) -> None:
    (message,) = studio(tmp_path, [BOTH], ", to_name: img3").faults.messages
    assert "has no region of 'img3' (annotations.to_name). Regions are of img1, img2" in message
    nameless = {key: value for key, value in region(1, 10).items() if key != "to_name"}
    assert "has a region without to_name" in studio(tmp_path, [task(nameless)], ", to_name: img1").faults.messages[0]
    assert boxes(studio(tmp_path, [task(nameless)])) == {"front.png": FRONT}


def of_min(**fields: Any) -> dict[str, Any]:
    """An entry of JSON-MIN with two control tags."""
    found = [{**region(1, at)["value"], "original_width": 100, "original_height": 80} for at in (10, 60)]
    entry = {"id": 1, "annotation_id": 3, "annotator": 1, "image": "/data/front.png"}
    return {**entry, "label": found[:1], "label2": found[1:], **fields}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("", "has images in image, image2, and regions are in label, label2. JSON-MIN does not say whose"),
        (", to_name: img1", "is of JSON-MIN, which has no to_name (annotations.to_name). Export it as JSON"),
    ],
)
def test_json_min_names_no_image(tmp_path: Path, more: str, words: str) -> None:
    (message,) = studio(tmp_path, [of_min(image2="/data/lat.png")], more).faults.messages
    assert words in message
    two = [
        of_min(image2="/data/lat.png", label2=[]),
        of_min(image="/data/front2.png", image2="/data/lat2.png", label=[]),
    ]
    assert words in studio(tmp_path, two, more).faults.messages[-1]
    assert boxes(studio(tmp_path, [of_min(note="http://[no address")])) == {"front.png": [*FRONT, *LATERAL]}
