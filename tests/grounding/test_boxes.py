"""Overlap, matching, and the text form of boxes."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umed_plugin.grounding.boxes import (
    DISTANCE_SHARE,
    best_iou_for_decimals,
    format_box,
    iou_matrix,
    is_inside,
    match,
    parse_boxes,
    round_box,
    set_iou,
    shaped_iou_matrix,
)


def random_boxes(rng: random.Random, count: int, scale: float = 1.0) -> list[tuple[float, float, float, float]]:
    boxes = []
    for _ in range(count):
        (x1, x2), (y1, y2) = (sorted(rng.uniform(0, scale) for _ in range(2)) for _ in range(2))
        boxes.append((x1, y1, x2, y2))
    return boxes


def iou_by_hand(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = width * height if width > 0 and height > 0 else 0.0
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / both


@pytest.mark.parametrize("scale", [1.0, 512.0])
def test_iou_is_its_formula(scale: float) -> None:
    rng = random.Random(3)
    a, b = random_boxes(rng, 25, scale), random_boxes(rng, 31, scale)
    found = iou_matrix(a, b)
    assert found.shape == (25, 31)
    assert found.dtype == np.float64
    assert (found > 0.05).sum() > 50
    np.testing.assert_allclose(found, [[iou_by_hand(x, y) for y in b] for x in a], atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 512.0])
def test_iou_and_its_distance_term_equal_torchvisions(scale: float) -> None:
    ops = pytest.importorskip("torchvision.ops", reason="the current stack has no torchvision; the pinned one compares")
    import torch

    rng = random.Random(3)
    a, b = random_boxes(rng, 25, scale), random_boxes(rng, 31, scale)
    first, second = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    iou = ops.box_iou(first, second).numpy()
    np.testing.assert_allclose(iou_matrix(a, b), iou, atol=1e-12)
    one, other = ops.box_area(first)[:, None].numpy(), ops.box_area(second).numpy()
    alike = np.minimum(one, other) / np.maximum(one, other)
    nearness = 1 + ops.distance_box_iou(first, second, eps=0).numpy() - iou
    shaped = (1 - DISTANCE_SHARE) * iou + DISTANCE_SHARE * alike * nearness
    np.testing.assert_allclose(shaped_iou_matrix(a, b), shaped, atol=1e-12)


def test_identical_boxes_in_0_to_1_have_iou_1() -> None:
    """Other projects' pixel arithmetic (+1) gives 0 here."""
    assert set_iou([(0.1, 0.2, 0.3, 0.4)], [(0.1, 0.2, 0.3, 0.4)]) == 1.0


def test_a_degenerate_box_overlaps_nothing_but_counts() -> None:
    good = (0.1, 0.1, 0.5, 0.5)
    for bad in [(0.5, 0.5, 0.1, 0.1), (0.1, 0.1, 0.1, 0.5), (0.0, 0.0, 0.0, 0.0), (float("nan"), 0.1, 0.5, 0.5)]:
        assert set_iou([bad], [good]) == 0.0
        assert set_iou([good, bad], [good]) == 0.5
        assert set_iou([bad], [bad]) == 0.0


def test_set_iou_of_empty_sides() -> None:
    assert set_iou([], []) == 1.0
    assert set_iou([], [(0, 0, 1, 1)]) == 0.0
    assert set_iou([(0, 0, 1, 1)], []) == 0.0


def test_an_extra_box_counts_against() -> None:
    true = [(0, 0, 10, 10)]
    assert set_iou([(0, 0, 10, 10), (50, 50, 60, 60)], true) == 0.5
    assert set_iou([(0, 0, 10, 10), (0, 0, 10, 10)], true) == 0.5


def test_matching_is_the_best_of_all_assignments() -> None:
    rng = random.Random(5)
    for _ in range(40):
        predicted, true = random_boxes(rng, rng.randint(1, 4)), random_boxes(rng, 4)
        overlap = iou_matrix(predicted, true)
        best = max(
            sum(overlap[i, j] for i, j in enumerate(chosen))
            for chosen in itertools.permutations(range(len(true)), len(predicted))
        )
        assert set_iou(predicted, true) == pytest.approx(best / 4)
        pairs, ious = match(predicted, true)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
        assert ious == [overlap[pair] for pair in pairs]


def test_matching_prefers_the_sum_over_the_first_choice() -> None:
    """A greedy match takes (0, 0) with 0.9 and is left with nothing for the second box."""
    true = [(0, 0, 10, 10), (0, 0, 10, 5.5)]
    predicted = [(0, 0, 10, 9), (0, 0, 10, 12)]
    pairs, _ = match(predicted, true)
    assert pairs == [(0, 1), (1, 0)]


def shaped_by_hand(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    distance = sum(((a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2) ** 2 for i in (0, 1))
    diagonal = sum((max(a[i + 2], b[i + 2]) - min(a[i], b[i])) ** 2 for i in (0, 1))
    areas = sorted((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b))
    return 0.75 * iou_by_hand(a, b) + 0.25 * areas[0] / areas[1] * (1 - distance / diagonal)


def test_shaped_iou_is_its_formula_and_stays_in_0_to_1() -> None:
    rng = random.Random(7)
    a, b = random_boxes(rng, 40), random_boxes(rng, 40)
    found, overlap = shaped_iou_matrix(a, b), iou_matrix(a, b)
    np.testing.assert_allclose(found, [[shaped_by_hand(x, y) for y in b] for x in a], atol=1e-12)
    assert (found > 0).all()
    assert (found <= 1).all()
    apart = overlap == 0
    assert apart.sum() > 50
    assert (found[apart] < DISTANCE_SHARE).all()
    assert np.diag(shaped_iou_matrix(a, a)) == pytest.approx(np.ones(40))


def test_shaped_iou_tells_near_misses_from_far_ones_and_rewards_no_hedging() -> None:
    true = (0.1, 0.1, 0.3, 0.3)
    far, near, touching = ((0.1 + by, 0.1, 0.3 + by, 0.3) for by in (0.6, 0.3, 0.2))
    values = shaped_iou_matrix([far, near, touching, true], [true])[:, 0]
    assert (np.diff(values) > 0.01).all()
    around = [(0.1 - by, 0.1 - by, 0.3 + by * 3, 0.3 + by * 3) for by in (0.02, 0.05, 0.1)] + [(0.0, 0.0, 1.0, 1.0)]
    assert (shaped_iou_matrix(around, [true]) <= iou_matrix(around, [true]) + 1e-12).all()
    concentric = [(0.15, 0.15, 0.25, 0.25), (0.0, 0.0, 0.4, 0.4)]
    np.testing.assert_allclose(shaped_iou_matrix(concentric, [true]), iou_matrix(concentric, [true]), atol=1e-6)
    whole, missed = shaped_iou_matrix([(0.0, 0.0, 1.0, 1.0), touching], [true])[:, 0]
    assert whole < missed


def test_shaped_boxes_are_matched_on_the_same_measure() -> None:
    """No box overlaps another, so IoU cannot match them."""
    true = [(0.1, 0.1, 0.2, 0.2), (0.8, 0.8, 0.9, 0.9)]
    predicted = [(0.65, 0.8, 0.75, 0.9), (0.25, 0.1, 0.35, 0.2)]
    assert match(predicted, true) == ([], [])
    pairs, values = match(predicted, true, shaped_iou_matrix)
    assert pairs == [(0, 1), (1, 0)]
    assert set_iou(predicted, true, shaped_iou_matrix) == pytest.approx(sum(values) / 2)
    assert set_iou([predicted[0]], true, shaped_iou_matrix) == pytest.approx(values[0] / 2)
    assert set_iou([], [], shaped_iou_matrix) == 1.0
    assert set_iou([], true, shaped_iou_matrix) == set_iou(predicted, [], shaped_iou_matrix) == 0.0
    assert set_iou([(0.5, 0.5, 0.1, 0.1)], [true[0]], shaped_iou_matrix) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It lies at [0.61, 0.36, 0.92, 0.83].", [(0.61, 0.36, 0.92, 0.83)]),
        ("[0.61,.36,0.92,0.83] and [ 0.1 , 0.2 , 0.3 , 1 ]", [(0.61, 0.36, 0.92, 0.83), (0.1, 0.2, 0.3, 1.0)]),
        ("[0, 0, 1, 1]", [(0.0, 0.0, 1.0, 1.0)]),
        ("[610, 360, 920, 830]", [(0.61, 0.36, 0.92, 0.83)]),
        ("<ref>nodule</ref><box>(610,360),(920,830)</box>", [(0.61, 0.36, 0.92, 0.83)]),
        ("<box>[[610, 360, 920, 830], [1, 2, 3, 4]]</box>", [(0.61, 0.36, 0.92, 0.83), (0.001, 0.002, 0.003, 0.004)]),
        ("<box>0.1 0.2 0.3 0.4</box>", [(0.1, 0.2, 0.3, 0.4)]),
        ("<box><x55><y45><x70><y56></box>", [(0.555, 0.455, 0.705, 0.565)]),
        ("(0.1, 0.2, 0.3, 0.4)", [(0.1, 0.2, 0.3, 0.4)]),
        ('{"bbox_2d": [100, 200, 300, 400]}', [(0.1, 0.2, 0.3, 0.4)]),
        ("[0.612, 0.361, 0.923, 0.834]", [(0.612, 0.361, 0.923, 0.834)]),
        ("(10,20),(30,40) then [0.5, 0.5, 0.6, 0.6]", [(0.01, 0.02, 0.03, 0.04), (0.5, 0.5, 0.6, 0.6)]),
        ("[-0.1, 0.2, 0.3, 1.2]", [(-0.1, 0.2, 0.3, 1.2)]),
        ("No abnormality. [1, 2, 3] 0.1, 0.2, 0.3, 0.4 [a, b, c, d] []", []),
    ],
)
def test_dialects(text: str, expected: list[tuple[float, ...]]) -> None:
    assert parse_boxes(text) == [pytest.approx(box) for box in expected]


def test_values_outside_0_to_1_are_kept_and_refused_by_scoring() -> None:
    (box,) = parse_boxes("[0.5, 0.5, 1.4, 0.9]")
    assert not is_inside(box)
    assert is_inside((0.5, 0.5, 1.0, 0.9))
    assert not is_inside((-0.01, 0.5, 1.0, 0.9))
    assert not is_inside((0.5, 0.5, 0.5, 0.9))


@given(st.text(alphabet="[](),.0123456789 <>boxy/-", max_size=60))
def test_parsing_never_raises(text: str) -> None:
    assert all(len(box) == 4 for box in parse_boxes(text))


unit = st.floats(0, 1)


@given(unit, unit, unit, unit, st.sampled_from([2, 3]))
def test_what_is_written_is_read_back(a: float, b: float, c: float, d: float, decimals: int) -> None:
    box = (min(a, c), min(b, d), max(a, c), max(b, d))
    if box[0] == box[2] or box[1] == box[3]:
        with pytest.raises(ValueError, match="no area"):
            format_box(box, decimals)
        return
    (read,) = parse_boxes(format_box(box, decimals))
    assert read == round_box(box, decimals)
    assert is_inside(read)
    assert all(abs(x - y) <= 10**-decimals + 1e-9 for x, y in zip(read, box))


def test_a_thin_box_keeps_an_area_when_written() -> None:
    assert format_box((0.501, 0.2, 0.504, 0.4)) == "[0.50, 0.20, 0.51, 0.40]"
    assert format_box((0.999, 0.2, 1.0, 0.4)) == "[0.99, 0.20, 1.00, 0.40]"
    assert format_box((0.6123, 0.3567, 0.9, 0.83), 3) == "[0.612, 0.357, 0.900, 0.830]"


def test_best_iou_for_decimals_of_a_small_lesion() -> None:
    """20 px in 512: 0.2051 and 0.2441 become 0.21 and 0.24, an edge of 0.03 instead of 0.039."""
    box = (105 / 512, 105 / 512, 125 / 512, 125 / 512)
    assert best_iou_for_decimals(box, 2) == pytest.approx(0.03**2 / (20 / 512) ** 2)
    assert best_iou_for_decimals(box, 3) > 0.95
    assert best_iou_for_decimals((0.25, 0.25, 0.5, 0.75), 2) == 1.0


def test_importing_boxes_is_cheap() -> None:
    code = "import sys, umed_plugin.grounding.boxes; print('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
