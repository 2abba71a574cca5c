"""Save a full model that DeepSpeed trained on a machine without CUDA.

Target: `safe_save_model_for_hf_trainer` in `llava.train.train`.
Why: under DeepSpeed it synchronizes with a GPU before it saves. So a run on CPUs fails at its very end, when it saves the model.
Versions: LLaVA 1.2.x.
Delete when: LLaVA synchronizes only if there is a GPU.
"""

from __future__ import annotations

import sys
from typing import Any

from umed_plugin.patches.training_run import LLAVA
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Wrap the function that `train()` calls."""
    import torch

    llava_train = sys.modules["llava.train.train"]
    stock = llava_train.safe_save_model_for_hf_trainer

    def safe_save_model_for_hf_trainer(trainer: Any, output_dir: str) -> None:
        only_projector = getattr(trainer.args, "tune_mm_mlp_adapter", False)
        if trainer.deepspeed is None or only_projector or torch.cuda.is_available():
            stock(trainer=trainer, output_dir=output_dir)
        else:
            trainer.save_model(output_dir)

    recorder.replace(llava_train, "safe_save_model_for_hf_trainer", safe_save_model_for_hf_trainer)


PATCH = Patch(
    name="deepspeed_save",
    targets=(
        Target(
            "llava.train.train:safe_save_model_for_hf_trainer",
            LLAVA,
            ("338fa2d14b46845d88b88350b3ae3202c6b2cb1e6409e8d0d03a0022427ca8fb",),
        ),
    ),
    why="a DeepSpeed run on CPUs fails when it saves the trained model",
    delete_when="LLaVA synchronizes only if there is a GPU",
    change=change,
)
