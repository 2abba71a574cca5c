"""The ``--umed_*`` flags of LLaVA's training scripts: one dataclass. `umed_plugin.flags.checks` says which of them fit together.

The paper (arXiv 2501.01377) publishes no hyper-parameters, so every default here is our own choice and not the paper's.
Where a default comes from other work, its help text says from which.

How to run: ``umed-run bash finetune.sh --umed_stage instruction_tuning --umed_recipe NAME`` (see `umed_plugin.launch`).
Without ``--umed_stage`` LLaVA trains as if the plugin were not there, and any other ``--umed_*`` flag is refused.

Departures from the paper: the algorithm is GRPO unless asked for (PPO is the paper's), and the reward terms carry weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Optional

from umed_plugin.errors import UsageError

STAGES = ("instruction_tuning", "rewarding")
TUNING, REWARDING = STAGES
PAPER_REWARDS = ("relevance", "localization", "vision_relevance")
# What every OpenAI-compatible server knows and a plain chat model needs to be short and the same each time.
DEFAULT_OPTIONS = '{"temperature": 0, "max_tokens": 200}'


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
    umed_image_cache: Optional[str] = _flag(
        None,
        "Folder that keeps images decoded and resized, so that later epochs and runs decode nothing. A recipe's DICOM and NIfTI "
        "are then read where they lie, and not rendered to PNG.",
    )
    umed_image_cache_gb: float = _flag(20.0, "Most that --umed_image_cache may hold, in GB (10^9 bytes).")
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
    umed_advantage_scale: str = _flag(
        "group",
        "grpo: what an answer's distance from its question's mean reward is divided by: the standard deviation within this "
        "question (group) or within all of the batch (batch: a question whose answers are nearly equal then weighs little).",
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
        1e-4,
        "ppo: learning rate of the value network's layer, which begins at the first rollout's mean reward; scheduled as "
        "--learning_rate.",
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

    def rollout_is_one_batch(self) -> bool:
        """Whether each batch is a rollout of its own: GRPO compares within a query, and with one update nothing is kept."""
        passes = self.umed_updates_per_rollout * self.umed_minibatches_per_rollout
        return self.umed_algorithm == "grpo" and passes == 1

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
