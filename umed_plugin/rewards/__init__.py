"""The rewards of Abnormal-Aware Rewarding and how they become one number a candidate.

A reward has the signature of TRL's reward functions: a batch in, a list out, ``None`` for a candidate that it cannot score, which
leaves the term out for it (:mod:`umed_plugin.rewards.combine`); ``None`` is never 0.

    def my_reward(prompts: list[str], completions: list[str], **columns) -> list[float | None]

Prompts are the questions, completions the candidates' texts, K in a row for each question. Columns hold one entry a
candidate: ``record`` (the training record), ``geometry`` (of its image) and ``attention_on_lesion`` (from
:mod:`umed_plugin.model.attention`, ``None`` where it was not computed). Take ``**columns``: there may be more of them in
another version.

``--umed_rewards`` names a reward of this package, or ``my_module:my_reward`` of your own file on ``PYTHONPATH``: a function, a
callable object, or a class, of which one object is made without arguments in each process. All else is optional, as attributes:

- ``max_normalised = True``: ``--umed_reward_norm max`` divides it by its maximum over the candidates of a question, which is
  taken for at least ``--umed_reward_floor`` or, where that is too low for it, ``least_maximum``.
- ``start(prompts, completions, **columns)``: begin slow work and return at once. It is called as soon as the answers are sampled,
  without ``attention_on_lesion``; the reward itself is called with the same lists after the passes of the policy and the
  reference, so a judge behind a network answers while the step goes on.
- ``measures: tuple[str, ...]`` and ``measured() -> dict[str, float]``: names that are logged, and their values in the last call
  (a name may be missing). The mean over steps and processes is what the log shows.
- ``stop: str | None``: when it is a text after a step, in any process, the run saves a checkpoint and ends with it as an error.
"""

from umed_plugin.rewards.combine import combine_rewards
from umed_plugin.rewards.running import make_rewards, measured_by, measures_of, start_rewards
from umed_plugin.rewards.terms import REWARDS, localization, localization_diou, relevance, vision_relevance

__all__ = [
    "REWARDS",
    "combine_rewards",
    "localization",
    "localization_diou",
    "make_rewards",
    "measured_by",
    "measures_of",
    "relevance",
    "start_rewards",
    "vision_relevance",
]
