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


def register_reward(
    name: str, *, max_normalised: Optional[bool] = None, least_maximum: Optional[float] = None
) -> Callable[[R], R]:
    """Decorator that adds a reward to `REWARDS` and sets its attributes.

    A reward is a function, a callable object, or a class whose objects are callable.

    Args:
        name: of the reward; a shipped one is named as its file in `umed_plugin.rewards.terms`. ``--umed_rewards`` knows shipped
            rewards by this name, and those of your own file as ``my_module:my_reward``.
        max_normalised: whether ``--umed_reward_norm max`` divides the reward by its maximum over a question's candidates. None:
            the reward's own attribute of this name, or False.
        least_maximum: lower bound of that maximum where it is above ``--umed_reward_floor``, in the reward's own unit. None: the
            reward's own attribute of this name, or 0.

    Raises:
        ValueError: the name is taken.
        TypeError: the attributes cannot be set on the reward.

    Example:
        >>> @register_reward("brevity", max_normalised=True)
        ... def brevity(prompts, completions, **columns):
        ...     return [1 / len(text) for text in completions]
        >>> REWARDS.get("brevity")(["Where?"], ["Left"]), brevity.max_normalised
        ([0.25], True)
    """

    def add(reward: R) -> R:
        given = {"max_normalised": max_normalised, "least_maximum": least_maximum}
        for attribute, value in given.items():
            if value is not None:
                _set(reward, name, attribute, value)
        REWARDS.register(name)(reward)
        return reward

    return add


def _set(reward: Reward, name: str, attribute: str, value: Any) -> None:
    try:
        setattr(reward, attribute, value)
    except (
        AttributeError,
        TypeError,
    ) as error:  # __slots__, a frozen dataclass, a bound method, a function written in C
        raise TypeError(
            f"reward {name!r}: {attribute} cannot be set on {reward!r} ({error}). Define `{attribute} = {value!r}` in its class "
            "and leave the argument out, or register a function that calls it."
        ) from error


def normalisation_of(rewards: Mapping[str, Reward]) -> dict[str, Any]:
    """What the rewards' attributes say of their normalisation, as arguments of :func:`umed_plugin.rewards.combine_rewards`."""
    return {
        "max_normalised": [name for name, reward in rewards.items() if getattr(reward, "max_normalised", False)],
        "least_maxima": {name: getattr(reward, "least_maximum", 0.0) for name, reward in rewards.items()},
    }
