"""The flags that choose rewards and judge: what several of them must agree on, the user's own rewards, and the judge's files.

Like `umed_plugin.flags.definition`, whose dataclass holds them, this imports the standard library alone.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from umed_plugin.errors import UsageError, unknown_name
from umed_plugin.flags import weights
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.flags.names import MAX_NORMALISED, OPENAI, REPLAY, SHIPPED_REWARDS, SYMBOLIC, is_own_reward
from umed_plugin.flags.rules import parse_judge_options
from umed_plugin.registry import Registry
from umed_plugin.remote import settings

# An empty registry: it only imports what is named module:attribute. The shipped rewards need NumPy and are not imported here.
_OWN_REWARDS: Registry[Any] = Registry("reward")

DEFAULT_PROMPT = Path(__file__).parent.parent / "rewards" / "judges" / "prompt.txt"


def find_reward_faults(flags: UmedFlags, *, imported: bool) -> list[str]:
    """Faults of ``--umed_rewards`` and their weights; ``imported`` also imports and checks the user's own rewards."""
    names = flags.reward_names()
    faults = [
        f"--umed_rewards: {unknown_name('reward', name, SHIPPED_REWARDS)} Your own: 'my_module:my_reward'."
        for name in names
        if name not in SHIPPED_REWARDS and ":" not in name
    ]
    faults += [fault for name in names if (fault := _symbolic_fault(name))]
    faults += [f"--umed_rewards names {name!r} twice." for name in sorted(set(names)) if names.count(name) > 1]
    try:
        given = flags.reward_schedule()
    except ValueError:
        return [*faults, f"--umed_reward_weights {flags.umed_reward_weights!r}: must be {weights.FORMS}."]
    if len(given) != len(names):
        faults.append(
            f"--umed_reward_weights has {len(given)} numbers for the {len(names)} rewards {', '.join(names)}."
        )
    faults += weights.faults(given, f"--umed_reward_weights {flags.umed_reward_weights}")
    if imported:
        own = [name for name in names if is_own_reward(name)]
        of_own = [fault for name in own if (fault := _own_reward_fault(name))]
        faults += of_own or _floor_faults(flags, own)
    return faults


def _floor_faults(flags: UmedFlags, own: list[str]) -> list[str]:
    """``--umed_reward_floor`` where only rewards of the user could be normalised, and none asks for it.

    What `for_records` returns may ask for it later, so a reward that has it is believed.
    """
    unset = flags.umed_reward_floor == UmedFlags().umed_reward_floor
    if unset or not own or {*MAX_NORMALISED} & {*flags.reward_names()}:
        return []
    rewards = [_OWN_REWARDS.get(name) for name in own]
    if any(getattr(reward, "max_normalised", False) or hasattr(reward, "for_records") for reward in rewards):
        return []
    return [
        f"--umed_reward_floor {flags.umed_reward_floor:g} has no effect: none of {', '.join(own)} has the attribute "
        "max_normalised = True, so no maximum is divided by. Set it there, or remove the flag."
    ]


def _symbolic_fault(name: str) -> str | None:
    """Why the file of the reward ``symbolic:FILE`` cannot be read; `umed_plugin.rewards.symbols` checks what is in it."""
    if name == SYMBOLIC:
        return "--umed_rewards symbolic: needs the file of its steps and cases, as in symbolic:steps.yaml."
    if name.startswith(f"{SYMBOLIC}:") and not os.path.isfile(name.partition(":")[2]):
        return f"--umed_rewards {name}: there is no such file."
    return None


def _own_reward_fault(name: str) -> str | None:
    """Why ``module:attribute`` cannot be a reward; checked before the model is loaded."""
    try:
        reward = _OWN_REWARDS.get(name)
    except UsageError as error:
        return f"--umed_rewards: {error}"
    is_class = isinstance(reward, type)
    callable_ = any("__call__" in vars(base) for base in reward.__mro__) if is_class else callable(reward)
    if not callable_:
        what = "class whose objects cannot be called" if is_class else type(reward).__name__
        return f"--umed_rewards: {name!r} is {what} and not a function."
    if is_class and not takes_arguments(reward):
        return f"--umed_rewards: the class {name!r} must be callable without arguments, but its __init__ requires some."
    if inspect.iscoroutinefunction(reward.__call__ if is_class else reward):
        return f"--umed_rewards: {name!r} is an async function. Declare it with def; slow work begins in its method `start`."
    self_argument = (None,) if is_class else ()
    return _signature_fault(name, reward.__call__ if is_class else reward, self_argument)


# What a reward gets by keyword in stage 2, as `umed_plugin.rewards` says.
_COLUMNS = ("record", "geometry", "attention_on_lesion")


def _signature_fault(name: str, function: Any, self_argument: tuple[Any, ...]) -> str | None:
    """Why a function cannot be called as a reward, with the parameters that are in the way; None if it can.

    As `umed_plugin.rewards.contract.call_reward` calls it: all by keyword, or the first two by position.
    """
    by_keyword = ("prompts", "completions", *_COLUMNS)
    by_position = is_called_by_position(function, _COLUMNS, *self_argument)
    if by_position or takes_arguments(function, *self_argument, **dict.fromkeys(by_keyword)):
        return None
    declared = list(inspect.signature(function).parameters.values())[len(self_argument) :]
    named = {parameter.name for parameter in declared}
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in declared)
    refused = [] if open_ended else [given for given in by_keyword if given not in named]
    unknown = [
        parameter.name
        for parameter in declared
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and parameter.name not in by_keyword
    ]
    found = [f"it does not take {', '.join(refused)}"] if refused else []
    found += [f"it needs {', '.join(unknown)}, which no reward is given"] if unknown else []
    return (
        f"--umed_rewards: {name!r} does not accept the arguments of a reward: {'; '.join(found) or 'wrong order'}. A reward is "
        f"called by keyword with {', '.join(by_keyword)}. Declare it as def my_reward(prompts, completions, **columns), or as in "
        "TRL def my_reward(completions, **kwargs)."
    )


def is_called_by_position(function: Any, columns: Iterable[str], *self_argument: Any) -> bool:
    """Whether a reward gives questions and answers other names than TRL's, so that it must get the two by position."""
    rest = dict.fromkeys(columns)
    if takes_arguments(function, *self_argument, prompts=None, completions=None, **rest):
        return False
    if not takes_arguments(function, *self_argument, None, None, **rest):
        return False
    first_two = list(inspect.signature(function).parameters)[len(self_argument) :][:2]
    return first_two[:1] != ["completions"] and "prompts" not in first_two[1:]


def takes_arguments(function: Any, *positional: Any, **keywords: Any) -> bool:
    """Whether a function's signature accepts these arguments; True for a function written in C that has none."""
    try:
        inspect.signature(function).bind(*positional, **keywords)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def prompt_file(flags: UmedFlags) -> Path:
    """The file with the judge's prompt."""
    return DEFAULT_PROMPT if flags.umed_judge_prompt is None else Path(flags.umed_judge_prompt)


def options(flags: UmedFlags) -> dict[str, Any]:
    """``--umed_judge_options`` as a dictionary."""
    return parse_judge_options(flags.umed_judge_options)


def budget(flags: UmedFlags) -> tuple[float, str] | None:
    """``--umed_judge_budget`` as amount and unit (``requests``, ``tokens`` or ``usd``)."""
    return None if flags.umed_judge_budget is None else settings.parse_budget(flags.umed_judge_budget)


def prices(flags: UmedFlags) -> tuple[float, float] | None:
    """``--umed_judge_prices``: US dollars per million input and output tokens."""
    return None if flags.umed_judge_prices is None else settings.parse_prices(flags.umed_judge_prices)


def find_judge_faults(flags: UmedFlags, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Faults of the judge's server or replay file, its prompt, and its budget; the fields say what holds for each flag alone."""
    kind, target = flags.judge_kind(), flags.judge_target()
    if kind not in (OPENAI, REPLAY) or not target:
        return []  # a local judge, or one that the field's pattern refuses
    source = _server_faults(flags, environment) if kind == OPENAI else _replay_faults(target)
    return [*source, *_prompt_faults(flags), *_budget_faults(flags)]


def _server_faults(flags: UmedFlags, environment: Mapping[str, str]) -> list[str]:
    asker = f"--umed_judge {flags.umed_judge}"
    address = settings.server_faults(asker, "--umed_judge_base_url", flags.umed_judge_base_url, environment)
    return settings.package_fault(asker) + address


def _replay_faults(file: str) -> list[str]:
    if os.path.isfile(file):
        return []
    return [
        f"--umed_judge replay:{file}: there is no such file. A run with openai:MODEL writes judge.jsonl to its output folder."
    ]


def _prompt_faults(flags: UmedFlags) -> list[str]:
    file = prompt_file(flags)
    if not file.is_file():
        return [f"--umed_judge_prompt {file}: there is no such file. Start from a copy of {DEFAULT_PROMPT}."]
    try:
        text = file.read_text(encoding="utf-8")
    except ValueError as error:
        return [f"--umed_judge_prompt {file}: is not UTF-8 text ({error})."]
    missing = [placeholder for placeholder in ("{reference}", "{answer}") if placeholder not in text]
    return [
        f"--umed_judge_prompt {file}: has no {placeholder}, so the judge would not see it. See {DEFAULT_PROMPT}."
        for placeholder in missing
    ]


def _budget_faults(flags: UmedFlags) -> list[str]:
    try:
        limit = budget(flags)
    except ValueError:  # its field says so
        return []
    if limit is not None and limit[1] == "usd" and flags.umed_judge_prices is None:
        return ["--umed_judge_budget in usd needs --umed_judge_prices."]
    return []
