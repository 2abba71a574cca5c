"""Train stage 2 with our trainer, a subclass of LLaVA's.

Target: the global `LLaVATrainer` of `llava.train.train`.
Why: `train()` always creates a LLaVATrainer, which can only do supervised training.
Versions: LLaVA 1.2.x.
Delete when: LLaVA's `train()` accepts a trainer class from its caller.
"""

from __future__ import annotations

import sys
from typing import Any

from umed_plugin.flags.definition import REWARDING
from umed_plugin.patches.training_run import LLAVA, TRAIN
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Rebind the class that `train()` calls to a function that chooses one."""
    llava_train = sys.modules["llava.train.train"]
    stock = llava_train.LLaVATrainer

    def choose_trainer(*positional: Any, **keywords: Any) -> Any:
        if keywords["args"].umed_stage != REWARDING:
            return stock(*positional, **keywords)
        from umed_plugin.training.trainer import RewardingTrainer

        return RewardingTrainer(*positional, **keywords)

    recorder.replace(llava_train, "LLaVATrainer", choose_trainer)


PATCH = Patch(
    name="trainer",
    targets=(
        TRAIN,
        Target(
            "llava.train.train:LLaVATrainer",
            LLAVA,
            ("a65e56ee52c884ad0c2b5ea9a8527859b08926bd0cb0592c2ea5e61b9129309f",),
        ),
    ),
    why="train() always creates a LLaVATrainer, which can only do supervised training",
    delete_when="LLaVA's train() accepts a trainer class from its caller",
    change=change,
)
