"""The rewards of Abnormal-Aware Rewarding and how they become one number a candidate.

A reward has the signature of TRL's reward functions: a batch in, a list out, ``None`` for a candidate that it cannot score.

    def my_reward(prompts: list[str], completions: list[str], **columns) -> list[float | None]

Columns hold one entry a candidate: ``record`` (the training record), ``geometry`` (of its image) and ``attention_on_lesion``
(from :mod:`umed_plugin.attention`, ``None`` where it was not computed). A reward of your own is named ``module:function`` in
``--umed_rewards``; set ``my_reward.max_normalised = True`` if it shall be divided by its maximum over the candidates, and
``my_reward.least_maximum`` where ``--umed_reward_floor`` is too low for it.
"""

from umed_plugin.rewards.combine import combine_rewards
from umed_plugin.rewards.terms import REWARDS, localization, localization_diou, relevance, vision_relevance

__all__ = ["REWARDS", "combine_rewards", "localization", "localization_diou", "relevance", "vision_relevance"]
