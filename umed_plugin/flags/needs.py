"""How a field states a flag, and what flags need of one another."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any

from umed_plugin.flags.names import LOCAL_JUDGE_NAMES, MAX_NORMALISED, OPENAI, is_own_reward
from umed_plugin.flags.rules import TUNING, Needs, Rules

PPO = Needs("--umed_algorithm ppo", lambda flags: flags.umed_algorithm == "ppo")
GRPO = Needs("--umed_algorithm grpo", lambda flags: flags.umed_algorithm == "grpo")
# On the first update the probability ratio is 1 and the value is the old one, whatever the range.
SEVERAL_UPDATES = Needs(
    "--umed_updates_per_rollout or --umed_minibatches_per_rollout above 1",
    lambda flags: flags.umed_updates_per_rollout * flags.umed_minibatches_per_rollout > 1,
)
# A single answer has no group to be normalised over.
SEVERAL_CANDIDATES = Needs("--umed_num_candidates above 1", lambda flags: flags.umed_num_candidates > 1)
# An own reward (module:name) may ask for it too: `umed_plugin.flags.rewards` imports it and looks.
NORMALISED_REWARD = Needs(
    "a reward that max normalises in --umed_rewards: localization, localization_diou, vision_relevance or your own",
    lambda flags: any(name in MAX_NORMALISED or is_own_reward(name) for name in flags.reward_names()),
)
RECIPE = Needs("--umed_recipe", lambda flags: flags.umed_recipe is not None)
RELEVANCE = Needs("relevance in --umed_rewards", lambda flags: "relevance" in flags.reward_names())
VISION_RELEVANCE = Needs(
    "vision_relevance in --umed_rewards (stage 2) or --umed_attention_loss (stage 1)",
    lambda flags: (
        flags.umed_attention_loss > 0 if flags.umed_stage == TUNING else "vision_relevance" in flags.reward_names()
    ),
)
MODEL_JUDGE = Needs(
    "--umed_judge openai:MODEL or replay:FILE", lambda flags: flags.judge_kind() not in LOCAL_JUDGE_NAMES
)
ROLLOUT_SERVER = Needs("--umed_rollout_server", lambda flags: flags.umed_rollout_server is not None)
SERVER_JUDGE = Needs("--umed_judge openai:MODEL", lambda flags: flags.judge_kind() == OPENAI)

# transformers hands a field's whole metadata to argparse, which refuses unknown keys. It would also act on `choices` and
# exit at the first fault, where all faults shall come at once. So metadata holds the help text, and the rules stand here.
_RULES: dict[dataclasses.Field[Any], Rules] = {}


def flag(default: Any, help_text: str, **rules: Any) -> Any:
    """A dataclass field for one flag; ``rules`` are those of :class:`umed_plugin.flags.rules.Rules`."""
    made = field(default=default, metadata={"help": help_text + Rules(**rules).help_words()})
    _RULES[made] = Rules(**rules)
    return made


def rules_of(flag: dataclasses.Field[Any]) -> Rules:
    """The rules of one of ``dataclasses.fields(UmedFlags)``."""
    return _RULES[flag]
