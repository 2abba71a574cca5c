"""What a reward is, the registry of the shipped ones, and the attributes that say how a reward is normalised.

The contract in words is in :mod:`umed_plugin.rewards`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Optional, TypeVar

from umed_plugin.registry import Registry

Reward = Callable[..., "list[Optional[float]]"]
R = TypeVar("R", bound=Callable[..., Any])
REWARDS: Registry[Any] = Registry("reward")


def register_reward(name: str, *, max_normalised: bool = False, least_maximum: float = 0.0) -> Callable[[R], R]:
    """Decorator that adds a reward to `REWARDS` and sets its attributes.

    Args:
        name: of the reward; a shipped one is named as its file in `umed_plugin.rewards.terms`. ``--umed_rewards`` knows shipped
            rewards by this name, and those of your own file as ``my_module:my_reward``.
        max_normalised: whether ``--umed_reward_norm max`` divides the reward by its maximum over a question's candidates.
        least_maximum: lower bound of that maximum where it is above ``--umed_reward_floor``, in the reward's own unit.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> @register_reward("brevity", max_normalised=True)
        ... def brevity(prompts, completions, **columns):
        ...     return [1 / len(text) for text in completions]
        >>> REWARDS.get("brevity")(["Where?"], ["Left"]), brevity.max_normalised
        ([0.25], True)
    """

    def add(reward: R) -> R:
        vars(reward).update(max_normalised=max_normalised, least_maximum=least_maximum)
        REWARDS.register(name)(reward)
        return reward

    return add


def normalisation_of(rewards: Mapping[str, Reward]) -> dict[str, Any]:
    """What the rewards' attributes say of their normalisation, as arguments of :func:`umed_plugin.rewards.combine_rewards`."""
    return {
        "max_normalised": [name for name, reward in rewards.items() if getattr(reward, "max_normalised", False)],
        "least_maxima": {name: getattr(reward, "least_maximum", 0.0) for name, reward in rewards.items()},
    }
