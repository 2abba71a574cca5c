"""Life cycle of a run's rewards: create once, start asynchronous work early in each step, collect metrics.

The contract of a reward is in the docstring of :mod:`umed_plugin.rewards`; `umed_plugin.training.stopping` ends a run in which a
reward says to stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.rewards.contract import REWARDS, Reward, call_reward
from umed_plugin.rewards.judges.lexical import LOCAL_JUDGES
from umed_plugin.rewards.judges.relevance import JudgedRelevance


def make_rewards(flags: UmedFlags, output_dir: str | Path) -> dict[str, Reward]:
    """The rewards that ``--umed_rewards`` names, in its order.

    Args:
        flags: checked by :func:`umed_plugin.flags.checks.check`.
        output_dir: where a reward may keep files, such as a judge's ledger.
    """
    rewards: dict[str, Reward] = {}
    for name in flags.reward_names():
        if name == "relevance":
            local = LOCAL_JUDGES.get(flags.umed_judge)
            rewards[name] = local or JudgedRelevance.of(flags, Path(output_dir))
        else:
            entry = REWARDS.get(name)
            rewards[name] = entry() if isinstance(entry, type) else entry
    return rewards


def start_rewards(
    rewards: Mapping[str, Reward], prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
) -> None:
    """Start the rewards that work in the background."""
    for reward in rewards.values():
        if hasattr(reward, "start"):
            call_reward(reward.start, prompts, completions, columns)


def run_rewards(
    rewards: Mapping[str, Reward], prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
) -> dict[str, list[float | None]]:
    """The values of each reward by name, one for each of the N candidates."""
    return {name: call_reward(reward, prompts, completions, columns) for name, reward in rewards.items()}


def reward_metric_names(rewards: Mapping[str, Reward]) -> list[str]:
    """All metrics that the rewards may log; the same in every process."""
    return [name for reward in rewards.values() for name in _names_of(reward)]


def collect_metrics(rewards: Mapping[str, Reward]) -> dict[str, float]:
    """The rewards' metrics of their last call.

    Raises:
        UmedError: a reward logs a metric that its ``metric_names`` does not list.
    """
    values: dict[str, float] = {}
    for name, reward in rewards.items():
        metrics = _metrics_of(reward)
        unknown = sorted(set(metrics) - set(_names_of(reward)))
        if unknown:
            raise UmedError(
                f"reward {name!r}: metrics() returned {', '.join(unknown)}, which its attribute `metric_names` does not list. "
                "Every process must know all names in advance: add them there."
            )
        values.update(metrics)
    return values


def _names_of(reward: Reward) -> Sequence[str]:
    """``metric_names`` of a reward, or ``measures``, the older name."""
    return getattr(reward, "metric_names", getattr(reward, "measures", ()))


def _metrics_of(reward: Reward) -> Mapping[str, float]:
    """``metrics()`` of a reward, or ``measured()``, the older name, where the reward announces its metrics by the older one.

    Empty for a reward that announces none. A method of such a name then serves another purpose and is not called.
    """
    if hasattr(reward, "metric_names"):
        names = ("metrics", "measured")
    elif hasattr(reward, "measures"):
        names = ("measured", "metrics")
    else:
        return {}
    readers = [read for read in (getattr(reward, name, None) for name in names) if callable(read)]
    return readers[0]() if readers else {}
