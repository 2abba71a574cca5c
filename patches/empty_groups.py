"""Train each weight at its own rate under DeepSpeed, also where a group of the optimizer has no weights.

Targets: `LLaVATrainer.create_optimizer` and `_load_optimizer_and_scheduler`.
Why: LLaVA makes four groups of weights, of which LoRA and Mistral leave one empty. transformers 4 makes the schedule over all
four, and then DeepSpeed removes the empty one. torch 2.0 pairs groups and rates by their place. So each later group gets the rate
of the one before it: the projector learns at ``--learning_rate``, not at ``--mm_projector_lr``.
Versions: LLaVA 1.2.x with transformers 4. transformers 5 makes the schedule after DeepSpeed, and loses nothing by the change.
Delete when: LLaVA makes no empty group, or its pins are no longer used.

Only with ``--umed_stage`` and DeepSpeed. Without it the groups stay: torch resumes only with as many groups as a checkpoint has.
Under DeepSpeed the optimizer in a checkpoint never had the empty group. Its schedule had, so that of an earlier release is loaded
without its rates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from umed_plugin.errors import warn
from umed_plugin.patches.training_run import LLAVA, TRANSFORMERS
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Wrap both methods. Our own trainers inherit them."""
    from llava.train.llava_trainer import LLaVATrainer

    stock, stock_load = LLaVATrainer.create_optimizer, LLaVATrainer._load_optimizer_and_scheduler

    def create_optimizer(self: Any, *args: Any) -> Any:
        new = self.optimizer is None
        optimizer = stock(self, *args)
        if new and _takes_part(self):
            from umed_plugin.training.trained_tower import drop_empty_groups

            drop_empty_groups(optimizer)
        return optimizer

    def _load_optimizer_and_scheduler(self: Any, checkpoint: Any) -> None:
        if checkpoint is None or not _takes_part(self) or not _loads_all_but_rates(self, Path(checkpoint)):
            stock_load(self, checkpoint)

    recorder.replace(LLaVATrainer, "create_optimizer", create_optimizer)
    recorder.replace(LLaVATrainer, "_load_optimizer_and_scheduler", _load_optimizer_and_scheduler)


def _takes_part(trainer: Any) -> bool:
    return getattr(trainer.args, "umed_stage", None) is not None and bool(trainer.args.deepspeed)


def _loads_all_but_rates(trainer: Any, checkpoint: Path) -> bool:
    """Load a schedule that was made over an empty group too, and give each group this run's own rate; no other schedule."""
    import torch

    schedule, file = trainer.lr_scheduler, checkpoint / "scheduler.pt"
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR) or not file.is_file():
        return False
    state = torch.load(file, weights_only=True)
    if len(state["base_lrs"]) <= len(schedule.base_lrs):
        return False
    own = [base * scale(state["last_epoch"]) for base, scale in zip(schedule.base_lrs, schedule.lr_lambdas)]
    kept = {"base_lrs": schedule.base_lrs, "lr_lambdas": [None] * len(own), "_last_lr": own}
    schedule.load_state_dict({**state, **kept})
    for group, rate in zip(schedule.optimizer.param_groups, own):
        group["lr"] = rate
    if trainer.args.process_index == 0 and len({*state["base_lrs"]}) > 1:  # else all groups learned at one rate
        warn(
            f"{checkpoint} was trained by an earlier release, under which projector and tower learned at the rate of another "
            "group of weights. From here on each learns at its own. To train all steps so, choose another --output_dir."
        )
    return True


PATCH = Patch(
    name="empty_groups",
    targets=(
        Target(
            "llava.train.llava_trainer:LLaVATrainer.create_optimizer",
            LLAVA,
            ("d09d89594604ff2ee903617139fd3d1ffd73208852254184652d59cb574371ea",),
        ),
        Target(
            "transformers.trainer:Trainer._load_optimizer_and_scheduler",
            TRANSFORMERS,
            (
                "8c64d83248a92e258f9944285b030a71527447d1c9210078fdab8e4377bff1a4",  # 4.36 and 4.37
                "741032f57d6fb80211506bf521f67bdd0ff876ad39cc50e700c9c2bab2efb251",  # 5.23
            ),
        ),
    ),
    why="under DeepSpeed, transformers 4 and torch 2.0 train each group of weights at the rate of the group before, once LoRA or "
    "Mistral leaves a group empty",
    delete_when="LLaVA makes no empty group, or LLaVA's pins are no longer used",
    change=change,
)
