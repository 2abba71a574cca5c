"""The interval of the benchmarks' tables."""

from __future__ import annotations

import numpy as np
import pytest
from intervals import mean_interval


def test_no_values_have_no_interval_and_equal_values_have_no_width():
    assert mean_interval([]) is None
    assert mean_interval([0.5, 0.5]) == [0.5, 0.5]


def test_the_interval_covers_the_mean_as_the_normal_approximation_does_and_is_repeatable():
    values = list(np.random.default_rng(3).random(400))
    low, high = mean_interval(values)
    half = 1.96 * np.std(values) / 20
    assert low == pytest.approx(np.mean(values) - half, abs=0.1 * half)
    assert high == pytest.approx(np.mean(values) + half, abs=0.1 * half)
    assert mean_interval(values) == [low, high]
