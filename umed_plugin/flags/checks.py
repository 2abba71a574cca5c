"""The one check of all flags, before the model is loaded: what has no effect, what is out of range, what LLaVA's flags forbid.

Like `umed_plugin.flags.definition`, whose dataclass it checks, this imports the standard library alone.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable
from typing import Any

from umed_plugin.errors import UsageError, unknown_name
from umed_plugin.flags.definition import REWARDING, STAGES, TUNING, UmedFlags
from umed_plugin.flags.rewards import LOCAL_JUDGES, find_judge_faults, find_reward_faults, judge_kind

# Flags that act in one stage alone; the others act in both.
_ONLY_TUNING = ("umed_supervision_check_samples",)
_ONLY_PPO = (
    "umed_value_coef",
    "umed_value_clip_range",
    "umed_value_learning_rate",
    "umed_gamma",
    "umed_gae_lambda",
)
_ONLY_MODEL_JUDGE = ("umed_judge_prompt", "umed_judge_options", "umed_judge_max_score", "umed_judge_patience")
_ONLY_SERVER = (
    "umed_judge_base_url",
    "umed_judge_ledger",
    "umed_judge_concurrency",
    "umed_judge_timeout",
    "umed_judge_retries",
    "umed_judge_budget",
    "umed_judge_prices",
)
_ONLY_REWARDING = (
    "umed_algorithm",
    "umed_num_candidates",
    "umed_rewards",
    "umed_reward_weights",
    "umed_reward_norm",
    "umed_reward_floor",
    "umed_judge",
    *_ONLY_MODEL_JUDGE,
    *_ONLY_SERVER,
    "umed_reward_coef",
    "umed_advantage_scale",
    "umed_kl_coef",
    "umed_clip_range",
    "umed_entropy_coef",
    "umed_updates_per_rollout",
    "umed_minibatches_per_rollout",
    "umed_kl_target",
    "umed_kl_horizon",
    *_ONLY_PPO,
    "umed_vrr_layers",
    "umed_vrr_heads",
    "umed_vrr_mask_sinks",
    "umed_packed",
    "umed_max_new_tokens",
    "umed_temperature",
    "umed_top_p",
    "umed_log_candidates",
    "umed_feature_cache",
    "umed_val_every",
    "umed_val_records",
)
# Flags that act only under another flag's value: flag -> (test of the flags, what the test needs, in words).
_NEEDS: dict[str, tuple[Callable[[UmedFlags], bool], str]] = {
    "umed_reward_floor": (lambda flags: flags.umed_reward_norm == "max", "--umed_reward_norm max"),
    "umed_judge": (lambda flags: "relevance" in flags.reward_names(), "relevance in --umed_rewards"),
    **dict.fromkeys(
        _ONLY_MODEL_JUDGE,
        (lambda flags: judge_kind(flags) not in LOCAL_JUDGES, "--umed_judge openai:MODEL or replay:FILE"),
    ),
    **dict.fromkeys(
        _ONLY_SERVER,
        (lambda flags: judge_kind(flags) == "openai", "--umed_judge openai:MODEL"),
    ),
    **{
        f"umed_vrr_{name}": (
            lambda flags: "vision_relevance" in flags.reward_names(),
            "vision_relevance in --umed_rewards",
        )
        for name in ("layers", "heads", "mask_sinks")
    },
    **dict.fromkeys(_ONLY_PPO, (lambda flags: flags.umed_algorithm == "ppo", "--umed_algorithm ppo")),
    "umed_advantage_scale": (lambda flags: flags.umed_algorithm == "grpo", "--umed_algorithm grpo"),
    # On the first update the probability ratio is 1 and the value the old one, whatever the range.
    "umed_clip_range": (
        lambda flags: flags.umed_updates_per_rollout * flags.umed_minibatches_per_rollout > 1,
        "--umed_updates_per_rollout or --umed_minibatches_per_rollout above 1",
    ),
    "umed_value_clip_range": (
        lambda flags: (
            flags.umed_algorithm == "ppo" and flags.umed_updates_per_rollout * flags.umed_minibatches_per_rollout > 1
        ),
        "--umed_algorithm ppo, and --umed_updates_per_rollout or --umed_minibatches_per_rollout above 1",
    ),
    "umed_kl_target": (lambda flags: flags.kl_coef() > 0, "--umed_kl_coef above 0"),
    "umed_kl_horizon": (lambda flags: flags.umed_kl_target is not None, "--umed_kl_target"),
    "umed_val_records": (lambda flags: flags.umed_val_every > 0, "--umed_val_every"),
    "umed_image_cache_gb": (lambda flags: flags.umed_image_cache is not None, "--umed_image_cache"),
    "umed_data_root": (lambda flags: flags.umed_recipe is not None, "--umed_recipe"),
    "umed_box_decimals": (
        lambda flags: flags.umed_recipe is not None,
        "--umed_recipe: the records of --data_path are written already",
    ),
}
STAGES_OF = {**dict.fromkeys(_ONLY_TUNING, (TUNING,)), **dict.fromkeys(_ONLY_REWARDING, (REWARDING,))}

# What a number may be: flag -> (test, words for the error message).
_AT_LEAST_0 = (lambda value: value >= 0, "0 or more")
_AT_LEAST_1 = (lambda value: value >= 1, "1 or more")
_ABOVE_0 = (lambda value: value > 0, "above 0")
_SHARE = (lambda value: 0 <= value <= 1, "from 0 to 1")
_RANGES = {
    "umed_stock_template_share": _SHARE,
    "umed_supervision_check_samples": _AT_LEAST_0,
    "umed_num_candidates": _AT_LEAST_1,
    "umed_reward_floor": _SHARE,
    "umed_reward_coef": _ABOVE_0,
    "umed_kl_coef": _AT_LEAST_0,
    "umed_clip_range": (lambda value: 0 < value < 1, "above 0 and below 1"),
    "umed_entropy_coef": _AT_LEAST_0,
    "umed_kl_target": _ABOVE_0,
    "umed_kl_horizon": _ABOVE_0,
    "umed_value_coef": _ABOVE_0,
    "umed_value_clip_range": _ABOVE_0,
    "umed_value_learning_rate": _ABOVE_0,
    "umed_gamma": _SHARE,
    "umed_gae_lambda": _SHARE,
    "umed_minibatches_per_rollout": _AT_LEAST_1,
    "umed_updates_per_rollout": _AT_LEAST_1,
    "umed_max_new_tokens": _AT_LEAST_1,
    "umed_temperature": _ABOVE_0,
    "umed_top_p": (lambda value: 0 < value <= 1, "above 0 up to 1"),
    "umed_log_candidates": _AT_LEAST_0,
    "umed_judge_max_score": _ABOVE_0,
    "umed_judge_concurrency": _AT_LEAST_1,
    "umed_judge_timeout": _ABOVE_0,
    "umed_judge_retries": _AT_LEAST_0,
    "umed_judge_patience": _AT_LEAST_1,
    "umed_vrr_mask_sinks": (lambda value: value == 0 or value > 1, "0, or above 1"),
    "umed_image_cache_gb": _ABOVE_0,
    "umed_val_every": _AT_LEAST_0,
    "umed_val_records": _AT_LEAST_1,
    "umed_box_decimals": (lambda value: value in (2, 3), "2 or 3"),
}
_CHOICES = {
    "umed_on_bad_image": ("stop", "skip"),
    "umed_tower_weights": ("checkpoint", "original"),
    "umed_algorithm": ("grpo", "ppo"),
    "umed_reward_norm": ("max", "none", "zscore"),
    "umed_advantage_scale": ("group", "batch"),
}


def find_faults(
    flags: UmedFlags, model_args: Any, data_args: Any, training_args: Any, *, files: bool = True
) -> list[str]:
    """Everything that is wrong with the flags, as sentences; empty when they fit together.

    Args:
        flags: of the plugin.
        model_args, data_args, training_args: LLaVA's.
        files: the files and folders that the flags name have to be there.
    """
    if flags.umed_stage is not None and flags.umed_stage not in STAGES:
        return [f"--umed_stage: {unknown_name('stage', flags.umed_stage, STAGES)}"]
    return [
        *_flags_without_effect(flags),
        *_values(flags),
        *find_reward_faults(flags, imported=flags.umed_stage == REWARDING),
        *(find_judge_faults(flags) if flags.umed_stage == REWARDING else []),
        *(_files(flags, data_args) if flags.umed_stage and files else []),
        *(_inputs(flags, model_args, data_args, training_args) if flags.umed_stage else []),
    ]


def check(flags: UmedFlags, model_args: Any, data_args: Any, training_args: Any) -> None:
    """Refuse flags that cannot work, all faults at once.

    Raises:
        UsageError: with one line for each fault.
    """
    raise_faults(find_faults(flags, model_args, data_args, training_args))


def raise_faults(faults: list[str]) -> None:
    """Raise one UsageError that lists ``faults``, unless there are none."""
    if faults:
        raise UsageError("the training flags cannot work:\n" + "\n".join(f"  - {fault}" for fault in faults))


def _flags_without_effect(flags: UmedFlags) -> list[str]:
    """A flag that was set and would be ignored is a misunderstanding, so it is a fault."""
    faults = []
    for flag in dataclasses.fields(flags):
        stages = STAGES_OF.get(flag.name, STAGES)
        changed = getattr(flags, flag.name) != flag.default
        if not changed:
            continue
        if flags.umed_stage in stages:
            acts, needed = _NEEDS.get(flag.name, (None, ""))
            if acts is not None and not acts(flags):
                faults.append(f"--{flag.name} has no effect without {needed}.")
        elif flags.umed_stage is None:
            faults.append(f"--{flag.name} has no effect without --umed_stage. Add --umed_stage {' or '.join(stages)}.")
        else:
            faults.append(
                f"--{flag.name} has no effect in --umed_stage {flags.umed_stage}, only in "
                f"{' and '.join(stages)}. Leave it out."
            )
    return faults


def _values(flags: UmedFlags) -> list[str]:
    faults = []
    for name, allowed in _CHOICES.items():
        if getattr(flags, name) not in allowed:
            faults.append(f"--{name}: {unknown_name('value', str(getattr(flags, name)), allowed)}")
    for name, (fits, words) in _RANGES.items():
        value = getattr(flags, name)
        if value is not None and not (math.isfinite(value) and fits(value)):
            faults.append(f"--{name} {value}: must be {words}.")
    if flags.umed_algorithm == "grpo" and flags.umed_num_candidates == 1:
        faults.append("--umed_num_candidates 1: must be 2 or more with grpo (a group of one has no advantage).")
    parts = flags.umed_vrr_layers.split(",")
    if flags.umed_vrr_layers not in ("all", "last_half") and not all(
        re.fullmatch(r"\s*-?\d+\s*", part) for part in parts
    ):
        faults.append(
            f"--umed_vrr_layers {flags.umed_vrr_layers!r}: must be all, last_half, or indices such as 16,20,-1."
        )
    if flags.umed_vrr_heads != "all" and not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", flags.umed_vrr_heads):
        faults.append(f"--umed_vrr_heads {flags.umed_vrr_heads!r}: must be all, or indices such as 0,3,17.")
    return faults


def _files(flags: UmedFlags, data_args: Any) -> list[str]:
    faults = []
    if flags.umed_recipe is None and data_args.data_path is None:
        faults.append("there is nothing to train on: give --umed_recipe or --data_path.")
    if data_args.data_path is not None and not os.path.isfile(data_args.data_path):
        faults.append(f"--data_path {data_args.data_path}: there is no such file.")
    if data_args.image_folder is not None and not os.path.isdir(data_args.image_folder):
        faults.append(f"--image_folder {data_args.image_folder}: there is no such folder.")
    if flags.umed_data_root is not None and not os.path.isdir(flags.umed_data_root):
        faults.append(f"--umed_data_root {flags.umed_data_root}: there is no such folder.")
    for name in ("umed_feature_cache", "umed_image_cache"):
        folder = getattr(flags, name)
        if folder is not None and os.path.isfile(folder):
            faults.append(f"--{name} {folder}: is a file. Give a folder; it is made if need be.")
    return faults


def _inputs(flags: UmedFlags, model_args: Any, data_args: Any, training_args: Any) -> list[str]:
    """Faults between our flags and LLaVA's own."""
    faults = []
    if model_args.vision_tower is None:
        faults.append(
            "--vision_tower is missing: both stages train on images. LLaVA-Med 1.5: openai/clip-vit-large-patch14-336."
        )
    if data_args.image_aspect_ratio not in ("pad", "square"):
        faults.append(
            f"--image_aspect_ratio {data_args.image_aspect_ratio}: boxes are defined for pad and square (LLaVA's default)."
        )
    if flags.umed_stage == REWARDING:
        if training_args.fsdp:
            faults.append(
                "--fsdp does not work with --umed_stage rewarding: sampling answers needs whole weights in every process. Leave "
                "--fsdp out, or use --deepspeed with ZeRO-3, which slices the weights as well."
            )
        if training_args.deepspeed and flags.umed_algorithm == "ppo":
            faults.append(
                "--deepspeed does not work with --umed_algorithm ppo: the value network lies outside of the model that DeepSpeed "
                "trains. Use --umed_algorithm grpo, or leave --deepspeed out and start the script with torchrun."
            )
        strategy = training_args.evaluation_strategy  # an enumeration of texts
        if strategy != "no":
            faults.append(
                f"--evaluation_strategy {getattr(strategy, 'value', strategy)}: "
                "stage 2 has no evaluation set of LLaVA's. Leave it at no; --umed_val_every N answers held-out records every N "
                "steps."
            )
    return faults
