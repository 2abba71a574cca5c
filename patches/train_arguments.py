"""Add the ``--umed_*`` flags to LLaVA's training scripts and check all flags before the model is loaded.

Target: `TrainingArguments` in `llava.train.train`, and `transformers.HfArgumentParser`, with which `train()` parses.
Why: `train()` unpacks exactly three dataclasses and refuses any flag outside them.
Versions: LLaVA 1.2.x, transformers 4.36, 4.37 and 5.23.
Delete when: LLaVA's `train()` accepts further dataclasses or arguments from its caller.

Checkpoints pickle the arguments. The new class has the name of the one it replaces, so ``training_args.bin`` also loads without
the plugin: as LLaVA's own class, with the flags as extra attributes.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from umed_plugin.errors import UsageError, did_you_mean, warn
from umed_plugin.files.locks import lock_for_the_process
from umed_plugin.flags.checks import find_faults, find_remarks, raise_faults
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.flags.names import SYMBOLIC
from umed_plugin.flags.rules import REWARDING, TUNING
from umed_plugin.patches import (
    attention_implementation,
    conversation_templates,
    lora_resume,
    model_class,
    quantized_base,
    vision_tower,
)
from umed_plugin.patches.training_run import BEFORE_5, LLAVA, TRAIN, TRANSFORMERS, TrainingRun
from umed_plugin.patching import Patch, Recorder, Target, version_fits
from umed_plugin.training.run_settings import last_checkpoint

# What transformers says about flags that it does not know, and about precisions that this machine lacks.
_UNUSED = re.compile(r"not used by the HfArgumentParser: (\[.*\])", re.DOTALL)
_OF_THE_MACHINE = ("support bf16/", "--tf32 requires", "half precision evaluation")


def change(recorder: Recorder) -> None:
    """Rebind LLaVA's TrainingArguments and the parser class."""
    llava_train = sys.modules["llava.train.train"]
    transformers = (
        llava_train.transformers
    )  # sys.modules may hold another object: transformers 5 can replace itself there
    arguments_class = _with_flags(llava_train.TrainingArguments)
    recorder.replace(llava_train, "TrainingArguments", arguments_class)
    recorder.replace(transformers, "HfArgumentParser", _checking_parser(transformers.HfArgumentParser, arguments_class))


def _with_flags(stock: type) -> type:
    """LLaVA's dataclass with the flags. They are the first base class, so they come last in ``__init__``."""

    @dataclass
    class TrainingArguments(UmedFlags, stock):
        @property
        def umed(self) -> UmedFlags:
            return UmedFlags.of(self)

    TrainingArguments.__module__ = stock.__module__
    TrainingArguments.__qualname__ = stock.__qualname__
    TrainingArguments.__doc__ = stock.__doc__
    return TrainingArguments


def _checking_parser(stock: type, arguments_class: type) -> type:
    """A parser that checks the flags after it has parsed LLaVA's three dataclasses; otherwise it behaves like the stock one."""

    class CheckingArgumentParser(stock):
        def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> tuple:
            parsed = self._parsed(*args, **kwargs)
            if len(parsed) >= 3 and isinstance(parsed[2], arguments_class):
                start_run(*parsed[:3])
            return parsed

        def _parsed(self, *args: Any, **kwargs: Any) -> tuple:
            try:
                return super().parse_args_into_dataclasses(*args, **kwargs)
            except ValueError as error:
                raise_explained(str(error), self._option_string_actions)
                raise

    return CheckingArgumentParser


def raise_explained(message: str, flags: Iterable[str]) -> None:
    """Raise what transformers says about unknown flags, or flags that this machine cannot do, with what to do about it.

    Args:
        message: of the ValueError that the stock parser raised.
        flags: all flags of the script.

    Raises:
        UsageError: the message is one of these; else nothing is raised.
    """
    listed = _UNUSED.search(message)
    if listed:
        words = ast.literal_eval(listed[1])
        names = [word.partition("=")[0] for word in words if word.startswith("--")] or words
        raise_faults([f"unknown flag {name}.{did_you_mean(name, flags)}" for name in names])
    if any(word in message for word in _OF_THE_MACHINE):
        raise_faults(
            [
                f"{message.strip()}\n    This machine's processor or GPU cannot do that. On a CPU: --use_cpu True --bf16 False "
                "--fp16 False --tf32 False. On a GPU older than Ampere: --fp16 True --bf16 False --tf32 False."
            ]
        )


def start_run(model_args: Any, data_args: Any, training_args: Any) -> TrainingRun:
    """Attach a `TrainingRun` to the arguments, refuse invalid flags, all faults at once, and set the seed.

    Raises:
        UsageError: with one line per fault; nothing has been loaded yet.
    """
    from transformers import set_seed

    run = TrainingRun(model_args, data_args, training_args)
    goes_on = run.active and last_checkpoint(Path(training_args.output_dir)) is not None
    model_args.umed_run = data_args.umed_run = run
    raise_faults(
        [
            *find_faults(run.flags, model_args, data_args, training_args, goes_on=goes_on),
            *_find_symbol_faults(run.flags),
            *_find_teacher_faults(run),
            *conversation_templates.find_faults(run),
            *model_class.find_faults(run),
            *attention_implementation.find_faults(run),
            *lora_resume.find_faults(run),
            *quantized_base.find_faults(run),
            *_find_unused_faults(run),
        ]
    )
    model_class.warn_of_departures(run)
    _warn_of_remarks(run, goes_on)
    vision_tower.choose_lora_targets(run)
    vision_tower.expect_tower_tensors(run)
    if run.active and training_args.ddp_find_unused_parameters is None:
        # All that a stage trains takes part in each step. transformers asks DDP to search for unused weights under LoRA, and
        # that search fails under the reentrant gradient checkpointing of transformers 4.
        training_args.ddp_find_unused_parameters = False
    if run.active and training_args.deepspeed:
        _join_processes(training_args)
    if run.active:
        # LLaVA creates the adapter before its trainer sets the seed, so no two LoRA runs would start from the same weights.
        set_seed(training_args.seed)
        if training_args.process_index == 0:
            busy = "another training is writing it"
            lock_for_the_process(training_args.output_dir, busy=busy, flag="--output_dir")
    return run


def _warn_of_remarks(run: TrainingRun, goes_on: bool) -> None:
    """Say, once per run, which flags do less than one may expect."""
    if run.active and run.training_args.process_index == 0:
        for remark in find_remarks(run.flags, run.training_args, goes_on=goes_on):
            warn(remark)


def _find_symbol_faults(flags: UmedFlags) -> list[str]:
    """What is wrong in the files of ``--umed_rewards symbolic:FILE``; the flags' own check only looks whether they are there."""
    if flags.umed_stage != REWARDING or SYMBOLIC not in flags.umed_rewards:
        return []
    from umed_plugin.rewards.symbols import find_symbol_faults  # the rewards are not needed by stage 1

    return find_symbol_faults(flags.reward_names())


def _find_teacher_faults(run: TrainingRun) -> list[str]:
    """What is wrong with the teachers of ``--umed_teacher`` and ``--umed_tower_teacher``."""
    flags = run.flags
    if flags.umed_stage != TUNING or (flags.umed_teacher is None and flags.umed_tower_teacher is None):
        return []
    from umed_plugin.training.teacher_check import find_teacher_faults  # imports transformers' tokenizers

    return find_teacher_faults(flags, run.model_args, run.training_args.cache_dir)


def _find_unused_faults(run: TrainingRun) -> list[str]:
    """A search for unused weights under reentrant checkpointing, which ends in a RuntimeError of DDP at the first step."""
    args = run.training_args
    options = getattr(args, "gradient_checkpointing_kwargs", None) or {}
    reentrant = options.get("use_reentrant", version_fits(version("transformers"), BEFORE_5[1]))
    searched = run.active and args.ddp_find_unused_parameters and args.gradient_checkpointing and not args.deepspeed
    if searched and reentrant and args.parallel_mode.value == "distributed":
        return [
            "--ddp_find_unused_parameters True does not work with --gradient_checkpointing True on this transformers: a weight "
            "would be ready twice. Remove it; all that a stage trains takes part in each step."
        ]
    return []


def _join_processes(training_args: Any) -> None:
    """Initialize DeepSpeed's communication before the model is loaded: ZeRO-3 partitions weights while they are loaded.

    On a CPU, transformers 5 initializes only torch's process group. DeepSpeed then counts one process while it reads its
    configuration, and refuses the batch size of all processes.

    Raises:
        UsageError: DeepSpeed runs on another kind of device than the trainer.
    """
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    # Reading `device` initializes torch's process group.
    device, accelerator = training_args.device.type, get_accelerator().device_name()
    if device != accelerator:
        raise UsageError(
            f"--deepspeed {training_args.deepspeed}: training runs on {device}, but the installed DeepSpeed on {accelerator}. "
            "Remove --deepspeed and start the script with python or torchrun. DeepSpeed 0.12 (LLaVA's pins) cannot train on a "
            "CPU; newer versions can (constraints/current.txt). On a machine with a GPU they need DS_ACCELERATOR=cpu for that."
        )
    if torch.distributed.is_initialized():
        deepspeed.init_distributed()


PATCH = Patch(
    name="train_arguments",
    targets=(
        TRAIN,
        Target(
            "llava.train.train:TrainingArguments",
            LLAVA,
            ("e9e353c3e03975062b5f8eb65c45d209419f4c4a4b669f162d3da6427de17005",),
        ),
        Target(
            "transformers:HfArgumentParser.parse_args_into_dataclasses",
            TRANSFORMERS,
            (
                "bc4c164c828c3f21b099e6e03b2983634e3521705121a372f0b3ed95320125e2",  # 4.36
                "852d4a0631f064d23a448871e6c6abcf32c3338f2c83f03e7af98058c97b56a0",  # 5.23
            ),
        ),
    ),
    why="train() refuses any flag outside its three dataclasses",
    delete_when="LLaVA's train() accepts further arguments from its caller",
    change=change,
)
