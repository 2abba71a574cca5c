"""What rewards return: which numbers are taken, and what is refused with the reward's name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from umed_plugin.errors import UmedError
from umed_plugin.rewards import combine_rewards, run_rewards

NODULE, NEGATIVE = {"objects": {"ref": ["nodule"]}}, {"objects": {"ref": []}}


@pytest.mark.parametrize(
    ("returned", "values"),
    [
        ([0, 1], [0.0, 1.0]),
        ([True, None], [1.0, None]),
        ((0.25, 1), [0.25, 1.0]),
        (np.array([0.25, 0.5], dtype=np.float32), [0.25, 0.5]),
        ([np.float32(0.25), np.bool_(True)], [0.25, 1.0]),
        (torch.tensor([0.25, 0.5], requires_grad=True), [0.25, 0.5]),
        ([torch.tensor(0.25), torch.tensor(1)], [0.25, 1.0]),
    ],
)
def test_numbers_of_any_kind_become_floats_that_train_and_can_be_written(returned, values):
    found = run_rewards({"own": lambda completions, **columns: returned}, ["?"] * 2, ["a", "b"], record=[NODULE] * 2)
    assert found == {"own": values} and json.loads(json.dumps(found)) == found
    assert {type(value) for value in found["own"]} <= {float, type(None)}
    for given in (found, {"own": returned}):
        assert combine_rewards(given, 2, weights={"own": 1.0}, norm="none").dtype == torch.float32


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            None,
            "returned None, as a function without `return` does. It must return a list: one number for each of the 2",
        ),
        (0.5, "returned 0.5. It must return a list"),
        ("ab", "returned 'ab'. It must return a list"),
        ({0.1, 0.2}, "It must return a list"),
        ([0.1], "returned 1 values for 2 answers. It must return one number for each of the 2 answers"),
        ([0.1, 0.2, 0.3], "returned 3 values for 2 answers"),
        ([0.1, "0.2"], "returned '0.2'. Allowed: finite numbers"),
        ([[0.1], [0.2]], r"returned \[0.1\]. Allowed: finite numbers"),
        ([0.1, float("nan")], "returned nan. Allowed: finite numbers"),
        ([0.1, 10**5000], "returned inf. Allowed: finite numbers"),
        ([0.1, -1e39], "returned -1e\\+39. Allowed: finite numbers"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused_with_the_rewards_name(returned, message):
    with pytest.raises(UmedError, match=f"reward 'own' .*{message}"):
        run_rewards({"own": lambda completions, **columns: returned}, ["?"] * 2, ["a", "b"], record=[NODULE] * 2)


def test_a_value_for_a_record_to_which_the_reward_does_not_apply_is_none_whatever_it_is():
    def of_lesions(completions, **columns):
        return [0.5, float("nan")]

    of_lesions.applies_to = lambda record: bool(record["objects"]["ref"])
    columns = {"record": [NODULE, NEGATIVE]}
    assert run_rewards({"own": of_lesions}, ["?"] * 2, ["a", "b"], **columns) == {"own": [0.5, None]}
    with pytest.raises(UmedError, match="returned 2 values for 1 answers"):
        run_rewards({"own": of_lesions}, ["?"], ["a"], record=[NODULE])
