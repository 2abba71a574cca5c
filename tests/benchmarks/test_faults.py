"""A small share of the fault campaign of `benchmarks/faults.py`: a few moments of steps that take seconds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.umed_runs import ROOT

pytestmark = [pytest.mark.llava, pytest.mark.run, pytest.mark.one_stack]


@pytest.fixture
def campaign(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import faults

    return faults


@pytest.mark.parametrize("name", ["merge", "writer"])
def test_a_step_that_is_killed_ends_as_the_one_that_was_not(name, campaign, tmp_path):
    import fault_steps

    inputs = fault_steps.Inputs(tmp_path / "inputs")
    step = fault_steps.steps(inputs)[name]
    for seed in range(5):  # where other work has ended meanwhile, the step may be over before the moment comes
        outcomes = campaign.campaign(step, inputs, tmp_path, moments=1, seed=seed, at_a_time=1, until=float("inf"))
        killed = [outcome for outcome in outcomes if outcome.killed]
        if killed:
            break
    assert len(killed) == 1
    assert all(o.equal and o.difference == 0 and not o.half and o.twice <= o.in_flight for o in killed), killed
    # What was done is not done again, and the table counts it.
    again = campaign.campaign(step, inputs, tmp_path, moments=1, seed=seed, at_a_time=1, until=float("inf"))
    assert again == outcomes
    assert campaign.row(outcomes, 1.0, step).startswith(f"| {name} | 1.0 s | 1 | 1 | 1 | 1 | 0 |")


def test_what_is_not_equal_is_counted_as_a_fault(campaign, tmp_path):
    """The comparison itself: a weight, a file and a half result that differ."""
    import fault_steps
    import torch

    one = {"w": torch.ones(2), "file": "a"}
    assert fault_steps.difference(one, {"w": torch.ones(2), "file": "a"}) == 0
    assert fault_steps.difference(one, {"w": torch.ones(2) + 1e-3, "file": "a"}) == pytest.approx(1e-3, rel=1e-3)
    for other in ({"w": torch.ones(2), "file": "b"}, {"w": torch.ones(3), "file": "a"}, {"w": torch.ones(2)}):
        assert fault_steps.difference(one, other) == float("inf")
    for folder, text in (("whole", "all of it"), ("killed", "all")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.json").write_text(text)
    build = fault_steps.steps(fault_steps.Inputs(tmp_path / "inputs"))["build"]
    assert campaign._differs_in(build, tmp_path / "whole", tmp_path / "killed")
    assert not campaign._differs_in(build, tmp_path / "whole", tmp_path / "whole")
    worse = campaign.Outcome("build", 1.0, killed=True, ended_well=True, half=True)
    assert not worse.equal
    assert campaign.row([worse], 1.0, build).startswith("| build | 1.0 s | 1 | 1 | 0 | 0 | 1 |")


@pytest.mark.parametrize("kind", ["safetensors", "nii.gz"])
def test_changed_files_are_read_or_refused(kind, campaign, tmp_path: Path):
    import fault_conditions

    what, came, right = fault_conditions.fuzzed(kind, 60, tmp_path, seed=0)
    assert right, came
    assert "refused" in came and what == f"{kind}: 60 changed files"


def test_a_read_only_folder_and_a_full_disk(campaign, tmp_path):
    """Where this user may not mount, both are said to be not tried. Two runs at once are in tests/test_locks.py."""
    import fault_conditions
    import fault_steps

    inputs = fault_steps.Inputs(tmp_path / "inputs")
    merge = fault_steps.steps(inputs)["merge"]
    for tried in (fault_conditions.read_only, fault_conditions.full_disk):
        _, came, right = tried(merge, inputs, tmp_path)
        assert right is True or (right is None and came == "this user may not mount"), came
