"""Train each weight at its own rate under DeepSpeed, also where a group of the optimizer has no weights.

Target: `LLaVATrainer.create_optimizer`.
Why: LLaVA makes four groups of weights, of which LoRA and Mistral leave one empty. transformers 4 makes the schedule over all
four, and then DeepSpeed removes the empty one. torch 2.0 pairs groups and rates by their place. So each later group gets the rate
of the one before it: the projector learns at ``--learning_rate``, not at ``--mm_projector_lr``.
Versions: LLaVA 1.2.x with transformers 4. transformers 5 makes the schedule after DeepSpeed, and loses nothing by the change.
Delete when: LLaVA makes no empty group, or its pins are no longer used.

Only with ``--umed_stage`` and DeepSpeed, whose checkpoints never had the empty groups. Those of a run without it have them, and
torch resumes only with as many groups.
"""

from __future__ import annotations

from typing import Any

from umed_plugin.patches.training_run import LLAVA
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Wrap the method. Our own trainers inherit it."""
    from llava.train.llava_trainer import LLaVATrainer

    stock = LLaVATrainer.create_optimizer

    def create_optimizer(self: Any, *args: Any) -> Any:
        new = self.optimizer is None
        optimizer = stock(self, *args)
        if new and getattr(self.args, "umed_stage", None) is not None and self.args.deepspeed:
            from umed_plugin.training.trained_tower import drop_empty_groups

            drop_empty_groups(optimizer)
        return optimizer

    recorder.replace(LLaVATrainer, "create_optimizer", create_optimizer)


PATCH = Patch(
    name="empty_groups",
    targets=(
        Target(
            "llava.train.llava_trainer:LLaVATrainer.create_optimizer",
            LLAVA,
            ("d09d89594604ff2ee903617139fd3d1ffd73208852254184652d59cb574371ea",),
        ),
    ),
    why="under DeepSpeed, transformers 4 and torch 2.0 train each group of weights at the rate of the group before, once LoRA or "
    "Mistral leaves a group empty",
    delete_when="LLaVA makes no empty group, or LLaVA's pins are no longer used",
    change=change,
)
