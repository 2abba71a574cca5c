"""Says that weights of ``--umed_reward_weights`` which change over the run cannot do so in a run of a single rollout.

The number of steps is known when training begins. Such a run is a trial, so it goes on.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from umed_plugin.errors import warn
from umed_plugin.flags.definition import UmedFlags


class ScheduleCheck(TrainerCallback):
    """Warns once, on the first rank, before the first step; ``flags`` are those of the run."""

    def __init__(self, flags: UmedFlags) -> None:
        self._flags = flags

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Look at the number of steps."""
        steps = self._flags.steps_per_rollout()
        changes = any(weight.changes for weight in self._flags.reward_schedule())
        if changes and state.max_steps <= steps and args.process_index == 0:
            warn(
                f"--umed_reward_weights {self._flags.umed_reward_weights}: this run has {state.max_steps} steps and a rollout "
                f"feeds {steps}, so there is one rollout, and each weight keeps its first value. More steps let it change."
            )
