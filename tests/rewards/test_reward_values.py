"""What rewards return: which numbers are taken, and what is refused with the reward's name."""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from umed_plugin.errors import UmedError
from umed_plugin.rewards import (
    advance_rewards,
    collect_metrics,
    combine_rewards,
    end_rollout,
    normalisation_of,
    reward_states,
    run_rewards,
    start_rewards,
)

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


class Measures:
    metric_names = ("own/one", "own/two")

    def __init__(self, measured):
        self.measured = measured

    def metrics(self):
        return self.measured


def test_metrics_of_any_kind_of_number_are_taken():
    found = collect_metrics({"own": Measures({"own/one": np.int64(2), "own/two": torch.tensor(0.5)})})
    assert found == {"own/one": 2.0, "own/two": 0.5} and {type(value) for value in found.values()} == {float}


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (None, "returned None. Allowed: a dictionary of numbers"),
        ({"own/one": None}, "returned None for own/one. Allowed: a number"),
        ({"own/two": "many"}, "returned 'many' for own/two"),
        ({3: 1.0}, "returned 3, which its attribute `metric_names` does not list"),
    ],
)
def test_metrics_that_are_no_numbers_are_refused_with_the_rewards_name(measured, message):
    with pytest.raises(UmedError, match=rf"reward 'own': metrics\(\) {message}"):
        collect_metrics({"own": Measures(measured)})


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (-1, "its scale is -1.0. Allowed: finite numbers of 0 or more"),
        ("large", "its scale is 'large'"),
        (lambda **columns: None, "scale returned None. It must return a list"),
        (lambda **columns: [0.1, None], "its scale is None"),
        (lambda **columns: [0.1], "scale returned 1 numbers for 2 answers"),
    ],
)
def test_a_scale_that_is_no_number_of_0_or_more_is_refused(scale, message):
    def own(completions, **columns):
        return [0.0] * len(completions)

    own.scale = scale
    with pytest.raises(UmedError, match=f"reward 'own': {message}"):
        normalisation_of({"own": own}, {"record": [NODULE] * 2})


def test_a_scale_may_come_with_columns_that_are_no_lists():
    """TRL passes its trainer's state among them."""

    def own(completions, **columns):
        return [0.0] * len(completions)

    own.scale = lambda record, **columns: [0.5] * len(record)
    columns = {"trainer_state": object(), "record": [NODULE] * 2}
    assert normalisation_of({"own": own}, columns)["scales"] == {"own": [0.5, 0.5]}


class Changing:
    """Fails where it is told to."""

    def __init__(self, fails):
        self.fails, self.seen = fails, None

    def for_all_processes(self):
        if self.fails == "before":
            raise UmedError("before")
        return [1]

    def advance(self, values):
        if self.fails == "after":
            raise UmedError("after")
        self.seen = values


@pytest.mark.parametrize("fails", ["before", "after", None])
def test_a_reward_that_changes_fails_in_all_processes_together(fails):
    """No process waits in a gather that another has not reached: all know of the failure first."""
    events = []

    @contextmanager
    def agreed():
        events.append("begin")
        try:
            yield
        finally:
            events.append("end")

    def gather(own):
        events.append("gather")
        return own * 2

    reward = Changing(fails)
    with pytest.raises(UmedError, match=fails) if fails else nullcontext():
        advance_rewards({"fixed": print, "own": reward}, gather, agreed)
    assert events == ["begin", "end"] if fails == "before" else ["begin", "end", "gather", "begin", "end"]
    assert reward.seen == (None if fails else [1, 1])


def raising(name):
    def method(self, *positional, **keywords):
        if self.name == name:
            raise ValueError(f"in {name}")
        return {}

    return method


class Raises:
    """Raises in the function of this name."""

    metric_names = ("own/x",)
    start, metrics, scale, advance = raising("start"), raising("metrics"), raising("scale"), raising("advance")
    for_all_processes, end_rollout = raising("for_all_processes"), raising("end_rollout")
    applies_to, state = raising("applies_to"), raising("state")

    def __init__(self, name):
        self.name = name

    def __call__(self, prompts, completions, **columns):
        return [0.0 / (self.name != "__call__")]


CALLS = {
    "start": lambda rewards, columns: start_rewards(rewards, ["?"], ["!"], **columns),
    "__call__": lambda rewards, columns: run_rewards(rewards, ["?"], ["!"], **columns),
    "applies_to": lambda rewards, columns: run_rewards(rewards, ["?"], ["!"], **columns),
    "metrics": lambda rewards, columns: collect_metrics(rewards),
    "scale": normalisation_of,
    "for_all_processes": lambda rewards, columns: advance_rewards(rewards, list),
    "advance": lambda rewards, columns: advance_rewards(rewards, list),
    "end_rollout": lambda rewards, columns: end_rollout(rewards),
    "state": lambda rewards, columns: reward_states(rewards),
}


@pytest.mark.parametrize("name", CALLS)
def test_any_exception_of_a_reward_is_an_error_that_names_it_with_file_and_line(name):
    with pytest.raises(UmedError) as raised:
        CALLS[name]({"mine:own": Raises(name)}, {"record": [{"id": "scan 7"}]})
    kind = "ZeroDivisionError" if name == "__call__" else "ValueError"
    assert str(raised.value).startswith(f"reward 'mine:own' raised {kind}: ") and f"({__file__}, line " in str(
        raised.value
    )
    assert ("scan 7" in str(raised.value)) == (name in ("start", "__call__", "applies_to", "scale"))


class Remembers:
    """Its `state` is the dictionary that it goes on with."""

    def __init__(self, kept):
        self.kept = kept

    def state(self):
        return self.kept


def test_a_state_is_not_what_the_reward_goes_on_with():
    """A step that fails must leave no trace in the checkpoint of the step before it."""
    own = {"remembers": Remembers({"seen": [1], "best": None})}
    before = reward_states(own)
    own["remembers"].kept["seen"].append(2)
    own["remembers"].kept["best"] = 0.5
    assert before == {"remembers": {"seen": [1], "best": None}}


@pytest.mark.parametrize("state", [{"seen": {1, 2}}, {"scale": np.float32(1)}, {(1, 2): 3}, torch.ones(2)])
def test_a_state_that_no_json_holds_is_refused_with_the_rewards_name(state):
    with pytest.raises(
        UmedError, match=r"reward 'remembers': state\(\) returned what no JSON holds .*Allowed: dictionaries"
    ):
        reward_states({"remembers": Remembers(state)})
