"""What a reward returned, as the numbers that a run computes with: a list of Python's floats, and None where it cannot score.

A user's own reward may return whole numbers, truth values, a NumPy array or a tensor on any device. What is no list of numbers is
refused here, with the reward's name: later it would be a bare error of torch, or one of JSON after hours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from numbers import Real
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.terminal.text import one_line

# Advantages are float32: what is larger would be infinite there.
_LARGEST = 3.4e38
_SHOWN = 60  # characters of a wrong value


def values_of(name: str, returned: Any, count: int) -> list[Any]:
    """What a reward returned for ``count`` answers as a list of that length; `numbers_of` looks at what is in it.

    Raises:
        UmedError: it is no list, or one of another length.
    """
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping, Set)):
        missing = ", as a function without `return` does" if values is None else ""
        raise UmedError(f"reward {name!r} returned {shown(values)}{missing}. It must return a list: {_allowed(count)}.")
    values = list(values)
    if len(values) != count:
        raise UmedError(
            f"reward {name!r} returned {len(values)} values for {count} answers. It must return {_allowed(count)}."
        )
    return values


def numbers_of(name: str, values: Iterable[Any]) -> list[float | None]:
    """The values of a reward as floats; None stays None.

    Raises:
        UmedError: a value is no finite number.
    """
    return [None if value is None else _float_of(name, value) for value in values]


def as_float(value: Any) -> float | None:
    """A number of Python, NumPy or torch as a float; None for anything else."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(plain, Real):
        return None
    try:
        return float(plain)
    except OverflowError:  # a whole number beyond every float
        return float("inf")


def shown(value: Any) -> str:
    """A wrong value inside a message, on one line and not endless."""
    number = as_float(value)
    text = one_line(repr(value) if number is None else number)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _float_of(name: str, value: Any) -> float:
    number = as_float(value)
    if number is None or not abs(number) <= _LARGEST:
        raise UmedError(
            f"reward {name!r} returned {shown(value)}. Allowed: finite numbers, or None for a candidate that it cannot score."
        )
    return number


def _allowed(count: int) -> str:
    return f"one number for each of the {count} answers, or None for one that it cannot score"
