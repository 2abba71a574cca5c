"""Let a run that is started again after its last step save its result, and a resumed one use its own batch size.

Targets: `LLaVATrainer.train` and `_inner_training_loop`, inherited from transformers.
Why: (1) transformers checks whether the last step is done only after a step. Saving a large model takes minutes. A run that is
killed after its last checkpoint and before the end of saving resumes from that checkpoint and trains one step too many, unless
an epoch ends there. (2) transformers 4 resumes with the checkpoint's batch size, whatever --per_device_train_batch_size says. A
run that goes on in other processes, with batches of another size, would then take other steps than its flags say.
Versions: LLaVA 1.2.x, transformers 4.36, 4.37 and 5.23.
Delete when: transformers compares the step at which it resumes with the number of steps, and LLaVA's pins are no longer used.

Only with ``--umed_stage``.
"""

from __future__ import annotations

from typing import Any

from umed_plugin.errors import note
from umed_plugin.patches.training_run import LLAVA, TRANSFORMERS
from umed_plugin.patching import Patch, Recorder, Target


class _AllStepsAreDone(Exception):
    """Leaves transformers' loop before its first batch, after model, optimizer and state are loaded."""


def change(recorder: Recorder) -> None:
    """Wrap both methods. Our own trainer inherits it."""
    from llava.train.llava_trainer import LLaVATrainer
    from transformers import TrainerCallback

    stock, stock_loop = LLaVATrainer.train, LLaVATrainer._inner_training_loop

    class NoFurtherStep(TrainerCallback):
        """Checks at the beginning of training, after the checkpoint to resume from is loaded."""

        def __init__(self, stopping: Any) -> None:
            self.stopping = stopping

        def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            stopping = self.stopping
            if 0 < state.max_steps <= state.global_step or (stopping and state.global_step and stopping.ended()):
                raise _AllStepsAreDone

    def train(self: Any, *args: Any, **keywords: Any) -> Any:
        if getattr(self.args, "umed_stage", None) is None:
            return stock(self, *args, **keywords)
        stopping = getattr(self, "umed_early_stopping", None)
        self.add_callback(NoFurtherStep(stopping))
        try:
            output = stock(self, *args, **keywords)
        except _AllStepsAreDone:
            output = None
            if self.args.process_index == 0:
                note(
                    f"all {self.state.global_step} steps were done before. Saving their result. To go on, raise --max_steps "
                    "or --num_train_epochs; to train anew, choose another --output_dir."
                )
        if stopping is not None:
            stopping.restore()
        return output

    def _inner_training_loop(self: Any, batch_size: int | None = None, *args: Any, **keywords: Any) -> Any:
        if getattr(self.args, "umed_stage", None) is not None and not self.args.auto_find_batch_size:
            batch_size = self._train_batch_size = self.args.train_batch_size
        return stock_loop(self, batch_size, *args, **keywords)

    recorder.replace(LLaVATrainer, "train", train)
    recorder.replace(LLaVATrainer, "_inner_training_loop", _inner_training_loop)


PATCH = Patch(
    name="finished_run",
    targets=(
        Target("llava.train.llava_trainer:LLaVATrainer", LLAVA, ()),
        Target(
            "transformers.trainer:Trainer._inner_training_loop",
            TRANSFORMERS,
            (
                "000dd3ec22eb914329e49b64992a634fba491d70372e0b20482289a824289987",  # 4.36
                "9caed1a498d1c257550f7507ec8b29ff4bab559583f3f439c663769dce1dbcf4",  # 4.37
                "20ec4276e99fe7aee4db57e6d2dbe9455982362f051a96c9a1be3e6190d7a90a",  # 5.23
            ),
        ),
    ),
    why="a run that is killed while it saves its result trains one step too many when it is started again, and transformers 4 "
    "resumes with the checkpoint's batch size",
    delete_when="transformers compares the step at which it resumes with the number of steps, and "
    "LLaVA's pins are no longer used",
    change=change,
)
