"""Let LLaVA's trainer and transformers 5 call each other.

Targets: `LLaVATrainer.__init__` and `_get_train_sampler`, and `Trainer._save_checkpoint` of transformers.
Why: (1) LLaVA passes its tokenizer as ``tokenizer``; transformers 5 expects ``processing_class``. (2) transformers 5 passes the
dataset to `_get_train_sampler`; LLaVA's accepts none. (3) LLaVA passes metrics to `_save_checkpoint`; transformers 5 accepts
none. (4) transformers 4.36 writes a checkpoint into ``tmp-checkpoint-N`` and renames it; transformers 5 writes it in place. So
a run that is killed while it writes resumes from half a checkpoint, or not at all.
Versions: LLaVA 1.2.x, transformers 5.
Delete when: LLaVA's trainer has the signatures of transformers 5, and transformers writes checkpoints atomically.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

from umed_plugin.patches.training_run import LLAVA, ON_5, TRANSFORMERS_5
from umed_plugin.patching import Patch, Recorder, Target

ASIDE = "tmp-"


def change(recorder: Recorder) -> None:
    """Wrap all three."""
    from llava.train.llava_trainer import LLaVATrainer
    from transformers import Trainer

    stock_init = LLaVATrainer.__init__
    stock_sampler = LLaVATrainer._get_train_sampler
    stock_save = Trainer._save_checkpoint

    def __init__(self: Any, *args: Any, tokenizer: Any = None, **keywords: Any) -> None:
        if tokenizer is not None:
            keywords["processing_class"] = tokenizer
        stock_init(self, *args, **keywords)

    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
        return stock_sampler(self)

    def _save_checkpoint(self: Any, model: Any, trial: Any, metrics: Any = None) -> None:
        _written_aside(self, stock_save, model, trial)

    recorder.replace(LLaVATrainer, "__init__", __init__)
    recorder.replace(LLaVATrainer, "_get_train_sampler", _get_train_sampler)
    recorder.replace(Trainer, "_save_checkpoint", _save_checkpoint)


def _written_aside(trainer: Any, stock_save: Any, model: Any, trial: Any) -> None:
    """Write the checkpoint into ``tmp-checkpoint-N`` and rename it when it is complete, as transformers 4.36 does."""
    from transformers import trainer as transformers_trainer
    from transformers.trainer_utils import rotate_checkpoints

    run_dir = trainer._get_output_dir(trial=trial)
    name = f"{transformers_trainer.PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    aside, checkpoint = os.path.join(run_dir, ASIDE + name), os.path.join(run_dir, name)
    if trainer.args.should_save:
        shutil.rmtree(aside, ignore_errors=True)  # left by a run that was killed
    trainer.accelerator.wait_for_everyone()
    prefix = transformers_trainer.PREFIX_CHECKPOINT_DIR
    transformers_trainer.PREFIX_CHECKPOINT_DIR = ASIDE + prefix
    try:
        stock_save(trainer, model, trial)
    finally:
        transformers_trainer.PREFIX_CHECKPOINT_DIR = prefix
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        shutil.rmtree(checkpoint, ignore_errors=True)
        os.rename(aside, checkpoint)
        rotate_checkpoints(
            output_dir=run_dir,
            save_total_limit=trainer.args.save_total_limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=True,
        )
    trainer.accelerator.wait_for_everyone()


PATCH = Patch(
    name="trainer_signatures",
    targets=(
        Target(
            "llava.train.llava_trainer:LLaVATrainer._get_train_sampler",
            LLAVA,
            ("283f52d877d9ba39a9aa9996c2a6c850d14aefb3ecdaf1d00dcc1eff1e6e64db",),
        ),
        Target(
            "llava.train.llava_trainer:LLaVATrainer._save_checkpoint",
            LLAVA,
            ("c7c4f221acd1b64cda695e18f02eede5abbcdd82a581eb7a901d30b2590a511c",),
        ),
        Target("transformers.trainer:Trainer.__init__", TRANSFORMERS_5, ()),
        Target(
            "transformers.trainer:Trainer._save_checkpoint",
            TRANSFORMERS_5,
            ("a9111e30faa9933986e022e56b5af81fd990356db64d727b4c320c852283bf3b",),
        ),
        Target("transformers.trainer:rotate_checkpoints", TRANSFORMERS_5, ()),
    ),
    why="LLaVA's trainer and transformers 5 pass each other arguments that the other does not accept, and a checkpoint that was "
    "being written when the run was killed looks complete",
    delete_when="LLaVA's trainer has the signatures of transformers 5, and transformers writes checkpoints atomically",
    change=change,
    trigger="llava.train.llava_trainer",
    needed=ON_5,
)
