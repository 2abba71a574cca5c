"""Let a run that is started again behind its last step save what it has, and train no step more.

Targets: `LLaVATrainer.train`, which is transformers', and `Trainer._inner_training_loop`, which it relies on.
Why: transformers looks whether the last step is done only after a step. A run that was killed between its last checkpoint and the
end of saving, which takes minutes for a large model, resumes from that checkpoint and trains one step too many, unless an epoch
happens to end there.
Versions: LLaVA 1.2.x, transformers 4.36, 4.37 and 5.23.
Delete when: transformers compares the step that it resumes at with the number of steps.

Only with ``--umed_stage``.
"""

from __future__ import annotations

from typing import Any

from umed_plugin.errors import note
from umed_plugin.patches.training_run import LLAVA, TRANSFORMERS
from umed_plugin.patching import Patch, Recorder, Target


class _AllStepsAreDone(Exception):
    """Leaves transformers' loop before its first batch, when model, optimizer and state are loaded."""


def change(recorder: Recorder) -> None:
    """Wrap the method; our own trainer inherits it."""
    from llava.train.llava_trainer import LLaVATrainer
    from transformers import TrainerCallback

    stock = LLaVATrainer.train

    class NoFurtherStep(TrainerCallback):
        """Looks when a run begins, which is after it has loaded the checkpoint that it resumes from."""

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
                note(f"all {self.state.max_steps} steps were done before; what they made is saved.")
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
    delete_when="transformers compares the step that it resumes at with the number of steps",
    change=change,
)
