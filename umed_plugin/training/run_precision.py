"""The precision in which a run computes, for what lies outside of the trainer's own passes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def precision_of(args: Any) -> AbstractContextManager[Any]:
    """Autocast as in training, for a ``with`` block.

    Callbacks, checks of the model, and calls of its parts do not come under the autocast of accelerate, which wraps the model's
    forward pass alone. Over weights that are kept in float32 they would compute in float32, which flash attention refuses.

    Args:
        args: LLaVA's training arguments. Under DeepSpeed the weights themselves are in the precision of the run.
    """
    if args.deepspeed or not (args.bf16 or args.fp16):
        return nullcontext()
    return torch.autocast(args.device.type, dtype=torch.bfloat16 if args.bf16 else torch.float16)
