"""Stop a run when a reward asks for it, or fails, with a checkpoint to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from umed_plugin.errors import UmedError
from umed_plugin.rewards.contract import Reward, failing_as


class RewardError(UmedError):
    """A reward cannot go on, such as a judge that never answers."""


def on_any_rank(trainer: Any, condition: bool) -> bool:
    """Whether the condition is true on at least one rank. All ranks must call."""
    own = torch.tensor([float(condition)], device=trainer.args.device)
    return bool(trainer.accelerator.gather(own).max())


@contextmanager
def raised_together(
    on_any_rank: Callable[[bool], bool],
    kind: type[UmedError],
    elsewhere: str,
    caught: tuple[type[Exception], ...] = (UmedError,),
) -> Iterator[None]:
    """A block around what may fail on one rank alone; all ranks enter it. No rank is left waiting for one that failed.

    Args:
        on_any_rank: returns True on all ranks if its argument is true on at least one of them.
        kind: of the error that is raised, on all ranks.
        elsewhere: its message on a rank on which nothing failed.
        caught: what counts as failing.
    """
    fault: str | None = None
    try:
        yield
    except caught as error:
        fault = str(error)
    if on_any_rank(fault is not None):
        raise kind(fault or elsewhere)


def rewards_agreed(on_any_rank: Callable[[bool], bool]) -> AbstractContextManager[None]:
    """A block in which a reward may fail, such as a judge that never answers: a `RewardError` on all ranks. All enter it."""
    return raised_together(on_any_rank, RewardError, "a reward failed in another process; its message says why.")


class StopForReward(TrainerCallback):
    """Stops a run in which a reward asks for it: after the step, with a checkpoint, on all ranks, as an error.

    It is an error because a script must not continue after training with a half-trained model.

    Args:
        rewards: of this rank.
        on_any_rank: returns True on all ranks if its argument is true on at least one of them.
    """

    def __init__(self, rewards: Mapping[str, Reward], on_any_rank: Callable[[bool], bool]) -> None:
        self._rewards: dict[str, Any] = {name: reward for name, reward in rewards.items() if hasattr(reward, "stop")}
        self._on_any_rank = on_any_rank
        self._stopped = False
        self._reason: str | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> Any:
        """Request a checkpoint and the end of training, unless this is the last step anyway.

        Raises:
            RewardError: a reward's ``stop`` raised an exception; on all ranks.
        """
        if not self._rewards:
            return control
        # Read once a step: what a user's reward computes may fail, on one rank alone.
        with rewards_agreed(self._on_any_rank):
            self._reason = self._read()
        if self._on_any_rank(self._reason is not None) and state.global_step < state.max_steps:
            self._stopped = control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Raise the reason if the run was stopped. By now, logging integrations have closed their files.

        Raises:
            UmedError: names the checkpoint to resume from.
        """
        if self._stopped:
            reason = self._reason or "a reward on another rank asked to stop; its message says why."
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            raise UmedError(f"training stopped after step {state.global_step}: {reason} Saved: {checkpoint}")

    def _read(self) -> str | None:
        for name, reward in self._rewards.items():
            with failing_as(name, reward):
                if reason := reward.stop:
                    return str(reason)
        return None
