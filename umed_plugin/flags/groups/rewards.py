"""The flags of the algorithm and its rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from umed_plugin.flags.names import PAPER_REWARDS, REWARD_NORMS, SHIPPED_REWARDS
from umed_plugin.flags.needs import NORMALISED_REWARD, SEVERAL_CANDIDATES, flag
from umed_plugin.flags.rules import FIXED, REWARDING, Needs


@dataclass
class RewardFlags:
    """The flags of the algorithm and its rewards."""

    umed_algorithm: str = flag(
        "grpo",
        "grpo: advantages within a question's group of answers, no value network. ppo: the paper's, with a value network.",
        stage=REWARDING,
        choices=("grpo", "ppo"),
        on_resume=FIXED,
    )
    umed_num_candidates: int = flag(
        8, "Answers sampled per question (K): at least 2 with grpo, at least 1 with ppo.", stage=REWARDING, least=1
    )
    umed_rewards: str = flag(
        ",".join(PAPER_REWARDS),
        f"Comma list of {', '.join(SHIPPED_REWARDS)}, or my_module:my_reward for your own. localization_diou replaces "
        "localization: it also tells near misses from far ones. symbolic needs its file: symbolic:FILE.yaml.",
        stage=REWARDING,
    )
    umed_reward_weights: Optional[str] = flag(
        None,
        "Comma list of numbers, one for each reward, all at least 0. Default: 1 for each. 0..1 goes from 0 at the start of the "
        "run to 1 at its end; 0..1@0.5 reaches 1 at half of it.",
        stage=REWARDING,
    )
    umed_reward_norm: str = flag(
        "max",
        "Normalisation over a question's answers: max (paper: divide by the maximum), none, or zscore (each reward by itself "
        "to mean 0 and deviation 1, as GDPO does, arXiv 2601.05242; --umed_advantage_scale batch is its second step).",
        stage=REWARDING,
        needs=SEVERAL_CANDIDATES,
        choices=REWARD_NORMS,
    )
    umed_reward_floor: float = flag(
        0.1,
        "Lower bound of the maximum that max divides by, so that a best IoU of 0.02 does not become 1. In each reward's "
        "own scale: for vision_relevance a multiple of the even share, the share of the patches that the lesion covers.",
        stage=REWARDING,
        needs=Needs("--umed_reward_norm max", lambda flags: flags.umed_reward_norm == "max")
        & NORMALISED_REWARD
        & SEVERAL_CANDIDATES,
        least=0,
        most=1,
    )
