"""The ``--umed_*`` flags of LLaVA's training scripts: one dataclass, in which each field says all that holds for its flag.

A new flag is one field in a file of `umed_plugin.flags.groups`, and its use. The field states default, help, stage, needs and
allowed values (`umed_plugin.flags.rules`). `umed_plugin.flags.checks` checks them, and what several flags must agree on.

The paper (arXiv 2501.01377) publishes no hyper-parameters, so every default here is our own choice and not the paper's.
Where a default comes from other work, its help text names that work.

How to run: ``umed-run python -m llava.train.train_mem --umed_stage instruction_tuning --umed_recipe NAME ...``.
Without ``--umed_stage``, stock LLaVA behaviour applies, and any other ``--umed_*`` flag is refused.

Departures from the paper: the default algorithm is GRPO (the paper uses PPO), and the reward terms have weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Optional

from umed_plugin.errors import UsageError
from umed_plugin.flags.groups.adapter import AdapterFlags
from umed_plugin.flags.groups.data import DataFlags
from umed_plugin.flags.groups.judge import JudgeFlags
from umed_plugin.flags.groups.objective import ObjectiveFlags
from umed_plugin.flags.groups.rewards import RewardFlags
from umed_plugin.flags.groups.sampling import SamplingFlags
from umed_plugin.flags.groups.tuning import TuningFlags
from umed_plugin.flags.groups.vision_relevance import VisionRelevanceFlags
from umed_plugin.flags.needs import flag
from umed_plugin.flags.rules import FREE, STAGES, KeepWeights, parse_keep
from umed_plugin.flags.weights import Weight


@dataclass
class StageFlags:
    """The stage, and what may differ from the run that is resumed."""

    umed_stage: Optional[str] = flag(
        None,
        "instruction_tuning (stage 1) or rewarding (stage 2). Without it, stock LLaVA behaviour applies.",
        choices=STAGES,
        on_resume=FREE,
    )

    umed_accept_changed: Optional[str] = flag(
        None,
        "Comma list of flags that may differ from the run that is resumed, such as umed_temperature,data_path. Without it a run "
        "whose batches, order, objective or weights would change is refused.",
        on_resume=FREE,
    )


# The fields of a dataclass begin with those of its last base.
@dataclass
class UmedFlags(
    SamplingFlags,
    TuningFlags,
    VisionRelevanceFlags,
    ObjectiveFlags,
    JudgeFlags,
    RewardFlags,
    AdapterFlags,
    DataFlags,
    StageFlags,
):
    """Flags that `umed_plugin.patches.train_arguments` adds to LLaVA's TrainingArguments; ``args.umed`` returns them."""

    @classmethod
    def of(cls, args: Any) -> UmedFlags:
        """Copy the flags from an object that has them as attributes (LLaVA's TrainingArguments)."""
        return cls(**{flag.name: getattr(args, flag.name) for flag in dataclasses.fields(cls)})

    def accepted_changes(self) -> set[str]:
        """``--umed_accept_changed`` as names without dashes."""
        names = (self.umed_accept_changed or "").split(",")
        return {name.strip().lstrip("-") for name in names} - {""}

    def lora_targets(self) -> list[str]:
        """``--umed_lora_targets`` as names; empty for all linear layers."""
        return (self.umed_lora_targets or "").split(",") if self.umed_lora_targets else []

    def reward_names(self) -> list[str]:
        """``--umed_rewards`` as a list."""
        return [name.strip() for name in self.umed_rewards.split(",")]

    def reward_schedule(self) -> list[Weight]:
        """``--umed_reward_weights``, one per reward.

        Raises:
            ValueError: one of them cannot be read.
        """
        if self.umed_reward_weights is None:
            return [Weight(1.0, 1.0)] * len(self.reward_names())
        return [Weight.read(weight) for weight in self.umed_reward_weights.split(",")]

    def reward_weights(self, progress: float = 0.0) -> list[float]:
        """``--umed_reward_weights`` as floats, one per reward, when this share of the run is done, 0-1."""
        return [weight.at(progress) for weight in self.reward_schedule()]

    def judge_kind(self) -> str:
        """``lexical``, ``classes``, ``openai`` or ``replay``: the part of ``--umed_judge`` before the colon."""
        return self.umed_judge.partition(":")[0]

    def judge_target(self) -> str:
        """The model of ``openai:MODEL`` or the file of ``replay:FILE``; empty for local judges."""
        return self.umed_judge.partition(":")[2]

    def keep_weights(self) -> KeepWeights:
        """``--umed_keep`` with its temperature.

        Raises:
            ValueError: it cannot be read.
        """
        weights = parse_keep(self.umed_keep)
        return replace(weights, temperature=self.umed_distill_temperature or weights.temperature)

    def keeps(self) -> bool:
        """Whether ``--umed_keep`` asks for a loss; one that cannot be read is a fault of its own."""
        try:
            return parse_keep(self.umed_keep).kl > 0
        except ValueError:
            return True

    def kl_coef(self) -> float:
        """``--umed_kl_coef``, or the algorithm's own default."""
        if self.umed_kl_coef is not None:
            return self.umed_kl_coef
        return 0.1 if self.umed_algorithm == "ppo" else 0.04

    def steps_per_rollout(self) -> int:
        """Number of optimizer steps that a rollout feeds."""
        return self.umed_updates_per_rollout * self.umed_minibatches_per_rollout

    def learnt_from_once(self) -> bool:
        """Whether a rollout feeds a single optimizer step: the policy that learns is then the one that sampled."""
        return self.steps_per_rollout() == 1

    def rollout_is_any_step(self) -> bool:
        """Whether a rollout is what an optimizer step takes, even less at an epoch's end: GRPO compares within a query."""
        return self.umed_algorithm == "grpo" and self.learnt_from_once()

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

    def vrr_sink_ratio(self, width: int) -> float:
        """``--umed_vrr_mask_sinks`` for hidden states of this width.

        Raises:
            UsageError: no patch could be above it, so the flag would have no effect.
        """
        most = width**0.5
        if self.umed_vrr_mask_sinks > most:
            raise UsageError(
                f"--umed_vrr_mask_sinks {self.umed_vrr_mask_sinks:g} has no effect: a hidden state of this model has {width} "
                f"values, none of which is above {most:.1f} times their root mean square. Allowed: above 1 to {most:.1f}, or 0."
            )
        return self.umed_vrr_mask_sinks
