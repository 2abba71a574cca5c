"""The paired differences of the benchmarks' tables, and their interval."""

from __future__ import annotations

import numpy as np
import pytest
from intervals import differences, mean_difference

from umed_plugin.evaluation.metrics.metric import Row, compare_rows, means


def rows_of(values, clusters=None):
    return [Row(str(n), str(n if clusters is None else clusters[n]), {"iou": value}) for n, value in enumerate(values)]


def test_no_values_and_equal_values_have_no_interval_and_no_change_has_an_exact_one():
    assert mean_difference([]) == (None, None)
    for count in (2, 20):
        assert mean_difference(differences("iou", rows_of([0.0] * count), rows_of([0.5] * count))) == (0.5, None)
    mean, interval = mean_difference(differences("iou", rows_of([0.5] * 20), rows_of([0.5] * 20)))
    assert mean == 0.0 and interval == pytest.approx([0.025 ** (1 / 20) - 1, 1 - 0.025 ** (1 / 20)])


def test_the_interval_covers_the_mean_as_the_normal_approximation_does_and_is_repeatable():
    values = list(np.random.default_rng(3).random(400))
    paired = differences("iou", rows_of([0.0] * 400), rows_of(values))
    mean, (low, high) = mean_difference(paired)
    half = 1.96 * np.std(values) / 20
    assert mean == pytest.approx(np.mean(values))
    assert low == pytest.approx(np.mean(values) - half, abs=0.1 * half)
    assert high == pytest.approx(np.mean(values) + half, abs=0.1 * half)
    assert mean_difference(paired) == (mean, [low, high])


def test_patients_are_resampled_as_umed_evaluate_does_and_those_of_two_seeds_are_others():
    draw = np.random.default_rng(0)
    before, after = (rows_of(draw.random(60), [n // 6 for n in range(60)]) for _ in range(2))
    mean, interval = mean_difference(differences("iou", before, after[::-1]))
    expected = compare_rows(means("iou"), before, after)["iou"]
    assert mean == pytest.approx(expected["difference"]) and interval == pytest.approx(expected["ci95"])
    both = [row for seed in (0, 1) for row in differences("iou", before, after, seed)]
    assert len({row.cluster for row in both}) == 20
    assert mean_difference(both)[0] == pytest.approx(mean)


def test_a_study_without_a_lesion_has_no_difference_of_iou():
    (pair,) = differences(
        "iou", [*rows_of([0.25]), Row("x", "x", {"accuracy": 1.0})], [*rows_of([0.75]), Row("x", "x", {})]
    )
    assert pair.values == {"difference": 0.5}
