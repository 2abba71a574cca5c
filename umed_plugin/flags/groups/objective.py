"""The flags of the objective: advantages, clipping, KL, entropy, value network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from umed_plugin.flags.needs import GRPO, PPO, SEVERAL_UPDATES, flag
from umed_plugin.flags.rules import RESTORED, REWARDING, Needs


@dataclass
class ObjectiveFlags:
    """The flags of the objective: advantages, clipping, KL, entropy, value network."""

    umed_reward_coef: float = flag(
        1.0,
        "c1 of the paper: weight of the advantage (grpo), or of the reward relative to the KL penalty (ppo).",
        stage=REWARDING,
        above=0,
    )
    umed_advantage_scale: str = flag(
        "group",
        "Standard deviation that divides an answer's distance from its question's mean reward: within this question (group), "
        "within the whole batch (batch: a question whose answers are nearly equal then weighs little), or none (Dr. GRPO).",
        stage=REWARDING,
        needs=GRPO,
        choices=("group", "batch", "none"),
    )
    umed_loss_aggregation: str = flag(
        "grpo",
        "How the loss adds up tokens. grpo: mean over an answer's tokens, then over answers. dapo: mean over all tokens of the "
        "optimizer step (arXiv 2503.14476). dr_grpo: sum over tokens, divided by answers x --umed_max_new_tokens (arXiv "
        "2503.20783; the paper adds --umed_advantage_scale none). PPO always averages over all tokens.",
        stage=REWARDING,
        needs=GRPO,
        choices=("grpo", "dapo", "dr_grpo"),
    )
    umed_kl_coef: Optional[float] = flag(
        None,
        "Weight of the per-token KL to the reference policy: a term of the loss (grpo; default 0.04, DeepSeekMath's) or a "
        "penalty in the token rewards (ppo; default 0.1, LLaVA-RLHF's). 0: no reference policy.",
        stage=REWARDING,
        least=0,
    )
    umed_kl_target: Optional[float] = flag(
        None,
        "Target KL of an answer, in nats, that the weight is steered to (Ziegler et al. 2019). Default: the weight is fixed.",
        stage=REWARDING,
        needs=Needs("--umed_kl_coef above 0", lambda flags: flags.kl_coef() > 0),
        above=0,
    )
    umed_kl_horizon: float = flag(
        10000.0,
        "Number of answers over which the KL weight may change by about a fifth.",
        stage=REWARDING,
        needs=Needs("--umed_kl_target", lambda flags: flags.umed_kl_target is not None),
        above=0,
    )
    umed_clip_range: float = flag(
        0.2,
        "Half width of the clipped probability ratio (LLaVA-RLHF: 0.2).",
        stage=REWARDING,
        needs=SEVERAL_UPDATES,
        above=0,
        below=1,
    )
    umed_clip_range_high: Optional[float] = flag(
        None,
        "How far the probability ratio may rise above 1; --umed_clip_range is then how far it may fall (DAPO: 0.28 and 0.2). "
        "Default: --umed_clip_range on both sides.",
        stage=REWARDING,
        needs=SEVERAL_UPDATES,
        above=0,
    )
    umed_entropy_coef: float = flag(0.0, "Weight of the entropy bonus (c3 of the paper).", stage=REWARDING, least=0)
    umed_value_coef: float = flag(
        0.1, "Weight of the value loss (c2 of the paper; LLaVA-RLHF: 0.1).", stage=REWARDING, needs=PPO, above=0
    )
    umed_value_clip_range: float = flag(
        0.2,
        "Largest change of a value from the old one, in units of reward (LLaVA-RLHF: 0.2).",
        stage=REWARDING,
        needs=PPO & SEVERAL_UPDATES,
        above=0,
    )
    umed_value_learning_rate: float = flag(
        1e-4,
        "Learning rate of the value head, which starts at the first rollout's mean reward; scheduled as --learning_rate.",
        stage=REWARDING,
        needs=PPO,
        above=0,
        on_resume=RESTORED,
    )
    umed_gamma: float = flag(
        1.0, "Discount of later rewards (LLaVA-RLHF: 1).", stage=REWARDING, needs=PPO, least=0, most=1
    )
    umed_gae_lambda: float = flag(
        0.95,
        "Lambda of generalised advantage estimation: 0 is one step ahead, 1 the whole return (LLaVA-RLHF: 0.95).",
        stage=REWARDING,
        needs=PPO,
        least=0,
        most=1,
    )
    umed_updates_per_rollout: int = flag(1, "Epochs over each rollout (TRL: num_ppo_epochs).", stage=REWARDING, least=1)
    umed_minibatches_per_rollout: int = flag(
        1,
        "Optimizer steps per epoch over a rollout: it is sampled whole, then shuffled into this many minibatches.",
        stage=REWARDING,
        least=1,
    )
