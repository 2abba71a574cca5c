"""Say which flag helps where stage 2 runs out of GPU memory: sampling and learning need different ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from umed_plugin.errors import UmedError
from umed_plugin.flags.definition import UmedFlags


@contextmanager
def remedy_for_memory(doing: str, remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error of the accelerator into one that names a remedy.

    Args:
        doing: what the block does, to complete "while ...".
        remedy: what to change, as sentences.

    Raises:
        UmedError: the block ran out of memory.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        cause = str(error).strip().splitlines()[:1]
        raise UmedError(f"out of GPU memory while {doing}. {remedy} {' '.join(cause)}".rstrip()) from error


def sampling_remedy(flags: UmedFlags, questions: int) -> str:
    """What to lower if answers to so many questions cannot be sampled together."""
    if questions > 1:
        return (
            f"Set --umed_sampling_batch_size {questions // 2}: fewer questions are sampled together, and what is learnt "
            "stays the same."
        )
    return (
        f"A single question is sampled at a time already. Lower --umed_num_candidates ({flags.umed_num_candidates}) or "
        f"--umed_max_new_tokens ({flags.umed_max_new_tokens})."
    )


def learning_remedy(flags: UmedFlags) -> str:
    """What to change if the passes over sampled answers do not fit."""
    return (
        "Halve --per_device_train_batch_size and double --gradient_accumulation_steps: the step stays the same. Also add "
        f"--gradient_checkpointing True, or lower --umed_logit_rows ({flags.umed_logit_rows})."
    )
