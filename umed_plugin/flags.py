"""The ``--umed_*`` flags of LLaVA's training scripts: one dataclass, and one check that runs before the model is loaded.

The paper (arXiv 2501.01377) publishes no hyper-parameters, so every default here is our own choice and not the paper's.
Where a default comes from other work, its help text says from which.

How to run: ``umed-run bash finetune.sh --umed_stage instruction_tuning --umed_recipe NAME`` (see `umed_plugin.launch`).
Without ``--umed_stage`` LLaVA trains as if the plugin were not there, and any other ``--umed_*`` flag is refused.

Departures from the paper: the algorithm is GRPO unless asked for (PPO is the paper's), and the reward terms carry weights.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

from umed_plugin.errors import UsageError, unknown_name
from umed_plugin.reward_flags import (
    DEFAULT_OPTIONS,
    LOCAL_JUDGES,
    PAPER_REWARDS,
    find_judge_faults,
    find_reward_faults,
    judge_kind,
)

STAGES = ("instruction_tuning", "rewarding")
TUNING, REWARDING = STAGES

# Flags that act in one stage alone; the others act in both.
_ONLY_TUNING = ("umed_supervision_check_samples",)
_ONLY_PPO = (
    "umed_value_coef",
    "umed_value_clip_range",
    "umed_value_learning_rate",
    "umed_gamma",
    "umed_gae_lambda",
)
_ONLY_REWARDING = (
    "umed_algorithm",
    "umed_num_candidates",
    "umed_rewards",
    "umed_reward_weights",
    "umed_reward_norm",
    "umed_reward_floor",
    "umed_judge",
    "umed_judge_base_url",
    "umed_judge_prompt",
    "umed_judge_options",
    "umed_judge_max_score",
    "umed_judge_ledger",
    "umed_judge_concurrency",
    "umed_judge_timeout",
    "umed_judge_retries",
    "umed_judge_budget",
    "umed_judge_prices",
    "umed_judge_patience",
    "umed_reward_coef",
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
        ("umed_judge_prompt", "umed_judge_options", "umed_judge_max_score", "umed_judge_patience"),
        (lambda flags: judge_kind(flags) not in LOCAL_JUDGES, "--umed_judge openai:MODEL or replay:FILE"),
    ),
    **dict.fromkeys(
        (
            "umed_judge_base_url",
            "umed_judge_ledger",
            "umed_judge_concurrency",
            "umed_judge_timeout",
            "umed_judge_retries",
            "umed_judge_budget",
            "umed_judge_prices",
        ),
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
    "umed_data_root": (lambda flags: flags.umed_recipe is not None, "--umed_recipe"),
    "umed_box_decimals": (
        lambda flags: flags.umed_recipe is not None,
        "--umed_recipe: the records of --data_path are written already",
    ),
}
STAGES_OF = {**dict.fromkeys(_ONLY_TUNING, (TUNING,)), **dict.fromkeys(_ONLY_REWARDING, (REWARDING,))}


def _flag(default: Any, help_text: str) -> Any:
    """A dataclass field with help text (transformers hands all metadata on to argparse)."""
    return field(default=default, metadata={"help": help_text})


@dataclass
class UmedFlags:
    """Flags that `umed_plugin.patches.train_arguments` adds to LLaVA's TrainingArguments; ``args.umed`` gives them back."""

    umed_stage: Optional[str] = _flag(
        None, "instruction_tuning (stage 1) or rewarding (stage 2). Not given: plain LLaVA."
    )
    umed_recipe: Optional[str] = _flag(
        None, "Recipe name or YAML file to build the records from, instead of --data_path or added to it."
    )
    umed_data_root: Optional[str] = _flag(None, "Folder that holds the recipe's data set. Needs --umed_recipe.")
    umed_box_decimals: int = _flag(2, "Decimals of box coordinates in built records: 2 (LLaVA-1.5) or 3.")
    umed_stock_template_share: float = _flag(
        0.5,
        "Share of records, 0-1, trained under the stock template of --version, so that stock LLaVA can ask them.",
    )
    umed_on_bad_image: str = _flag("stop", "stop, or skip: report an image that cannot be read and take the next one.")
    umed_tower_weights: str = _flag(
        "checkpoint",
        "Vision tower: checkpoint (its own tower weights if it has any) or original (as stock LLaVA).",
    )
    umed_feature_cache: Optional[str] = _flag(
        None,
        "Folder that keeps the frozen vision tower's features, so that later epochs and runs do not open the image.",
    )
    umed_supervision_check_samples: int = _flag(
        64, "Records per template whose supervised tokens are verified before training; 0 checks none."
    )
    umed_algorithm: str = _flag(
        "grpo",
        "grpo: advantages within a question's answers, no value network; or ppo: the paper's, with a value network.",
    )
    umed_num_candidates: int = _flag(8, "Answers sampled per question (K), at least 2; with ppo at least 1.")
    umed_rewards: str = _flag(
        ",".join(PAPER_REWARDS),
        f"Comma list of {', '.join(PAPER_REWARDS)}, localization_diou (instead of localization: also tells near misses from far "
        "ones), or my_module:my_function.",
    )
    umed_reward_weights: Optional[str] = _flag(
        None, "Comma list of numbers, one for each reward, all at least 0. Not given: 1 for each."
    )
    umed_reward_norm: str = _flag(
        "max", "max (paper: term over its maximum in the group), none, or zscore over the group."
    )
    umed_reward_floor: float = _flag(
        0.1, "Least value of the maximum that max divides by, 0-1, so that a best IoU of 0.02 is not 1."
    )
    umed_judge: str = _flag(
        "lexical",
        "Who scores relevance: lexical (names and words) or classes (names alone), both local; openai:MODEL (sends texts, "
        "no images, to an OpenAI-compatible server), or replay:FILE (replies kept by an earlier run).",
    )
    umed_judge_base_url: Optional[str] = _flag(
        None, "Address of the judge's server, such as http://localhost:8000/v1. Not given: OpenAI's."
    )
    umed_judge_prompt: Optional[str] = _flag(
        None,
        "Text file with the judge's prompt, with {reference}, {answer} and {question}. Not given: judges/prompt.txt.",
    )
    umed_judge_options: str = _flag(
        DEFAULT_OPTIONS,
        "Further fields of the judge's requests, as JSON; some models take no temperature or max_tokens.",
    )
    umed_judge_max_score: float = _flag(
        10.0, "Score that the judge's prompt gives the best answer, above 0; 0 the worst."
    )
    umed_judge_ledger: Optional[str] = _flag(
        None, "File that keeps the judge's replies; runs may share one. Not given: judge.jsonl in --output_dir."
    )
    umed_judge_concurrency: int = _flag(16, "Questions that each process has with the judge at the same time.")
    umed_judge_timeout: float = _flag(60.0, "Seconds that the judge has for one try, above 0.")
    umed_judge_retries: int = _flag(5, "Further tries with the judge after one that failed.")
    umed_judge_budget: Optional[str] = _flag(
        None,
        "What the replies in the ledger may take together: 5000requests, 2000000tokens or 20usd. After the step in which it is "
        "spent the run saves a checkpoint and ends.",
    )
    umed_judge_prices: Optional[str] = _flag(
        None, "US dollars for a million tokens that the judge reads, comma, and writes: 0.15,0.60. Logs judge/usd."
    )
    umed_judge_patience: int = _flag(3, "Batches in a row without one score from the judge after which the run ends.")
    umed_reward_coef: float = _flag(
        1.0, "c1 of the paper, above 0: weight of the advantage (grpo), of the reward beside the KL penalty (ppo)."
    )
    umed_kl_coef: Optional[float] = _flag(
        None,
        "Weight of the per-token KL to the reference: a term of the loss (grpo; not given: 0.04, DeepSeekMath's) or a penalty "
        "in the tokens' rewards (ppo; not given: 0.1, LLaVA-RLHF's). 0: no reference.",
    )
    umed_kl_target: Optional[float] = _flag(
        None,
        "KL of an answer, in nats, that the weight is steered to (Ziegler et al. 2019). Not given: the weight is fixed.",
    )
    umed_kl_horizon: float = _flag(
        10000.0, "Answers over which --umed_kl_target may change the weight by about a fifth."
    )
    umed_clip_range: float = _flag(0.2, "Half width of the clipped probability ratio, 0-1 (LLaVA-RLHF: 0.2).")
    umed_entropy_coef: float = _flag(0.0, "Weight of the entropy bonus (c3 of the paper).")
    umed_value_coef: float = _flag(0.1, "ppo: weight of the value loss (c2 of the paper; LLaVA-RLHF: 0.1), above 0.")
    umed_value_clip_range: float = _flag(
        0.2, "ppo: farthest that an update may take a value from the old one, in rewards (LLaVA-RLHF: 0.2)."
    )
    umed_value_learning_rate: float = _flag(
        1e-4, "ppo: learning rate of the value network's layer, which begins at 0; scheduled as --learning_rate."
    )
    umed_gamma: float = _flag(1.0, "ppo: discount of later rewards, 0-1 (LLaVA-RLHF: 1).")
    umed_gae_lambda: float = _flag(
        0.95, "ppo: 0 (one step ahead) to 1 (whole return) of the advantages (LLaVA-RLHF: 0.95)."
    )
    umed_updates_per_rollout: int = _flag(
        1, "Passes over each rollout: optimizer steps that each sampled answer is in."
    )
    umed_minibatches_per_rollout: int = _flag(
        1,
        "Optimizer steps that one pass over a rollout takes: it is sampled whole, then shuffled into so many minibatches.",
    )
    umed_vrr_layers: str = _flag(
        "all",
        "Layers averaged by vision_relevance: all, last_half, or a comma list of indices (-1 is the last).",
    )
    umed_packed: bool = _flag(
        True,
        "Let a question's answers grow, and under gradient checkpointing be trained, in one row behind its prompt.",
    )
    umed_vrr_heads: str = _flag("all", "Heads averaged by vision_relevance: all, or a comma list of indices.")
    umed_vrr_mask_sinks: float = _flag(
        0.0,
        "Keep attention sinks out of vision_relevance: patches with a hidden value of at least this many times their root mean "
        "square (arXiv 2503.03321: 20; a model of width D has none above sqrt(D)); 0: mask none.",
    )
    umed_max_new_tokens: int = _flag(128, "Longest sampled answer, in tokens.")
    umed_temperature: float = _flag(
        1.0,
        "Sampling temperature, above 0. At 1, a model unsure of its boxes may learn to hedge with large ones: lower it then.",
    )
    umed_top_p: float = _flag(1.0, "Nucleus of the sampled distribution, above 0 up to 1.")
    umed_log_candidates: int = _flag(
        0,
        "Write the sampled answers with their rewards to candidates.jsonl, and to TensorBoard or W&B under --report_to, every "
        "this many steps; 0: never.",
    )

    umed_val_every: int = _flag(
        0,
        "Answer held-out records (split val) greedily before the first step and every this many steps, and log val/iou, "
        "val/accuracy and val/box_area_ratio; 0: never.",
    )
    umed_val_records: int = _flag(64, "Held-out records that --umed_val_every answers each time, at most.")

    @classmethod
    def of(cls, args: Any) -> UmedFlags:
        """Copy the flags out of an object that has them as attributes (LLaVA's TrainingArguments)."""
        return cls(**{flag.name: getattr(args, flag.name) for flag in dataclasses.fields(cls)})

    def reward_names(self) -> list[str]:
        """``--umed_rewards`` as a list."""
        return [name.strip() for name in self.umed_rewards.split(",")]

    def reward_weights(self) -> list[float]:
        """``--umed_reward_weights`` as floats, one per reward."""
        if self.umed_reward_weights is None:
            return [1.0] * len(self.reward_names())
        return [float(weight) for weight in self.umed_reward_weights.split(",")]

    def kl_coef(self) -> float:
        """``--umed_kl_coef``, or the algorithm's own default."""
        if self.umed_kl_coef is not None:
            return self.umed_kl_coef
        return 0.1 if self.umed_algorithm == "ppo" else 0.04

    def vrr_layer_indices(self, num_layers: int) -> list[int]:
        """``--umed_vrr_layers`` as sorted indices in ``range(num_layers)``.

        Raises:
            UsageError: an index is outside the model's layers.
        """
        if self.umed_vrr_layers == "all":
            return list(range(num_layers))
        if self.umed_vrr_layers == "last_half":
            return list(range(num_layers // 2, num_layers))
        indices = [int(part) for part in self.umed_vrr_layers.split(",")]
        outside = [index for index in indices if not -num_layers <= index < num_layers]
        if outside:
            raise UsageError(
                f"--umed_vrr_layers {self.umed_vrr_layers}: the model has {num_layers} layers, so {outside} do not exist. "
                f"Allowed: {-num_layers} to {num_layers - 1}, all, last_half."
            )
        return sorted({index % num_layers for index in indices})

    def vrr_head_indices(self, num_heads: int) -> list[int] | None:
        """``--umed_vrr_heads`` as sorted indices in ``range(num_heads)``; None for all.

        Raises:
            UsageError: an index is outside the model's heads.
        """
        if self.umed_vrr_heads == "all":
            return None
        indices = [int(part) for part in self.umed_vrr_heads.split(",")]
        outside = [index for index in indices if not 0 <= index < num_heads]
        if outside:
            raise UsageError(
                f"--umed_vrr_heads {self.umed_vrr_heads}: the model has {num_heads} heads, so {outside} do not exist. "
                f"Allowed: 0 to {num_heads - 1}, or all."
            )
        return sorted(set(indices))


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
    "umed_val_every": _AT_LEAST_0,
    "umed_val_records": _AT_LEAST_1,
    "umed_box_decimals": (lambda value: value in (2, 3), "2 or 3"),
}
_CHOICES = {
    "umed_on_bad_image": ("stop", "skip"),
    "umed_tower_weights": ("checkpoint", "original"),
    "umed_algorithm": ("grpo", "ppo"),
    "umed_reward_norm": ("max", "none", "zscore"),
}


def find_faults(flags: UmedFlags, model_args: Any, data_args: Any, training_args: Any) -> list[str]:
    """Everything that is wrong with the flags, as sentences; empty when they fit together."""
    if flags.umed_stage is not None and flags.umed_stage not in STAGES:
        return [f"--umed_stage: {unknown_name('stage', flags.umed_stage, STAGES)}"]
    return [
        *_flags_without_effect(flags),
        *_values(flags),
        *find_reward_faults(flags, imported=flags.umed_stage == REWARDING),
        *(find_judge_faults(flags) if flags.umed_stage == REWARDING else []),
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


def _inputs(flags: UmedFlags, model_args: Any, data_args: Any, training_args: Any) -> list[str]:
    """Faults between our flags and LLaVA's own."""
    faults = []
    if flags.umed_recipe is None and data_args.data_path is None:
        faults.append("there is nothing to train on: give --umed_recipe or --data_path.")
    if data_args.data_path is not None and not os.path.isfile(data_args.data_path):
        faults.append(f"--data_path {data_args.data_path}: there is no such file.")
    if data_args.image_folder is not None and not os.path.isdir(data_args.image_folder):
        faults.append(f"--image_folder {data_args.image_folder}: there is no such folder.")
    if flags.umed_data_root is not None and not os.path.isdir(flags.umed_data_root):
        faults.append(f"--umed_data_root {flags.umed_data_root}: there is no such folder.")
    if flags.umed_feature_cache is not None and os.path.isfile(flags.umed_feature_cache):
        faults.append(
            f"--umed_feature_cache {flags.umed_feature_cache}: is a file. Give a folder; it is made if need be."
        )
    if model_args.vision_tower is None:
        faults.append(
            "--vision_tower is missing: both stages train on images. LLaVA-Med 1.5: openai/clip-vit-large-patch14-336."
        )
    if data_args.image_aspect_ratio not in ("pad", "square"):
        faults.append(
            f"--image_aspect_ratio {data_args.image_aspect_ratio}: boxes are defined for pad and square (LLaVA's default)."
        )
    if flags.umed_stage == REWARDING:
        faults += [
            f"--{name} does not work with --umed_stage rewarding yet: sampling answers needs whole weights in every process. "
            f"Leave --{name} out and start the script with python or torchrun."
            for name in ("deepspeed", "fsdp")
            if getattr(training_args, name)
        ]
    return faults
