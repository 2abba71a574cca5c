"""What a reward is, the registry of the shipped ones, and the attributes that say how a reward is normalised.

The contract in words is in :mod:`umed_plugin.rewards`.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Optional, TypeVar, Union

from umed_plugin.errors import UmedError
from umed_plugin.flags.rewards import is_called_by_position
from umed_plugin.registry import Registry
from umed_plugin.rewards.values import as_float, shown
from umed_plugin.terminal.text import one_line

Reward = Callable[..., "list[Optional[float]]"]
# The size of a reward's values: one number, or a function of the columns that gives N numbers.
Scale = Union[float, Callable[..., "list[float]"]]
R = TypeVar("R", bound=Callable[..., Any])
REWARDS: Registry[Any] = Registry("reward")


def register_reward(
    name: str,
    *,
    max_normalised: Optional[bool] = None,
    least_maximum: Optional[float] = None,
    scale: Optional[Scale] = None,
    applies_to: Optional[Callable[[Mapping[str, Any]], bool]] = None,
) -> Callable[[R], R]:
    """Decorator that adds a reward to `REWARDS` and sets its attributes.

    A reward is a function, a callable object, or a class whose objects are callable.

    Args:
        name: of the reward; a shipped one is named as its file in `umed_plugin.rewards.terms`. ``--umed_rewards`` knows shipped
            rewards by this name, and those of your own file as ``my_module:my_reward``.
        max_normalised: whether ``--umed_reward_norm max`` divides the reward by its maximum over a question's candidates. None:
            the reward's own attribute of this name, or False.
        least_maximum: lower bound of that maximum, in the reward's own unit, where it is above the floor. None: the reward's own
            attribute of this name, or 0.
        scale: how large the reward's values are, in its own unit; ``--umed_reward_floor`` is a multiple of it. A number, or a
            function of the columns, called as ``scale(record=..., geometry=..., ...)``, that returns N of them. A reward whose
            values are about 0.01 needs one: under a floor of 0.1 it would never be divided by its maximum. None: the reward's
            own attribute of this name, or 1.
        applies_to: whether the reward means something for a record, such as one of `umed_plugin.grounding.answer_types`. Answers
            to other records get None. None: the reward's own attribute of this name, or all records.

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
        given = {"max_normalised": max_normalised, "least_maximum": least_maximum, "scale": scale}
        for attribute, value in given.items():
            if value is not None:
                _set(reward, name, attribute, value)
        if applies_to is not None:  # a function in a class would be a method
            _set(reward, name, "applies_to", staticmethod(applies_to) if isinstance(reward, type) else applies_to)
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


def normalisation_of(
    rewards: Mapping[str, Reward], columns: Optional[Mapping[str, Sequence[Any]]] = None
) -> dict[str, Any]:
    """What the rewards' attributes say of their normalisation, as arguments of :func:`umed_plugin.rewards.combine_rewards`.

    Args:
        rewards: by name.
        columns: as the rewards get them, N entries each. The key ``scales`` is there if some reward has a ``scale``.

    Raises:
        UmedError: a ``scale`` is not a number of 0 or more, or gives another number of them than N.
    """
    normalisation: dict[str, Any] = {
        "max_normalised": [name for name, reward in rewards.items() if getattr(reward, "max_normalised", False)],
        "least_maxima": {name: getattr(reward, "least_maximum", 0.0) for name, reward in rewards.items()},
    }
    scales = {name: _scale_of(name, reward, columns) for name, reward in rewards.items() if hasattr(reward, "scale")}
    return {**normalisation, "scales": scales} if scales else normalisation


def _scale_of(name: str, reward: Any, columns: Optional[Mapping[str, Sequence[Any]]]) -> Union[float, list[float]]:
    if not callable(reward.scale):
        return _size_of(name, reward.scale)
    given = columns or {}
    with failing_as(name, reward, given.get("record", ())):
        sizes = reward.scale(**given)
    if not isinstance(sizes, Iterable):
        raise UmedError(
            f"reward {name!r}: scale returned {shown(sizes)}. It must return a list of one number for each answer."
        )
    sizes = [_size_of(name, value) for value in sizes]
    count = len(given.get("record", sizes))  # TRL passes columns of other kinds too, such as its trainer's state
    if len(sizes) != count:
        raise UmedError(
            f"reward {name!r}: scale returned {len(sizes)} numbers for {count} answers. It must return one for each."
        )
    return sizes


def _size_of(name: str, value: Any) -> float:
    size = as_float(value)
    if size is None or not 0 <= size < math.inf:
        raise UmedError(f"reward {name!r}: its scale is {shown(value)}. Allowed: finite numbers of 0 or more.")
    return size


def call_reward(
    reward: Callable[..., Any], prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> Any:
    """What a reward, or its ``start``, returns for a batch.

    As in TRL, everything is passed by keyword, so ``def f(completions, **kwargs)`` is a reward too. A function that gives its
    first two parameters other names gets them by position.
    """
    if is_called_by_position(reward, columns):
        return reward(prompts, completions, **columns)
    return reward(prompts=prompts, completions=completions, **columns)


@contextmanager
def failing_as(name: str, reward: Any, records: Iterable[Any] = ()) -> Iterator[None]:
    """A block that calls something of a reward: what it raises becomes an error for which a run saves what it has learnt.

    Args:
        name: of the reward.
        reward: whose own file the message names.
        records: that the reward is called with, one for each answer.

    Raises:
        UmedError: names the reward, the error, its file and line, and up to three of the records.
    """
    try:
        yield
    except UmedError:
        raise
    except Exception as error:
        ids = list(dict.fromkeys(str(r["id"]) for r in records if isinstance(r, Mapping) and "id" in r))
        asked = (
            f" It was asked about {len(ids)} records: {', '.join(ids[:3])}{', ...' * (len(ids) > 3)}." if ids else ""
        )
        remedy = "Mend it there" + (", or let it return None for an answer that it cannot score" if ids else "")
        found = f"{type(error).__name__}: {one_line(str(error))} ({_place_of(error, reward)})"
        raise UmedError(f"reward {name!r} raised {found}.{asked} {remedy}.") from error


def _place_of(error: Exception, reward: Any) -> str:
    """File and line of the reward's own code that an error came through; without any, where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    module = sys.modules.get(getattr(reward, "__module__", None) or type(reward).__module__)
    own = [frame for frame in frames if frame.filename == getattr(module, "__file__", None)]
    place = (own or frames)[-1]
    return f"{place.filename}, line {place.lineno}"
