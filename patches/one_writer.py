"""Let one process write the result of a run of several.

Targets: `LLaVATrainer.save_state`, which `train()` calls before it saves, and `safe_save_model_for_hf_trainer`.
Why: LLaVA writes an adapter, a projector and ``non_lora_trainables.bin`` in every process whose local rank is 0 or -1. That is
one process of each machine, and all of them write the same files of a shared folder at the same time. ``config.json`` beside a
projector is written by all processes.
Versions: LLaVA 1.2.x.
Delete when: LLaVA saves its result where ``args.should_save`` is true, as its full models are.

Only with ``--umed_stage``. `TrainingArguments.should_save` is true in the first process, and with ``--save_on_each_node`` in the
first one of each machine. transformers 5 sets no local rank at all; `old_flags` does.
"""

from __future__ import annotations

import sys
from typing import Any

from umed_plugin.patches.training_run import LLAVA, TRAIN
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Wrap the method, which our own trainer inherits, and the function."""
    from llava.train.llava_trainer import LLaVATrainer

    llava_train = sys.modules["llava.train.train"]
    stock_save_state, stock_save = LLaVATrainer.save_state, llava_train.safe_save_model_for_hf_trainer

    def save_state(self: Any) -> None:
        stock_save_state(self)
        if getattr(self.args, "umed_stage", None) is not None:
            # Training is over: from here on, only LLaVA's decision who writes reads this number.
            self.args.local_rank = 0 if self.args.should_save else max(self.args.local_process_index, 1)

    def safe_save_model_for_hf_trainer(trainer: Any, output_dir: str) -> None:
        has_stage = getattr(trainer.args, "umed_stage", None) is not None
        if has_stage and getattr(trainer.args, "tune_mm_mlp_adapter", False) and not trainer.args.should_save:
            _gather_projector(trainer)
        else:
            stock_save(trainer=trainer, output_dir=output_dir)

    recorder.replace(LLaVATrainer, "save_state", save_state)
    recorder.replace(llava_train, "safe_save_model_for_hf_trainer", safe_save_model_for_hf_trainer)


def _gather_projector(trainer: Any) -> None:
    """Take part in what ZeRO-3 gathers in all processes for the one that writes."""
    names = ["mm_projector"]
    if getattr(trainer.args, "use_im_start_end", False):
        names += ["embed_tokens", "embed_in"]
    sys.modules["llava.train.train"].get_mm_adapter_state_maybe_zero_3(trainer.model.named_parameters(), names)


PATCH = Patch(
    name="one_writer",
    targets=(
        TRAIN,
        Target(
            "llava.train.train:safe_save_model_for_hf_trainer",
            LLAVA,
            ("338fa2d14b46845d88b88350b3ae3202c6b2cb1e6409e8d0d03a0022427ca8fb",),
        ),
        Target("llava.train.llava_trainer:LLaVATrainer", LLAVA, ()),
    ),
    why="several processes write the same files of an adapter or a projector at the same time when a run ends",
    delete_when="LLaVA saves its result where args.should_save is true",
    change=change,
)
