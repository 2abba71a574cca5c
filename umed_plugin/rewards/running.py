"""The rewards of one run: made once, started early in a step, asked what to log, and obeyed when one says to stop.

The contract that a reward keeps is in the docstring of :mod:`umed_plugin.rewards`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

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


class StopForReward(TrainerCallback):
    """Ends a run in which a reward says to stop: after the step, with a checkpoint, in all processes, as an error.

    An error, because whatever comes after training in a script must not go on with a model that is trained half.

    Args:
        rewards: of this process.
        in_any_process: true in all processes when its argument is true in one of them.
    """

    def __init__(self, rewards: Mapping[str, Reward], in_any_process: Callable[[bool], bool]) -> None:
        self._rewards = [reward for reward in rewards.values() if hasattr(reward, "stop")]
        self._in_any_process = in_any_process
        self._stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> Any:
        """Ask for a checkpoint and the end of training, unless this step is the last one anyway."""
        if self._rewards and self._in_any_process(self._reason() is not None) and state.global_step < state.max_steps:
            self._stopped = control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Leave with the reason when the run was stopped; the integrations that log have closed their files by now.

        Raises:
            UmedError: naming the checkpoint to go on from.
        """
        if self._stopped:
            reason = self._reason() or "another process was told to stop; its message says why."
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            raise UmedError(f"training stopped after step {state.global_step}: {reason} Saved: {checkpoint}")

    def _reason(self) -> str | None:
        return next((reward.stop for reward in self._rewards if reward.stop), None)
