"""The rewards of one run: made once, started early in a step, asked what to log, and obeyed when one says to stop.

The contract that a reward keeps is in the docstring of :mod:`umed_plugin.rewards`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.rewards.judges.lexical import LOCAL_JUDGES
from umed_plugin.rewards.judges.relevance import JudgedRelevance
from umed_plugin.rewards.terms import REWARDS, Reward


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
    """Let the rewards that take their time begin."""
    for reward in rewards.values():
        if hasattr(reward, "start"):
            reward.start(prompts, completions, **columns)


def measures_of(rewards: Mapping[str, Reward]) -> list[str]:
    """All names that the rewards may log; the same in every process."""
    return [name for reward in rewards.values() for name in getattr(reward, "measures", ())]


def measured_by(rewards: Mapping[str, Reward]) -> dict[str, float]:
    """What the rewards have to log of their last call.

    Raises:
        UmedError: a reward logs a name that its ``measures`` does not announce.
    """
    values: dict[str, float] = {}
    for name, reward in rewards.items():
        measured = reward.measured() if hasattr(reward, "measured") else {}
        unknown = sorted(set(measured) - set(getattr(reward, "measures", ())))
        if unknown:
            raise UmedError(
                f"reward {name!r}: measured() gave {', '.join(unknown)}, which its attribute `measures` does not name. "
                "Every process must know all names beforehand: add them there."
            )
        values.update(measured)
    return values
