"""The rewards of Abnormal-Aware Rewarding, and how they are combined into one number per candidate.

A reward has the signature of TRL's reward functions. It takes a batch and returns a list of finite numbers, with ``None`` for a
candidate that it cannot score. A NumPy array or a tensor will do; anything else ends the run. ``None`` leaves the term out for
that candidate (:mod:`umed_plugin.rewards.combine`); it never counts as 0. The candidate gets the mean of the question's others,
and under PPO, where these have none either, that of the batch. PPO does not learn from a candidate without any reward.

    def my_reward(prompts: list[str], completions: list[str], **columns) -> list[float | None]

Prompts are the questions. Completions are the candidates' texts, K in a row for each question. Columns hold one entry per
candidate: ``record`` (the training record), ``geometry`` (of its image) and ``attention_on_lesion`` (from
:mod:`umed_plugin.model.attention`, ``None`` where it was not computed). Accept ``**columns``: another version may pass more.
As in TRL, all are passed by keyword: ``def my_reward(completions, **columns)`` is enough. Completions are texts, not messages.

``--umed_rewards`` names a shipped reward, which is a file of :mod:`umed_plugin.rewards.terms`, or ``my_module:my_reward`` of your
own file on ``PYTHONPATH``. Your own may be a function, a callable object, or a class: each process creates one object of it,
without arguments. Everything else is optional, as attributes:

- ``max_normalised = True``: ``--umed_reward_norm max`` divides the reward by its largest absolute value among a question's
  candidates. It counts as at least ``--umed_reward_floor`` times ``scale`` or, if higher, ``least_maximum``.
- ``scale``: how large the reward's values are: a number, or a function of the columns that gives one per candidate; default 1.
  Give one if the values are much smaller than 1, or the floor keeps them from being divided by their maximum.
- ``for_records(records) -> reward``: called once before the first step, with at most 2,000 records spread over the training
  split, the same in every process. The run uses what it returns. `format` learns there how the references are worded.
  ``most_records`` is another maximum; None: all records, as a sequence that reads each when it is asked for.
- ``applies_to(record) -> bool``: whether the reward means something for a record. Its values for other records count as None.
- ``start(prompts, completions, **columns)``: begins slow work and returns at once. It is called as soon as the answers are
  sampled, without ``attention_on_lesion``. The reward itself is called with the same lists after the forward passes of policy and
  reference policy, so a judge on a server can answer in the meantime.
- ``metric_names: tuple[str, ...]`` and ``metrics() -> dict[str, float]``: metrics to log, and their values in the last call; a
  value may be missing. The log shows the mean over calls and processes; ``--umed_dynamic_sampling`` makes several calls in a
  step. The older names of the two, ``measures`` and ``measured()``, still work.
- ``for_all_processes() -> list`` and ``advance(values)``, for a reward that changes over a run: after each sampling the lists
  of all processes, one object after the other from each, are given to ``advance``. It is the same list in every process, so the
  reward stays the same there. ``--umed_dynamic_sampling`` makes several samplings in a rollout.
- ``end_rollout()``: called after the last sampling of a rollout, before anything is learnt from it. It may refuse to go on.
- ``state() -> dict`` and ``load_state(state)``: what a checkpoint keeps of the reward, as JSON. A resumed run loads it.
- ``stop: str | None``: if it is a text after a step, in any process, the run saves a checkpoint and ends with the text as an
  error.

A reward that cannot go on raises `umed_plugin.UmedError`. The run then saves what it learnt before this rollout and ends with the
error, in all processes. Nothing is learnt from the rollout. The same happens if values, metrics or scale are not as they must be,
and if a reward raises any other exception.
"""

from typing import Any

from umed_plugin.rewards import terms as _terms  # noqa: F401  (registers the shipped rewards)
from umed_plugin.rewards.combine import (
    combine_rewards,
    filled_over_queries,
    normalised_terms,
    scored_answers,
    weighted_sum,
)
from umed_plugin.rewards.contract import REWARDS, Reward, normalisation_of, register_reward
from umed_plugin.rewards.running import (
    advance_rewards,
    collect_metrics,
    end_rollout,
    load_reward_states,
    make_rewards,
    remarks_on_records,
    reward_metric_names,
    reward_of_run,
    reward_states,
    run_rewards,
    start_rewards,
)

__all__ = [
    "REWARDS",
    "Reward",
    "advance_rewards",
    "collect_metrics",
    "combine_rewards",
    "end_rollout",
    "filled_over_queries",
    "load_reward_states",
    "make_rewards",
    "normalisation_of",
    "normalised_terms",
    "register_reward",
    "remarks_on_records",
    "reward_metric_names",
    "reward_of_run",
    "reward_states",
    "run_rewards",
    "scored_answers",
    "start_rewards",
    "weighted_sum",
]


def __getattr__(name: str) -> Any:
    """The shipped rewards by name: ``from umed_plugin.rewards import localization``."""
    if name in REWARDS:
        return REWARDS.get(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
