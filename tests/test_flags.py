"""The flags: every fault named at once, and nothing heavy imported."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest

from umed_plugin.errors import UsageError
from umed_plugin.flags import STAGES_OF, UmedFlags, check, find_faults


def llava_args(**changes):
    """LLaVA's three argument objects in one, as they are in a run that works."""
    stock = {
        "data_path": __file__,
        "image_folder": None,
        "image_aspect_ratio": "pad",
        "vision_tower": "tower",
        "deepspeed": None,
        "fsdp": [],
    }
    return [SimpleNamespace(**{**stock, **changes})] * 3


def test_defaults_fit_in_both_stages_and_without():
    for stage in (None, "instruction_tuning", "rewarding"):
        check(UmedFlags(umed_stage=stage), *llava_args())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"umed_num_candidates": 1}, "2 or more"),
        ({"umed_rewards": "relevanc"}, "Did you mean 'relevance'"),
        ({"umed_rewards": "relevance,relevance"}, "twice"),
        ({"umed_reward_weights": "1,2"}, "2 numbers for the 3 rewards"),
        ({"umed_reward_weights": "a"}, "must be numbers"),
        ({"umed_reward_weights": "0,0,0"}, "one of them above 0"),
        ({"umed_reward_norm": "maxx"}, "Did you mean 'max'"),
        ({"umed_algorithm": "ppo"}, "Allowed: grpo"),
        ({"umed_judge": "openai:gpt"}, "Allowed: lexical"),
        ({"umed_kl_coef": -0.1}, "0 or more"),
        ({"umed_kl_coef": float("nan")}, "0 or more"),
        ({"umed_temperature": 0.0}, "above 0"),
        ({"umed_top_p": 1.5}, "up to 1"),
        ({"umed_clip_range": 1.0}, "below 1"),
        ({"umed_vrr_layers": "--1"}, "must be all, last_half, or indices"),
        ({"umed_vrr_layers": "first"}, "must be all, last_half, or indices"),
        ({"umed_stock_template_share": 1.1}, "from 0 to 1"),
        ({"umed_box_decimals": 3}, "no effect without --umed_recipe"),
        ({"umed_data_root": "/"}, "no effect without --umed_recipe"),
        ({"umed_supervision_check_samples": 3}, "no effect in --umed_stage rewarding"),
        ({"umed_reward_floor": 0.2, "umed_reward_norm": "none"}, "no effect without --umed_reward_norm max"),
        ({"umed_vrr_layers": "last_half", "umed_rewards": "relevance"}, "no effect without vision_relevance in"),
        ({"umed_clip_range": 0.3}, "no effect without --umed_updates_per_rollout above 1"),
        ({"umed_rewards": "no_such_module:reward"}, "no module 'no_such_module'"),
        ({"umed_rewards": "math:no_such_function"}, "has no 'no_such_function'"),
        ({"umed_rewards": "math:pi"}, "is float and no function"),
    ],
)
def test_each_fault_is_named(changes, words):
    with pytest.raises(UsageError) as caught:
        check(UmedFlags(umed_stage="rewarding", **changes), *llava_args())
    assert words in str(caught.value)
    assert f"--{next(iter(changes))}" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_path": None}, "nothing to train on"),
        ({"data_path": "/no/file.json"}, "no such file"),
        ({"image_folder": "/no/folder"}, "no such folder"),
        ({"vision_tower": None}, "--vision_tower is missing"),
        ({"image_aspect_ratio": "anyres"}, "pad and square"),
    ],
)
def test_faults_between_our_flags_and_llavas(changes, words):
    faults = find_faults(UmedFlags(umed_stage="rewarding"), *llava_args(**changes))
    assert len(faults) == 1
    assert words in faults[0]


def test_flags_that_act_together_and_rewards_of_ones_own_are_taken():
    check(
        UmedFlags(
            umed_stage="rewarding",
            umed_reward_floor=0.2,
            umed_vrr_layers="last_half",
            umed_updates_per_rollout=2,
            umed_clip_range=0.3,
            umed_rewards="vision_relevance,math:fsum",
        ),
        *llava_args(),
    )


@pytest.mark.parametrize("changes", [{"deepspeed": "zero3.json"}, {"fsdp": ["full_shard"]}])
def test_stage_2_refuses_sharded_weights_and_says_how_to_start(changes):
    (fault,) = find_faults(UmedFlags(umed_stage="rewarding"), *llava_args(**changes))
    assert f"--{next(iter(changes))}" in fault and "python or torchrun" in fault
    assert find_faults(UmedFlags(umed_stage="instruction_tuning"), *llava_args(**changes)) == []


def test_all_faults_come_at_once():
    flags = UmedFlags(umed_stage="rewarding", umed_num_candidates=0, umed_top_p=0.0, umed_kl_coef=-1.0)
    assert len(find_faults(flags, *llava_args(vision_tower=None))) == 4


def test_an_unknown_stage_is_named_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'rewarding'"):
        check(UmedFlags(umed_stage="rewardin"), *llava_args())


def test_flags_without_a_stage_are_refused():
    faults = find_faults(UmedFlags(umed_num_candidates=4, umed_tower_weights="original"), *llava_args())
    assert [fault.split()[0] for fault in faults] == ["--umed_tower_weights", "--umed_num_candidates"]


def test_every_flag_has_help_and_the_stage_lists_name_flags():
    names = {flag.name for flag in dataclasses.fields(UmedFlags)}
    assert set(STAGES_OF) <= names
    assert all(len(flag.metadata["help"]) > 20 for flag in dataclasses.fields(UmedFlags))


def test_lists_are_parsed():
    flags = UmedFlags(umed_rewards="relevance, localization", umed_reward_weights="1,0.5", umed_vrr_layers="-1,0")
    assert flags.reward_names() == ["relevance", "localization"]
    assert flags.reward_weights() == [1.0, 0.5]
    assert flags.vrr_layer_indices(4) == [0, 3]
    assert UmedFlags(umed_vrr_layers="last_half").vrr_layer_indices(5) == [2, 3, 4]
    assert UmedFlags().vrr_layer_indices(2) == [0, 1]
    with pytest.raises(UsageError, match="4 layers"):
        UmedFlags(umed_vrr_layers="4").vrr_layer_indices(4)


def test_importing_flags_patching_and_patches_imports_no_heavy_library():
    code = (
        "import sys, umed_plugin.flags, umed_plugin.patches, umed_plugin.patching; "
        "print([m for m in ('torch', 'transformers', 'llava', 'numpy', 'monai') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
