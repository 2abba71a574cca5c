"""The flags: all faults are named at once, a field says all that holds for a flag, and nothing heavy is imported."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import subprocess
import sys

import pytest
from support.llava_args import llava_args

from umed_plugin.errors import UsageError
from umed_plugin.flags.checks import check, find_faults, find_remarks
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.flags.names import SHIPPED_REWARDS
from umed_plugin.flags.needs import flag, rules_of
from umed_plugin.flags.rules import REWARDING, STAGES, Needs, Rules

# A valid judge, so that only the fault under test remains.
JUDGED = {"umed_judge": "openai:gpt", "umed_judge_base_url": "http://localhost:8000/v1"}


def test_defaults_fit_in_both_stages_and_without():
    for stage in (None, "instruction_tuning", "rewarding"):
        check(UmedFlags(umed_stage=stage), *llava_args())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"umed_num_candidates": 1}, "2 or more with grpo"),
        ({"umed_augment": True, "umed_feature_cache": "cache"}, "each epoch shows other pixels"),
        ({"umed_label_share": 1.0}, "must be above 0 and below 1"),
        ({"umed_rewards": "relevanc"}, "Did you mean 'relevance'"),
        ({"umed_rewards": "relevance,relevance"}, "twice"),
        ({"umed_reward_weights": "1,2"}, "2 numbers for the 3 rewards"),
        ({"umed_reward_weights": "a"}, "must be numbers"),
        ({"umed_reward_weights": "0,0,0"}, "at least one of them above 0"),
        ({"umed_reward_weights": "1,1,0..x"}, "must be numbers such as 1,0.5,1, or 0..1 (from 0"),
        ({"umed_reward_weights": "1,1,0..-1"}, "all must be 0 or more"),
        ({"umed_reward_weights": "1,1,0..1@2"}, "what follows @ is a share of the run"),
        ({"umed_reward_weights": "0..1,0,0..2"}, "At 0% of the run all are 0"),
        ({"umed_reward_weights": "1..0@0.5,0,0"}, "At 50% of the run all are 0"),
        ({"umed_reward_norm": "maxx"}, "Did you mean 'max'"),
        ({"umed_judge": "gpt"}, "must be lexical, classes, openai:MODEL or replay:FILE"),
        ({"umed_judge": "openai:"}, "must be lexical, classes, openai:MODEL or replay:FILE"),
        ({"umed_judge": "replay:/no/file.jsonl"}, "there is no such file"),
        ({"umed_judge_retries": 2}, "no effect without --umed_judge openai:MODEL"),
        ({"umed_judge_prompt": "prompt.txt"}, "no effect without --umed_judge openai:MODEL or replay:FILE"),
        ({"umed_judge_base_url": "localhost:8000", "umed_judge": "openai:gpt"}, "must be an address such as"),
        ({"umed_judge_base_url": "http://me:secret@host/v1", "umed_judge": "openai:gpt"}, "user name or password"),
        ({"umed_judge_prompt": "/no/prompt.txt", **JUDGED}, "there is no such file"),
        ({"umed_judge_prompt": os.__file__, **JUDGED}, "has no {reference}"),
        ({"umed_judge_options": "[1]", **JUDGED}, "must be a JSON object"),
        ({"umed_judge_options": '{"n": 2}', **JUDGED}, "must not set n; the plugin sets it. Remove it."),
        ({"umed_judge_budget": "5", **JUDGED}, "a number above 0 and a unit"),
        ({"umed_judge_budget": "5eur", **JUDGED}, "a number above 0 and a unit"),
        ({"umed_judge_budget": "5usd", **JUDGED}, "needs --umed_judge_prices"),
        ({"umed_judge_prices": "1", **JUDGED}, "must be two numbers"),
        ({"umed_judge_timeout": 0.0, **JUDGED}, "above 0"),
        ({"umed_judge_max_score": float("nan"), **JUDGED}, "above 0"),
        ({"umed_judge_patience": 0, **JUDGED}, "1 or more"),
        ({"umed_algorithm": "dpo"}, "Allowed: grpo, ppo"),
        ({"umed_value_coef": 0.5}, "no effect without --umed_algorithm ppo"),
        ({"umed_gamma": 1.1, "umed_algorithm": "ppo"}, "from 0 to 1"),
        ({"umed_value_clip_range": 0.5, "umed_algorithm": "ppo"}, "or --umed_minibatches_per_rollout above 1"),
        ({"umed_kl_target": 6.0, "umed_kl_coef": 0.0}, "no effect without --umed_kl_coef above 0"),
        ({"umed_kl_horizon": 10.0}, "no effect without --umed_kl_target"),
        ({"umed_kl_coef": -0.1}, "0 or more"),
        ({"umed_kl_coef": float("nan")}, "0 or more"),
        ({"umed_temperature": 0.0}, "above 0"),
        ({"umed_top_p": 1.5}, "must be 1."),
        (
            {"umed_top_p": 0.9},
            "lower --umed_temperature, which is exact. A run that was started with a nucleus goes on",
        ),
        ({"umed_clip_range": 1.0}, "below 1"),
        ({"umed_clip_range_high": 0.0, "umed_updates_per_rollout": 2}, "above 0"),
        ({"umed_clip_range_high": 0.28}, "no effect without --umed_updates_per_rollout or"),
        ({"umed_dynamic_sampling": -1}, "0 or more"),
        ({"umed_dynamic_sampling": 2, "umed_algorithm": "ppo"}, "no effect without --umed_algorithm grpo"),
        ({"umed_loss_aggregation": "bnpo"}, "Allowed: dapo, dr_grpo, grpo"),
        ({"umed_loss_aggregation": "dapo", "umed_algorithm": "ppo"}, "no effect without --umed_algorithm grpo"),
        ({"umed_advantage_scale": "none", "umed_algorithm": "ppo"}, "no effect without --umed_algorithm grpo"),
        ({"umed_vrr_layers": "--1"}, "must be all, last_half, or indices"),
        ({"umed_vrr_layers": "first"}, "must be all, last_half, or indices"),
        ({"umed_stock_template_share": 1.1}, "from 0 to 1"),
        ({"umed_box_decimals": 3}, "no effect without --umed_recipe"),
        ({"umed_data_root": "/"}, "no effect without --umed_recipe"),
        ({"umed_supervision_check_samples": 3}, "no effect in --umed_stage rewarding"),
        ({"umed_reward_floor": 0.2, "umed_reward_norm": "none"}, "no effect without --umed_reward_norm max"),
        ({"umed_reward_floor": 0.2, "umed_rewards": "relevance"}, "a reward that max normalises in --umed_rewards"),
        (
            {"umed_reward_floor": 0.2, "umed_num_candidates": 1, "umed_algorithm": "ppo"},
            "--umed_num_candidates above 1",
        ),
        (
            {"umed_reward_norm": "zscore", "umed_num_candidates": 1, "umed_algorithm": "ppo"},
            "no effect without --umed_num_candidates above 1",
        ),
        ({"umed_cut_off": "drop"}, "Allowed: keep, mask, penalise"),
        ({"umed_sampling_batch_size": 0}, "1 or more"),
        ({"umed_vrr_layers": "last_half", "umed_rewards": "relevance"}, "no effect without vision_relevance in"),
        ({"umed_clip_range": 0.3}, "no effect without --umed_updates_per_rollout or"),
        ({"umed_val_every": -1}, "0 or more"),
        ({"umed_vrr_heads": "-1"}, "must be all, or indices"),
        ({"umed_vrr_heads": "0,1", "umed_rewards": "relevance"}, "no effect without vision_relevance in"),
        ({"umed_vrr_mask_sinks": 0.5}, "0, or above 1"),
        ({"umed_vrr_mask_sinks": 20.0, "umed_rewards": "relevance"}, "no effect without vision_relevance in"),
        ({"umed_attention_loss": 0.03}, "no effect in --umed_stage rewarding, only in instruction_tuning"),
        ({"umed_val_records": 8}, "no effect without --umed_val_every"),
        ({"umed_val_pictures": 8}, "no effect without --umed_val_every"),
        ({"umed_rewards": "no_such_module:reward"}, "no module 'no_such_module'"),
        ({"umed_rewards": "math:no_such_function"}, "has no 'no_such_function'"),
        ({"umed_rewards": "math:pi"}, "is float and not a function"),
        ({"umed_rewards": "fractions:Fraction"}, "class whose objects cannot be called"),
        ({"umed_rewards": "json:dumps"}, "does not accept the arguments of a reward"),
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
        ({"data_path": None}, "no training data"),
        ({"data_path": "/no/file.json"}, "no such file"),
        ({"image_folder": "/no/folder"}, "no such folder"),
        ({"vision_tower": None}, "--vision_tower is missing"),
        ({"image_aspect_ratio": "anyres"}, "pad and square"),
        ({"lora_enable": True, "tune_mm_mlp_adapter": True}, "LLaVA then trains the projector alone"),
        ({"n_gpu": 2}, "one process drives 2 GPUs. Start one process per GPU: umed-run torchrun --nproc_per_node 2"),
        ({"auto_find_batch_size": True}, "--auto_find_batch_size does not work with --umed_stage rewarding"),
        ({"neftune_noise_alpha": 5.0}, "--neftune_noise_alpha 5.0 does not work with --umed_stage rewarding"),
    ],
)
def test_faults_between_our_flags_and_llavas(changes, words):
    faults = find_faults(UmedFlags(umed_stage="rewarding"), *llava_args(**changes))
    assert len(faults) == 1
    assert words in faults[0]


@pytest.mark.parametrize(
    "further",
    [
        {"umed_keep": "0.1"},
        {"umed_attention_loss": 0.03},
        {"umed_tower_teacher": __file__, "umed_tower_lr": 1e-5},
        {"umed_replay": 0.3},
    ],
)
def test_a_further_loss_of_stage_1_needs_one_process_per_gpu(further):
    flags = UmedFlags(umed_stage="instruction_tuning", **further)
    assert find_faults(flags, *llava_args(n_gpu=1)) == []
    (fault,) = find_faults(flags, *llava_args(n_gpu=2))
    assert fault.startswith(f"--{next(iter(further))}: one process drives 2 GPUs") and "CUDA_VISIBLE_DEVICES=0" in fault


def test_stage_1_alone_takes_what_stage_2_refuses():
    taken = llava_args(n_gpu=2, auto_find_batch_size=True, neftune_noise_alpha=5.0)
    assert find_faults(UmedFlags(umed_stage="instruction_tuning"), *taken) == []


OWN_REWARDS = """
class Made:
    def __call__(self, prompts, completions, **columns):
        return [0.0] * len(completions)

class Weighted(Made):
    def __init__(self, weight):
        self.weight = weight

class Narrow:
    def __call__(self, prompts, completions):
        return [0.0] * len(completions)

def with_columns(prompts, completions, record, **columns):
    return [0.0] * len(completions)

def trl_form(completions, **kwargs):
    return [0.0] * len(completions)

def with_labels(completions, labels, **kwargs):
    return [0.0] * len(completions)

async def waiting(completions, **kwargs):
    return [0.0] * len(completions)

class Normalised(Made):
    max_normalised = True

an_object, weighted, narrow = Made(), Weighted(2), Narrow()
"""


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("Made", None),
        ("an_object", None),
        ("weighted", None),
        ("with_columns", None),
        ("Weighted", "its __init__ requires some"),
        ("Narrow", "does not accept the arguments of a reward"),
        ("narrow", "does not accept the arguments of a reward"),
        ("narrow", "it does not take record, geometry, attention_on_lesion."),
        ("trl_form", None),
        ("with_labels", "it needs labels, which no reward is given."),
        ("waiting", "is an async function"),
    ],
)
def test_a_reward_of_ones_own_is_a_function_an_object_or_a_class_that_takes_columns(name, fault, tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(OWN_REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    faults = find_faults(UmedFlags(umed_stage="rewarding", umed_rewards=f"own_rewards:{name}"), *llava_args())
    assert [fault in found for found in faults] == ([True] if fault else []), faults


@pytest.mark.parametrize(("name", "fault"), [("Made", True), ("with_columns", True), ("Normalised", False)])
def test_a_floor_needs_a_reward_of_ones_own_that_is_normalised(name, fault, tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(OWN_REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    flags = UmedFlags(umed_stage="rewarding", umed_rewards=f"own_rewards:{name}", umed_reward_floor=0.2)
    found = find_faults(flags, *llava_args())
    assert ["--umed_reward_floor 0.2 has no effect" in each for each in found] == [True] * fault
    assert find_faults(dataclasses.replace(flags, umed_rewards=f"localization,own_rewards:{name}"), *llava_args()) == []


def test_the_key_of_the_judge_is_in_the_environment_or_the_server_is_ones_own(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    flags = UmedFlags(umed_stage="rewarding", umed_judge="openai:gpt")
    (fault,) = find_faults(flags, *llava_args())
    assert "OPENAI_API_KEY is not set" in fault
    assert find_faults(dataclasses.replace(flags, umed_judge_base_url="http://localhost:8000/v1"), *llava_args()) == []
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    assert find_faults(flags, *llava_args()) == []


def test_flags_that_act_together_and_rewards_of_ones_own_are_taken():
    check(
        UmedFlags(
            umed_stage="rewarding",
            umed_reward_floor=0.2,
            umed_vrr_layers="last_half",
            umed_updates_per_rollout=2,
            umed_clip_range=0.3,
            umed_clip_range_high=1.5,
            umed_loss_aggregation="dr_grpo",
            umed_advantage_scale="none",
            umed_rewards="vision_relevance,unittest.mock:Mock",
        ),
        *llava_args(),
    )


def test_layers_and_heads_of_vision_relevance_are_those_of_the_attention_loss_in_stage_1():
    of_stage_1 = {"umed_stage": "instruction_tuning", "umed_vrr_layers": "-1", "umed_rewards": "relevance"}
    faults = find_faults(UmedFlags(**of_stage_1), *llava_args())
    assert [fault.split()[0] for fault in faults] == ["--umed_rewards", "--umed_vrr_layers"]
    assert "no effect without vision_relevance in --umed_rewards (stage 2) or --umed_attention_loss" in faults[1]
    del of_stage_1["umed_rewards"]
    assert find_faults(UmedFlags(**of_stage_1), *llava_args()), "its default names vision_relevance, which is stage 2's"
    assert find_faults(UmedFlags(**of_stage_1, umed_vrr_heads="0", umed_attention_loss=0.03), *llava_args()) == []
    (fault,) = find_faults(UmedFlags(umed_stage="instruction_tuning", umed_attention_loss=-1.0), *llava_args())
    assert "0 or more" in fault


@pytest.mark.parametrize(
    ("algorithm", "changes", "remedy"),
    [("grpo", {"fsdp": ["full_shard"]}, "--deepspeed"), ("ppo", {"deepspeed": "zero2.json"}, "--umed_algorithm grpo")],
)
def test_stage_2_refuses_what_it_cannot_shard_and_says_what_works(algorithm, changes, remedy):
    (fault,) = find_faults(UmedFlags(umed_stage="rewarding", umed_algorithm=algorithm), *llava_args(**changes))
    assert f"--{next(iter(changes))}" in fault and remedy in fault
    assert find_faults(UmedFlags(umed_stage="instruction_tuning"), *llava_args(**changes)) == []
    assert find_faults(UmedFlags(umed_stage="rewarding"), *llava_args(deepspeed="zero3.json")) == []


@pytest.mark.parametrize("name", ["umed_keep", "umed_replay"])
def test_what_asks_for_the_output_layer_outside_the_pass_is_refused_with_zero_3(name, tmp_path):
    """Each rank would gather it as often as its own answers need, and wait for ever."""
    flags = UmedFlags(umed_stage="instruction_tuning", **{name: "0.1" if name == "umed_keep" else 0.2})
    for stage in (2, 3):
        file = tmp_path / f"zero{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        faults = find_faults(flags, *llava_args(deepspeed=str(file)))
        assert [f"--{name} does not work with ZeRO-3" in fault for fault in faults] == [True] * (stage == 3)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("as_text", [False, True], ids=["file", "base64"])
def test_a_learning_rate_of_its_own_is_refused_where_deepspeeds_file_undoes_it(stage, as_text, tmp_path):
    """DeepSpeed's own optimizer has all weights in one group, and its WarmupLR gives all groups one rate."""

    def refused(config):
        file = tmp_path / "zero2.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 2}, **config}))
        given = base64.urlsafe_b64encode(file.read_bytes()).decode() if as_text else str(file)
        tower = {"umed_tower_lr": 1e-6} if stage == "instruction_tuning" else {}
        args = llava_args(deepspeed=given, learning_rate=2e-4, mm_projector_lr=2e-5)
        faults = find_faults(UmedFlags(umed_stage=stage, **tower), *args)
        assert all("Remove optimizer and scheduler from the file" in fault for fault in faults)
        return [fault.split()[0] for fault in faults]

    both = ["--umed_tower_lr", "--mm_projector_lr"][stage == "rewarding" :]
    assert refused({"optimizer": {"type": "AdamW"}}) == refused({"scheduler": {"type": "WarmupLR"}}) == both
    assert refused({}) == refused({"scheduler": {"type": "WarmupCosineLR"}}) == []
    (tmp_path / "zero2.json").write_text(json.dumps({"optimizer": {"type": "AdamW"}}))
    alike = llava_args(deepspeed=str(tmp_path / "zero2.json"), learning_rate=2e-4, mm_projector_lr=2e-4)
    assert find_faults(UmedFlags(umed_stage=stage), *alike) == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_rate_that_deepspeed_undoes_is_only_said_of_a_run_that_goes_on(stage, tmp_path):
    """Its optimizer fits no other file and no other rate, so a refusal would leave no way on."""
    (tmp_path / "zero3.json").write_text('{"optimizer": {"type": "AdamW"}}')
    args = llava_args(deepspeed=str(tmp_path / "zero3.json"), learning_rate=2e-4, mm_projector_lr=2e-5)
    (fault,) = find_faults(UmedFlags(umed_stage=stage), *args)
    assert "give --mm_projector_lr the value of --learning_rate, or leave it out" in fault
    assert find_remarks(UmedFlags(umed_stage=stage), args[2]) == []
    assert find_faults(UmedFlags(umed_stage=stage), *args, goes_on=True) == []
    (remark,) = find_remarks(UmedFlags(umed_stage=stage), args[2], goes_on=True)
    assert remark.startswith("--mm_projector_lr 2e-05 has no effect") and "The run goes on as it began" in remark


@pytest.mark.parametrize("stage", STAGES)
def test_what_accelerate_launch_switches_on_behind_the_flags_is_refused(stage, monkeypatch):
    flags = UmedFlags(umed_stage=stage)
    (fault,) = find_faults(flags, *llava_args(deepspeed_plugin=object()))
    assert "give its file with --deepspeed, and start the script with torchrun or deepspeed" in fault
    assert "an earlier training in this process" in fault and "unset ACCELERATE_USE_DEEPSPEED" in fault
    assert find_faults(flags, *llava_args(deepspeed_plugin=object(), deepspeed="zero2.json")) == []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    (fault,) = find_faults(flags, *llava_args())
    assert fault.startswith("ACCELERATE_USE_FSDP is true") and "--deepspeed with ZeRO-3" in fault
    assert "an earlier training in this process" in fault and "unset ACCELERATE_USE_FSDP" in fault


def test_labels_cannot_be_smoothed_in_stage_1():
    (fault,) = find_faults(UmedFlags(umed_stage="instruction_tuning"), *llava_args(label_smoothing_factor=0.1))
    assert fault.startswith("--label_smoothing_factor does not work with LLaVA")


@pytest.mark.parametrize(
    ("stage", "instead"), [("rewarding", "--umed_val_every"), ("instruction_tuning", "--umed_val_every")]
)
def test_evaluations_without_an_evaluation_set_are_refused(stage, instead):
    from transformers.trainer_utils import IntervalStrategy

    for strategy in ("steps", "epoch", IntervalStrategy.STEPS):
        (fault,) = find_faults(UmedFlags(umed_stage=stage), *llava_args(evaluation_strategy=strategy))
        assert f"--evaluation_strategy {getattr(strategy, 'value', strategy)}" in fault and instead in fault
    assert find_faults(UmedFlags(umed_stage=stage), *llava_args(evaluation_strategy=IntervalStrategy.NO)) == []
    (fault,) = find_faults(UmedFlags(umed_stage=stage), *llava_args(eval_on_start=True))
    assert "--eval_on_start True" in fault and instead in fault
    (fault,) = find_faults(UmedFlags(umed_stage=stage), *llava_args(save_strategy="best"))
    assert fault.startswith("--save_strategy best: saves after an evaluation") and "--umed_stop_after" in fault


def test_all_faults_come_at_once():
    flags = UmedFlags(umed_stage="rewarding", umed_num_candidates=0, umed_top_p=0.0, umed_kl_coef=-1.0)
    assert len(find_faults(flags, *llava_args(vision_tower=None))) == 4


def test_an_unknown_stage_is_named_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'rewarding'"):
        check(UmedFlags(umed_stage="rewardin"), *llava_args())


def test_flags_without_a_stage_are_refused():
    faults = find_faults(UmedFlags(umed_num_candidates=4, umed_tower_weights="original"), *llava_args())
    assert [fault.split()[0] for fault in faults] == ["--umed_tower_weights", "--umed_num_candidates"]


def test_every_flag_has_help_a_stage_and_a_default_that_its_own_rules_allow():
    for field in dataclasses.fields(UmedFlags):
        rules = rules_of(field)
        assert len(field.metadata["help"]) > 20
        assert rules.stage in (None, *STAGES)
        assert rules.value_fault(field.name, field.default) is None


@dataclasses.dataclass
class OneMore(UmedFlags):
    """The flags and two new ones, each added only by its field."""

    umed_new: float = flag(
        0.5,
        "A number.",
        stage=REWARDING,
        least=0,
        most=1,
        needs=Needs("--umed_temperature below 1", lambda f: f.umed_temperature < 1),
    )
    umed_mode: str = flag("near", "Which one.", choices=("near", "far"))


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({"umed_temperature": 0.9, "umed_new": 0.7, "umed_mode": "far"}, []),
        ({"umed_new": 0.7}, ["--umed_new has no effect without --umed_temperature below 1."]),
        ({"umed_new": 1.5, "umed_temperature": 0.9}, ["--umed_new 1.5: must be from 0 to 1."]),
        ({"umed_mode": "fahr"}, ["--umed_mode: unknown value 'fahr'. Did you mean 'far'? Allowed: far, near."]),
        (
            {"umed_stage": "instruction_tuning", "umed_new": 0.7},
            ["--umed_new has no effect in --umed_stage instruction_tuning, only in rewarding. Remove it."],
        ),
        (
            {"umed_stage": None, "umed_new": 0.7, "umed_mode": "far"},
            [
                "--umed_new has no effect without --umed_stage. Add --umed_stage rewarding.",
                "--umed_mode has no effect without --umed_stage. Add --umed_stage instruction_tuning or rewarding.",
            ],
        ),
    ],
)
def test_a_new_flag_is_its_field_and_nothing_else(changes, faults):
    assert find_faults(OneMore(**{"umed_stage": "rewarding", **changes}), *llava_args()) == faults
    words = {flag.name: flag.metadata["help"] for flag in dataclasses.fields(OneMore)}
    assert words["umed_new"] == "A number. Must be from 0 to 1. Needs --umed_temperature below 1."


def test_argparse_gets_the_help_text_alone():
    """transformers hands all metadata to argparse, which refuses unknown keys and acts on known ones such as choices."""
    from transformers import HfArgumentParser

    assert {key for flag in dataclasses.fields(UmedFlags) for key in flag.metadata} == {"help"}
    parser = HfArgumentParser(UmedFlags)
    (flags,) = parser.parse_args_into_dataclasses(["--umed_algorithm", "dpo", "--umed_top_p", "0.5"])
    assert (flags.umed_algorithm, flags.umed_top_p) == ("dpo", 0.5), "our own check names this fault, with all others"
    words = " ".join(parser.format_help().split())
    assert "Discount of later rewards (LLaVA-RLHF: 1). Must be from 0 to 1. Needs --umed_algorithm ppo." in words


@pytest.mark.parametrize(
    ("rules", "words", "allowed", "refused"),
    [
        ({"least": 0}, "0 or more", (0, 0.5, 7), (-1, float("inf"), float("nan"))),
        ({"least": 0, "most": 1}, "from 0 to 1", (0, 0.5, 1), (-0.1, 1.1)),
        ({"above": 0}, "above 0", (0.1, 7), (0, -1, float("inf"))),
        ({"above": 0, "below": 1}, "above 0 and below 1", (0.1, 0.9), (0, 1)),
        ({"above": 0, "most": 1}, "above 0 and at most 1", (0.1, 1), (0, 1.1)),
        ({"above": 1, "or_zero": True}, "0, or above 1", (0, 1.1), (0.5, 1, -1)),
        ({}, "", (-1, 0, float("nan")), ()),
    ],
)
def test_bounds_are_checked_as_their_words_say(rules, words, allowed, refused):
    rules = Rules(**rules)
    assert rules.range_words() == words
    for value in (None, *allowed):
        assert rules.value_fault("umed_x", value) is None
    for value in refused:
        assert rules.value_fault("umed_x", value) == f"--umed_x {value}: must be {words}."


def test_lists_are_parsed():
    flags = UmedFlags(umed_rewards="relevance, localization", umed_reward_weights="1,0.5", umed_vrr_layers="-1,0")
    assert flags.reward_names() == ["relevance", "localization"]
    assert flags.reward_weights() == [1.0, 0.5]
    changing = UmedFlags(umed_reward_weights="4,0.5..1.5,2..0@0.5")
    assert [changing.reward_weights(progress) for progress in (0, 0.25, 0.5, 1)] == [
        [4.0, 0.5, 2.0],
        [4.0, 0.75, 1.0],
        [4.0, 1.0, 0.0],
        [4.0, 1.5, 0.0],
    ]
    assert flags.vrr_layer_indices(4) == [0, 3]
    assert UmedFlags(umed_vrr_layers="last_half").vrr_layer_indices(5) == [2, 3, 4]
    assert UmedFlags().vrr_layer_indices(2) == [0, 1]
    with pytest.raises(UsageError, match="4 layers"):
        UmedFlags(umed_vrr_layers="4").vrr_layer_indices(4)
    assert UmedFlags(umed_vrr_mask_sinks=64.0).vrr_sink_ratio(4096) == 64
    with pytest.raises(UsageError, match="--umed_vrr_mask_sinks 65 has no effect: .* 4096 values.* to 64.0"):
        UmedFlags(umed_vrr_mask_sinks=65.0).vrr_sink_ratio(4096)


def test_importing_flags_patching_and_patches_imports_no_heavy_library():
    code = (
        "import sys, umed_plugin.flags.checks, umed_plugin.patches, umed_plugin.patching; "
        "print([m for m in ('torch', 'transformers', 'llava', 'numpy', 'monai') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_what_is_allowed_but_not_what_one_may_expect_is_said():
    _, _, training_args = llava_args()
    assert find_remarks(UmedFlags(umed_stage="rewarding"), training_args) == []
    training_args.group_by_modality_length, training_args.label_smoothing_factor = True, 0.1
    remarks = find_remarks(UmedFlags(umed_stage="rewarding"), training_args)
    assert [remark.split()[0] for remark in remarks] == [
        "--group_by_modality_length",
        "--label_smoothing_factor",
    ]
    pictures = UmedFlags(umed_stage="rewarding", umed_val_every=5, umed_val_pictures=8)
    assert find_remarks(pictures, training_args)[2].startswith("--umed_val_pictures has no effect without --report_to")
    training_args.report_to = ["tensorboard"]
    assert len(find_remarks(pictures, training_args)) == 2


def test_pictures_that_nothing_shows_are_said_in_stage_1_too():
    _, _, training_args = llava_args(report_to=[], group_by_modality_length=True)
    flags = UmedFlags(umed_stage="instruction_tuning", umed_val_every=5, umed_val_pictures=9)
    (remark,) = find_remarks(flags, training_args)
    assert remark.startswith("--umed_val_pictures has no effect without --report_to")


def test_the_losses_of_replay_take_a_number_of_rows():
    flags = UmedFlags(umed_stage="instruction_tuning", umed_replay=0.3, umed_logit_rows=256)
    assert find_faults(flags, *llava_args()) == []


def test_shipped_rewards_that_max_normalises_are_those_that_the_floor_acts_on():
    from umed_plugin.rewards import REWARDS

    for name in SHIPPED_REWARDS:
        flags = UmedFlags(umed_stage="rewarding", umed_rewards=name, umed_reward_floor=0.2)
        normalised = name != "relevance" and getattr(REWARDS.get(name), "max_normalised", False)
        assert (find_faults(flags, *llava_args()) == []) == normalised, name
