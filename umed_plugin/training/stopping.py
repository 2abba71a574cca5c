"""End a run in which a reward says to stop, with a checkpoint to go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from umed_plugin.errors import UmedError
from umed_plugin.rewards.contract import Reward


class StopForReward(TrainerCallback):
    """Ends a run in which a reward says to stop: after the step, with a checkpoint, in all processes, as an error.

    An error, because whatever comes after training in a script must not go on with a model that is trained half.

    Args:
        rewards: of this process.
        on_any_rank: true in all processes when its argument is true in one of them.
    """

    def __init__(self, rewards: Mapping[str, Reward], on_any_rank: Callable[[bool], bool]) -> None:
        self._rewards = [reward for reward in rewards.values() if hasattr(reward, "stop")]
        self._in_any_process = on_any_rank
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
