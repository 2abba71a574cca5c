"""Accept the training flags of LLaVA's scripts that transformers 5 has renamed or removed.

Target: `TrainingArguments` in `llava.train.train`.
Why: every script of LLaVA uses ``--evaluation_strategy`` and ``--warmup_ratio``, and LLaVA's trainer reads ``group_by_length``.
transformers 5 refuses the flags and lacks the attribute. LLaVA also lets the processes print and save whose ``local_rank`` is 0,
which transformers 5 leaves at -1 in each.
Versions: LLaVA 1.2.x, transformers 5.
Delete when: LLaVA's scripts are written for transformers 5.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Any, Optional

from umed_plugin.errors import UsageError
from umed_plugin.patches.training_run import LLAVA, ON_5, TRANSFORMERS_5
from umed_plugin.patching import Patch, Recorder, Target


def _old(default: Any, now: str) -> Any:
    return field(default=default, metadata={"help": f"Flag of transformers 4, for LLaVA's scripts. Now: {now}."})


@dataclass
class OldFlags:
    """The flags, with the defaults of transformers 4.36; ``now`` names what replaces each."""

    evaluation_strategy: Optional[str] = _old(None, "--eval_strategy")
    warmup_ratio: float = _old(0.0, "--warmup_steps below 1")
    group_by_length: bool = _old(False, "--train_sampling_strategy group_by_length")
    no_cuda: bool = _old(False, "--use_cpu")
    overwrite_output_dir: bool = _old(False, "nothing; LLaVA's train() never read it")
    logging_dir: Optional[str] = _old(None, "the environment variable TENSORBOARD_LOGGING_DIR")
    save_safetensors: bool = _old(True, "always on")


def change(recorder: Recorder) -> None:
    """Rebind the class to one with the flags."""
    llava_train = sys.modules["llava.train.train"]
    recorder.replace(llava_train, "TrainingArguments", _with_old_flags(llava_train.TrainingArguments))


def _with_old_flags(stock: type) -> type:
    """LLaVA's dataclass with the flags, under the class name that checkpoints pickle (see `train_arguments`)."""

    @dataclass
    class TrainingArguments(OldFlags, stock):
        def __post_init__(self) -> None:
            _translate(self)
            super().__post_init__()
            self.evaluation_strategy = self.eval_strategy  # under both names: some code reads the old one

    TrainingArguments.__module__ = stock.__module__
    TrainingArguments.__qualname__ = stock.__qualname__
    TrainingArguments.__doc__ = stock.__doc__
    return TrainingArguments


def _translate(args: Any) -> None:
    """Set the fields of transformers 5 from the old flags."""
    if args.evaluation_strategy is not None:
        args.eval_strategy = args.evaluation_strategy
    if args.warmup_ratio and not args.warmup_steps:  # transformers 4 prefers the steps if both are given
        args.warmup_steps = args.warmup_ratio
    if args.group_by_length:
        args.train_sampling_strategy = "group_by_length"
    args.use_cpu = args.use_cpu or args.no_cuda
    if args.local_rank == -1:
        args.local_rank = int(os.environ.get("LOCAL_RANK", "-1"))
    if args.logging_dir is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = args.logging_dir
    if not args.save_safetensors:
        raise UsageError("--save_safetensors False: transformers 5 writes only safetensors. Remove the flag.")


PATCH = Patch(
    name="old_flags",
    targets=(
        Target(
            "llava.train.train:TrainingArguments",
            LLAVA,
            ("e9e353c3e03975062b5f8eb65c45d209419f4c4a4b669f162d3da6427de17005",),
        ),
        Target(
            "transformers.training_args:TrainingArguments.__post_init__",
            TRANSFORMERS_5,
            ("f3f6772df914c89a7964a377591a379ee65e7bfdee82e6d5c4c6f3aaa40f3c3c",),
        ),
    ),
    why="transformers 5 refuses flags that every script of LLaVA uses, and sets no local rank, by which LLaVA saves and prints",
    delete_when="LLaVA's scripts are written for transformers 5",
    change=change,
    needed=ON_5,
)
