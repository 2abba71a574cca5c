"""Which distances of a server's log-probabilities are taken for another model, or for one without its adapter."""

from __future__ import annotations

import math

import pytest

from umed_plugin.model.server_comparison import LEAST_TOKENS, ServerComparison


def comparison(most: float = 0.1) -> ServerComparison:
    return ServerComparison("http://server/v1", most, "--most")


@pytest.mark.parametrize(
    ("difference", "without_adapter"),
    [
        (0.0, 0.0),  # float32, before the first step
        (3e-7, 0.018),
        (
            0.0136,
            0.0126,
        ),  # bfloat16 for float32 here, and an adapter that changes 0.004: measured on a demo's checkpoint
        (0.0034, 0.0050),  # float16
        (0.02, 0.012),  # the smaller one is no small part of the other
        (0.004, 0.0),  # less than rounding
        (0.05, 0.06),  # the adapter of the step before
        (0.09, None),
    ],
)
def test_what_rounding_does_is_no_fault(difference, without_adapter):
    compared = comparison()
    assert all(compared.fault(LEAST_TOKENS, difference, without_adapter) is None for _ in range(5))


def test_a_server_without_the_adapter_is_found_over_many_tokens():
    compared = comparison()
    half = LEAST_TOKENS // 2
    assert compared.fault(half, 0.0, 0.0) is None
    assert compared.fault(half - 1, 0.04, 0.001) is None, "too few tokens"
    said = compared.fault(1, 0.04, 0.001)
    assert said.startswith("http://server/v1: accepts the adapter, but answers without it.")
    assert "with its adapter off by 0.0005 nats a token, and with it by 0.02." in said, "means over all tokens"
    assert compared.fault(half, 0.0, 0.0) is None, "begins anew"


def test_a_server_that_is_right_again_is_judged_by_its_last_answers():
    compared = comparison()
    assert compared.fault(LEAST_TOKENS - 1, 0.03, 0.0) is None
    assert compared.fault(9 * LEAST_TOKENS, 0.001, 0.03) is None
    assert compared.fault(LEAST_TOKENS, 0.03, 0.0) is not None


@pytest.mark.parametrize(
    ("difference", "without_adapter", "words"),
    [
        (0.11, None, "differ from ours by 0.11 nats a token on average. Allowed: 0.1 (--most). It holds another model"),
        (0.3, 0.4, "It holds another model or adapter"),
        (0.3, 0.2, "It holds another model or adapter"),
        (0.3, 0.02, "answers without it"),
        (math.nan, 0.02, "nan nats a token"),
        (math.inf, math.nan, "inf nats a token"),
    ],
)
def test_more_than_is_allowed_is_a_fault_in_any_batch(difference, without_adapter, words):
    assert words in comparison().fault(1, difference, without_adapter)
