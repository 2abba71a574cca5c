"""Fixtures of the tests of evaluation."""

from __future__ import annotations

import pytest


@pytest.fixture
def short_bootstrap(monkeypatch):
    """100 resamples instead of 2,000: 14 AUCs for each of them take a while, and these tests look at no interval."""
    monkeypatch.setattr("umed_plugin.evaluation.metrics.metric.RESAMPLES", 100)
