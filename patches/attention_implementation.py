"""Run ``train_mem.py`` where flash-attn or CUDA is missing.

Target: `train` in `llava.train.train`, which ``train_mem.py`` imports and calls with ``flash_attention_2``.
Why: loading the model fails on every machine without a GPU and in every environment without flash-attn.
Versions: LLaVA 1.2.x.
Delete when: ``train_mem.py`` requests an attention that is available.

Without a request, transformers uses SDPA if it has it for the model and this torch, else eager attention.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from umed_plugin.errors import note
from umed_plugin.patches.training_run import TRAIN
from umed_plugin.patching import Patch, Recorder

FLASH = "flash_attention_2"


def change(recorder: Recorder) -> None:
    """Wrap `train` before ``train_mem.py`` imports it."""
    llava_train = sys.modules["llava.train.train"]
    stock = llava_train.train

    def train(attn_implementation: str | None = None) -> Any:
        return stock(attn_implementation=available_attention(attn_implementation, sys.argv[1:]))

    recorder.replace(llava_train, "train", train)


def available_attention(requested: str | None, argv: list[str]) -> str | None:
    """What to request from transformers: ``requested``, or None (its own choice) with a note where flash attention cannot run."""
    from transformers import utils

    if requested != FLASH:
        return requested
    if _on_cpu(argv):
        reason = "--use_cpu was given"
    elif not utils.is_flash_attn_2_available():
        reason = "flash-attn 2 or CUDA is missing"
    else:
        return requested
    # transformers before 4.36 has neither this function nor SDPA.
    has_sdpa = getattr(utils, "is_torch_sdpa_available", lambda: False)()
    instead = (
        "sdpa if the model supports it, else eager" if has_sdpa else "eager (transformers has no sdpa for this torch)"
    )
    note(f"{FLASH} was requested, but {reason}. Training with {instead}.")
    return None


def _on_cpu(argv: list[str]) -> bool:
    """Whether ``--use_cpu`` or its old name ``--no_cuda`` is on. `train()` parses the flags only later."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--use_cpu", "--no_cuda"):
        parser.add_argument(flag, nargs="?", const="true", default="false")
    given = parser.parse_known_args(argv)[0]
    return any(value.lower() in ("true", "1", "yes", "y", "t") for value in (given.use_cpu, given.no_cuda))


PATCH = Patch(
    name="attention_implementation",
    targets=(TRAIN,),
    why="train_mem.py requests flash_attention_2 and fails if flash-attn or CUDA is missing",
    delete_when="train_mem.py requests an attention that is available",
    change=change,
)
