"""--umed_rollout_server and the flags around it: what is refused before the model is loaded."""

from __future__ import annotations

import pytest
from support.llava_args import llava_args

from umed_plugin.flags.checks import find_faults
from umed_plugin.flags.definition import UmedFlags

URL = "http://127.0.0.1:8000/v1"


def faults(arguments: dict, **flags) -> list[str]:
    return find_faults(UmedFlags(umed_stage="rewarding", **flags), *llava_args(**arguments))


def test_lora_and_this_machine_are_allowed():
    assert faults({"lora_enable": True, "bits": 16}, umed_rollout_server=URL) == []
    assert (
        faults({"lora_enable": True}, umed_rollout_server=URL, umed_algorithm="ppo", umed_updates_per_rollout=2) == []
    )


def test_full_fine_tuning_and_4_bits_are_refused_with_the_reason():
    (fault,) = faults({"lora_enable": False}, umed_rollout_server=URL)
    assert "--umed_rollout_server needs --lora_enable True" in fault and "only in its own process" in fault
    (fault,) = faults({"lora_enable": True, "bits": 4}, umed_rollout_server=URL)
    assert "--bits 4" in fault and "another policy" in fault


def test_another_machine_is_allowed_only_by_a_flag():
    (fault,) = faults({"lora_enable": True}, umed_rollout_server="http://10.0.0.2:8000/v1")
    assert "is another machine" in fault and "--umed_rollout_remote True" in fault
    assert faults({"lora_enable": True}, umed_rollout_server="http://10.0.0.2/v1", umed_rollout_remote=True) == []


@pytest.mark.parametrize(
    "flag",
    [
        {"umed_rollout_remote": True},
        {"umed_rollout_adapters": "/dev/shm"},
        {"umed_rollout_timeout": 5.0},
        {"umed_rollout_retries": 1},
        {"umed_rollout_max_difference": 1.0},
        {"umed_importance_cap": 2.0},
    ],
    ids=lambda flag: next(iter(flag)),
)
def test_the_others_have_no_effect_without_it(flag):
    (fault,) = faults({"lora_enable": True}, **flag)
    assert f"--{next(iter(flag))} has no effect without --umed_rollout_server" in fault
    assert faults({"lora_enable": True}, umed_rollout_server=URL, **flag) == []


@pytest.mark.parametrize(
    "flag", [{"umed_importance_cap": 0.5}, {"umed_rollout_timeout": 0.0}, {"umed_rollout_max_difference": 0.0}]
)
def test_values_out_of_range_are_refused(flag):
    (fault,) = faults({"lora_enable": True}, umed_rollout_server=URL, **flag)
    assert f"--{next(iter(flag))}" in fault and "must be" in fault


def test_stage_1_samples_nothing():
    flags = UmedFlags(umed_stage="instruction_tuning", umed_rollout_server=URL)
    (fault,) = find_faults(flags, *llava_args(lora_enable=True))
    assert "no effect in --umed_stage instruction_tuning" in fault
