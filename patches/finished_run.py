"""Let a run that is started again after its last step save its result, and train no further step.

Targets: `LLaVATrainer.train`, inherited from transformers, and `Trainer._inner_training_loop`, on which the change relies.
Why: transformers checks whether the last step is done only after a step. Saving a large model takes minutes. A run that is killed
after its last checkpoint and before the end of saving resumes from that checkpoint and trains one step too many, unless an epoch
ends there.
Versions: LLaVA 1.2.x, transformers 4.36, 4.37 and 5.23.
Delete when: transformers compares the step at which it resumes with the number of steps.

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
    """Wrap the method. Our own trainer inherits it."""
    from llava.train.llava_trainer import LLaVATrainer
    from transformers import TrainerCallback

    stock = LLaVATrainer.train

    class NoFurtherStep(TrainerCallback):
        """Checks at the beginning of training, after the checkpoint to resume from is loaded."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            if 0 < state.max_steps <= state.global_step:
                raise _AllStepsAreDone

    def train(self: Any, *args: Any, **keywords: Any) -> Any:
        if getattr(self.args, "umed_stage", None) is None:
            return stock(self, *args, **keywords)
        self.add_callback(NoFurtherStep)
        try:
            return stock(self, *args, **keywords)
        except _AllStepsAreDone:
            if self.args.process_index == 0:
                note(f"all {self.state.max_steps} steps were done before. Saving their result.")
            return None

    recorder.replace(LLaVATrainer, "train", train)


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
    why="a run that is killed while it saves its result trains one step too many when it is started again",
    delete_when="transformers compares the step at which it resumes with the number of steps",
    change=change,
)
