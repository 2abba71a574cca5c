"""The flags that choose rewards and judge, read and checked before the model is loaded.

Like `umed_plugin.flags.definition`, whose dataclass holds them, this imports the standard library alone.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umed_plugin.errors import UsageError, unknown_name
from umed_plugin.flags.definition import DEFAULT_OPTIONS, PAPER_REWARDS, UmedFlags
from umed_plugin.registry import Registry
from umed_plugin.remote import settings

REWARDS = (*PAPER_REWARDS, "localization_diou")
# The plugin's own rewards need torch, so this one holds none and only imports what is named module:attribute.
_OWN_REWARDS: Registry[Any] = Registry("reward")

LOCAL_JUDGES = ("lexical", "classes")
OPENAI, REPLAY = "openai", "replay"
DEFAULT_PROMPT = Path(__file__).parent.parent / "rewards" / "judges" / "prompt.txt"


def find_reward_faults(flags: UmedFlags, *, imported: bool) -> list[str]:
    """What is wrong with ``--umed_rewards`` and their weights, as sentences; ``imported`` also imports rewards of one's own."""
    names = flags.reward_names()
    faults = [
        f"--umed_rewards: {unknown_name('reward', name, REWARDS)} Your own: 'my_module:my_reward'."
        for name in names
        if name not in REWARDS and ":" not in name
    ]
    faults += [f"--umed_rewards names {name!r} twice." for name in sorted(set(names)) if names.count(name) > 1]
    try:
        weights = flags.reward_weights()
    except ValueError:
        return [*faults, f"--umed_reward_weights {flags.umed_reward_weights!r}: must be numbers such as 1,0.5,1."]
    if len(weights) != len(names):
        faults.append(
            f"--umed_reward_weights has {len(weights)} numbers for the {len(names)} rewards {', '.join(names)}."
        )
    if any(not math.isfinite(weight) or weight < 0 for weight in weights) or not any(weights):
        faults.append(f"--umed_reward_weights {flags.umed_reward_weights}: must be 0 or more, and one of them above 0.")
    if imported:
        faults += [fault for name in names if ":" in name and (fault := _own_reward_fault(name))]
    return faults


def _own_reward_fault(name: str) -> str | None:
    """What keeps ``module:attribute`` from being a reward, found before the model is loaded."""
    try:
        found = _OWN_REWARDS.get(name)
    except UsageError as error:
        return f"--umed_rewards: {error}"
    is_class = isinstance(found, type)
    calls = any("__call__" in vars(base) for base in found.__mro__) if is_class else callable(found)
    if not calls:
        what = "class whose objects cannot be called" if is_class else type(found).__name__
        return f"--umed_rewards: {name!r} is {what} and no function."
    if is_class and not _takes(found):
        return f"--umed_rewards: the class {name!r} needs arguments to be made; a reward's class is called without any."
    me = [None] if is_class else []
    if not _takes(found.__call__ if is_class else found, *me, [], [], record=[], geometry=[], attention_on_lesion=[]):
        return (
            f"--umed_rewards: {name!r} does not take what it is given: reward(prompts, completions, record=..., geometry=..., "
            "attention_on_lesion=...). Write it as def my_reward(prompts, completions, **columns)."
        )
    return None


def _takes(function: Any, *positional: Any, **keywords: Any) -> bool:
    """Whether a function can be called like this, as far as its signature tells."""
    try:
        inspect.signature(function).bind(*positional, **keywords)
    except TypeError:
        return False
    except ValueError:  # written in C, without a signature
        return True
    return True


def judge_kind(flags: UmedFlags) -> str:
    """``lexical``, ``classes``, ``openai`` or ``replay``: the part of ``--umed_judge`` before the colon."""
    return flags.umed_judge.partition(":")[0]


def judge_target(flags: UmedFlags) -> str:
    """The model of ``openai:MODEL``, the file of ``replay:FILE``; empty for the local ones."""
    return flags.umed_judge.partition(":")[2]


def prompt_file(flags: UmedFlags) -> Path:
    """The file with the judge's prompt."""
    return DEFAULT_PROMPT if flags.umed_judge_prompt is None else Path(flags.umed_judge_prompt)


def options(flags: UmedFlags) -> dict[str, Any]:
    """``--umed_judge_options`` as a dictionary; ValueError when it is none."""
    return settings.parse_options(flags.umed_judge_options)


def budget(flags: UmedFlags) -> tuple[float, str] | None:
    """``--umed_judge_budget`` as amount and unit; ValueError when it is none."""
    return None if flags.umed_judge_budget is None else settings.parse_budget(flags.umed_judge_budget)


def prices(flags: UmedFlags) -> tuple[float, float] | None:
    """``--umed_judge_prices``: US dollars for a million tokens read and written; ValueError when it is none."""
    return None if flags.umed_judge_prices is None else settings.parse_prices(flags.umed_judge_prices)


def find_judge_faults(flags: UmedFlags, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What is wrong with the judge's flags, as sentences; whether each of them acts at all is checked with all other flags."""
    kind, target = judge_kind(flags), judge_target(flags)
    if flags.umed_judge in LOCAL_JUDGES:
        return []
    if kind not in (OPENAI, REPLAY) or not target:
        return [f"--umed_judge {flags.umed_judge!r}: allowed are lexical, classes, openai:MODEL and replay:FILE."]
    server = _server_faults(flags, environment) if kind == OPENAI else _replay_faults(target)
    return [*server, *_prompt_faults(flags), *_number_faults(flags)]


def _server_faults(flags: UmedFlags, environment: Mapping[str, str]) -> list[str]:
    asker = f"--umed_judge {flags.umed_judge}"
    address = settings.server_faults(asker, "--umed_judge_base_url", flags.umed_judge_base_url, environment)
    return settings.package_fault(asker) + address


def _replay_faults(file: str) -> list[str]:
    if os.path.isfile(file):
        return []
    return [
        f"--umed_judge replay:{file}: there is no such file. A run with openai:MODEL leaves judge.jsonl in its output folder."
    ]


def _prompt_faults(flags: UmedFlags) -> list[str]:
    file = prompt_file(flags)
    if not file.is_file():
        return [f"--umed_judge_prompt {file}: there is no such file. Begin with a copy of {DEFAULT_PROMPT}."]
    try:
        text = file.read_text(encoding="utf-8")
    except ValueError as error:
        return [f"--umed_judge_prompt {file}: is not UTF-8 text ({error})."]
    missing = [place for place in ("{reference}", "{answer}") if place not in text]
    return [
        f"--umed_judge_prompt {file}: has no {place}, so the judge would not see it. See {DEFAULT_PROMPT}."
        for place in missing
    ]


def _number_faults(flags: UmedFlags) -> list[str]:
    faults = []
    try:
        taken = sorted(set(options(flags)) & set(settings.SET_BY_US))
        if taken:
            faults.append(f"--umed_judge_options sets {', '.join(taken)}, which is not for it to set. Leave it out.")
    except ValueError:
        faults.append(
            f"--umed_judge_options {flags.umed_judge_options!r}: must be a JSON object such as '{DEFAULT_OPTIONS}'."
        )
    priced = flags.umed_judge_prices is not None
    try:
        prices(flags)
    except ValueError as error:
        faults.append(f"--umed_judge_prices {flags.umed_judge_prices!r}: {error}.")
    try:
        limit = budget(flags)
    except ValueError as error:
        limit = None
        faults.append(f"--umed_judge_budget {flags.umed_judge_budget!r}: {error}.")
    if limit is not None and limit[1] == "usd" and not priced:
        faults.append("--umed_judge_budget in usd needs --umed_judge_prices.")
    return faults
