"""Train with our trainers, subclasses of LLaVA's, and both stages with float32 weights and random numbers of each rank.

Target: the global `LLaVATrainer` of `llava.train.train`.
Why: (1) `train()` always creates a LLaVATrainer, whose only loss is that of supervised tokens. (2) Under ``--bf16`` and
``--fp16`` it trains weights of 16 bits. Without DeepSpeed nothing keeps float32 copies of them, and small steps are rounded
away. (3) All processes are seeded alike, so they would sample with the same random numbers. (4) Stage 2 has to know on which
share of the labelled studies stage 1 has trained: stage 1 writes it into the configuration that is saved.
Versions: LLaVA 1.2.x.
Delete when: LLaVA's `train()` accepts a trainer class from its caller.
"""

from __future__ import annotations

import sys
from typing import Any

from umed_plugin.errors import note, warn
from umed_plugin.flags.rules import REWARDING
from umed_plugin.patches.training_run import LLAVA, TRAIN
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Rebind the class that `train()` calls to a function that chooses one."""
    llava_train = sys.modules["llava.train.train"]
    stock = llava_train.LLaVATrainer

    def choose_trainer(*positional: Any, **keywords: Any) -> Any:
        args, trainer_class = keywords["args"], stock
        if args.umed_stage is None:
            return stock(*positional, **keywords)
        if args.umed_stage == REWARDING:
            from umed_plugin.training.trainer import RewardingTrainer

            trainer_class = RewardingTrainer
        elif _asks_for_more(args.umed):
            from umed_plugin.training.tuning_trainer import TuningTrainer

            trainer_class = TuningTrainer
        _name_label_share(keywords["model"], keywords["train_dataset"], args)
        _move_to_device(keywords["model"], args)
        if args.umed_tower_lr is not None:
            _train_tower(keywords["model"], args)
        # Stage 2's own trainer takes it: its guards compare with it.
        held_out = None if args.umed_stage == REWARDING else keywords.pop("val_dataset", None)
        _keep_masters(keywords["model"], args)
        trainer = trainer_class(*positional, **keywords)
        if held_out is not None:
            from umed_plugin.training.validation import HeldOutValidation

            trainer.add_callback(HeldOutValidation(trainer, held_out))
        if args.umed_stop_after:
            from umed_plugin.training.early_stopping import EarlyStopping

            trainer.umed_early_stopping = EarlyStopping(trainer)
            trainer.add_callback(trainer.umed_early_stopping)
        _watch_weights(trainer)
        _seed_this_rank(args)
        return trainer

    recorder.replace(llava_train, "LLaVATrainer", choose_trainer)


def _name_label_share(model: Any, dataset: Any, args: Any) -> None:
    """Let the saved configuration name the share of the labelled studies that stage 1 has trained on."""
    from umed_plugin.training.label_share import name_share

    name_share(model.config, args, dataset.data_args.umed_run.model_args, dataset.list_data_dict)


def _asks_for_more(flags: Any) -> bool:
    """Whether stage 1 needs more than LLaVA's own loss, order and learning rates."""
    further = flags.umed_attention_loss > 0 or flags.keeps()
    return bool(further or flags.umed_replay > 0 or flags.umed_tower_lr is not None)


def _move_to_device(model: Any, args: Any) -> None:
    """Move the model where DeepSpeed moves it a moment later: our trainers try its attention, and copy weights, before that.

    Without DeepSpeed the Trainer moves it at its start. ZeRO-3 has it in parts on the devices, and bitsandbytes loads it there.
    """
    in_parts = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if args.deepspeed and not in_parts and getattr(args, "bits", 16) == 16:
        model.to(args.device)


def _train_tower(model: Any, args: Any) -> None:
    """Let the vision tower be trained; LLaVA has frozen it when it loaded it."""
    from umed_plugin.training.trained_tower import unfreeze_tower

    entries = unfreeze_tower(model)
    if not (args.deepspeed or args.fsdp):
        # With its trained weights in float32 below. A CPU has no layer norm of bf16 weights over float32 values.
        model.get_vision_tower().vision_tower.float()
    if args.process_index == 0:
        note(f"the vision tower is trained: {entries:,} entries, at a learning rate of {args.umed_tower_lr:g}.")


def _keep_masters(model: Any, args: Any) -> None:
    """Keep what is trained in float32; DeepSpeed does so itself."""
    if args.deepspeed or not (args.bf16 or args.fp16):
        return
    if args.fsdp:
        if args.process_index == 0:
            # FSDP shards weights of one dtype only, so those that are trained cannot be cast alone.
            warn(
                "--fsdp trains weights of 16 bits without float32 copies: small steps are lost. Use --deepspeed instead."
            )
        return
    from umed_plugin.training.trained_weights import keep_in_float32

    cast = keep_in_float32(model)
    if cast.tensors and args.process_index == 0:
        note(str(cast))


def _watch_weights(trainer: Any) -> None:
    """End the run if weights are no longer finite, and say after the first steps which share of them moved.

    The share is said where a process has whole weights in the trained dtype.
    """
    from umed_plugin.training.finite_weights import FiniteWeights

    trainer.add_callback(FiniteWeights(trainer))
    if trainer.args.deepspeed or trainer.args.fsdp:
        return
    from umed_plugin.training.trained_weights import MovedShare

    trainer.add_callback(MovedShare)


def _seed_this_rank(args: Any) -> None:
    """Give each of several processes its own random numbers, after all have made the same model. Resuming restores them."""
    from transformers import set_seed

    if args.world_size > 1:
        set_seed(args.seed + args.process_index)


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
    why="train() always creates a LLaVATrainer, whose only loss is that of supervised tokens; it trains 16-bit weights without "
    "float32 copies, and gives all processes the same random numbers",
    delete_when="LLaVA's train() accepts a trainer class from its caller",
    change=change,
)
