"""Which classes an answer names, and how its boxes are scored, on hand-worked cases."""

from __future__ import annotations

import pytest

from umed_plugin.geometry import ImageGeometry
from umed_plugin.scoring import find_terms, named_classes, score_answer

TERMS = {"nodule": ["nodule", "small mass"], "mass": ["mass"], "cyst": ["cyst", "fluid-filled cavity"]}
GEOMETRY = ImageGeometry(200, 100, "pad", 336, 14)  # the square is 200 wide, 50 px of padding above


def record(refs, boxes):
    return {"objects": {"ref": refs, "bbox": boxes}, "terms": TERMS}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("It is a nodule.", {"nodule"}),
        ("Two Nodules and a cyst", {"nodule", "cyst"}),
        ("a small mass", {"nodule"}),  # the longer name wins over "mass"
        ("a  small\nmass", {"nodule"}),
        ("a fluid-filled cavity", {"cyst"}),
        ("cystic nodular masses", {"mass"}),  # adjectives are not the name
        ("No nodule is seen, but a mass is present.", {"mass"}),
        ("There is no evidence of a cyst.", set()),
        ("The finding is a nodule rather than a cyst.", {"nodule"}),
        ("", set()),
    ],
)
def test_named_classes(text, named):
    assert named_classes(text, TERMS) == named


def test_places_of_terms_are_character_spans():
    text = "A cyst, then a small mass."
    assert [(text[a:b], cls) for a, b, cls in find_terms(text, TERMS)] == [("cyst", "cyst"), ("small mass", "nodule")]


def test_no_terms_name_nothing():
    assert find_terms("a nodule", {}) == []


def test_right_answer():
    # (50, 25)-(100, 75) px is x 0.25-0.5 and y (25 + 50) / 200 = 0.375 to 0.625 of the square.
    score = score_answer("At [0.25, 0.375, 0.50, 0.625] a nodule.", record(["nodule"], [[50, 25, 100, 75]]), GEOMETRY)
    assert (score.accuracy, score.class_f1, score.n_true) == (1.0, 1.0, 1)
    assert score.set_iou == pytest.approx(1.0)
    assert score.boxes[0] == pytest.approx((50, 25, 100, 75))


def test_half_right_answer():
    true = record(["nodule", "cyst"], [[0, 0, 50, 100], [150, 0, 200, 100]])
    score = score_answer("At [0.0, 0.25, 0.25, 0.75] a nodule.", true, GEOMETRY)
    assert score.accuracy == 0.0
    assert score.class_f1 == pytest.approx(2 / 3)
    assert score.set_iou == pytest.approx(0.5)  # one of two boxes found exactly


@pytest.mark.parametrize(
    ("text", "accuracy", "set_iou"),
    [
        ("Nothing abnormal.", 1.0, 1.0),
        ("Nothing, look: [0.1, 0.1, 0.2, 0.2].", 0.0, 0.0),
        ("A nodule.", 0.0, 1.0),
    ],
)
def test_negative_study(text, accuracy, set_iou):
    score = score_answer(text, record([], []), GEOMETRY)
    assert (score.accuracy, score.set_iou) == (accuracy, set_iou)


def test_a_box_that_is_none_counts_against():
    true = record(["nodule"], [[50, 25, 100, 75]])
    assert score_answer(
        "[0.25, 0.375, 0.5, 0.625] [0.9, 0.9, 0.1, 0.1] nodule", true, GEOMETRY
    ).set_iou == pytest.approx(0.5)
