"""What a run trains: kept in float32, and measured after the first steps.

AdamW changes a weight by about the learning rate in a step. Near 0.02, bf16 numbers are 1e-4 apart. So a step of 2e-5 is rounded
away, and a bf16 weight never learns. DeepSpeed keeps float32 copies of what it trains. Without DeepSpeed nothing does, so
`keep_in_float32` casts the trained weights, and autocast still computes in bf16 or fp16. (GradScaler refuses fp16 gradients.)
Frozen weights keep their dtype.

`MovedShare` says after the first steps which share of the trained entries moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from umed_plugin.errors import note, warn

STEPS = 10
LEAST_SHARE = 0.5
_ENTRIES_OF_A_TENSOR = 4096
# float32 weight, its gradient, and Adam's two averages.
_BYTES_OF_A_TRAINED_ENTRY = 16


@dataclass(frozen=True)
class Cast:
    """What `keep_in_float32` has cast: number of tensors, and of their entries."""

    tensors: int
    entries: int

    def __str__(self) -> str:
        memory = self.entries * _BYTES_OF_A_TRAINED_ENTRY / 1e9
        return (
            f"{self.tensors} trained tensors ({self.entries:,} entries) are kept in float32, because in fewer bits small steps "
            f"are rounded away. Weights, gradients and Adam need {memory:.2g} GB for them; the computation stays in the "
            "requested precision."
        )


def keep_in_float32(model: nn.Module) -> Cast:
    """Cast the trained weights of fewer than 32 bits to float32, in place.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 3, dtype=torch.bfloat16)
        >>> layer.bias.requires_grad_(False).dtype, keep_in_float32(layer).tensors
        (torch.bfloat16, 1)
        >>> layer.weight.dtype, layer.bias.dtype
        (torch.float32, torch.bfloat16)
    """
    short = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    for parameter in short:
        parameter.data = parameter.data.float()
    return Cast(len(short), sum(parameter.numel() for parameter in short))


class MovedShare(TrainerCallback):
    """Notes which share of the trained entries moved in the first steps of this process, and warns if it is low.

    At most 4096 entries of each tensor are looked at, evenly spread. The share weights a tensor by all of its entries. Input
    embeddings are left out: a step moves only the rows of the tokens that it has seen.
    """

    def __init__(self) -> None:
        self._first: list[tuple[Tensor, Tensor]] = []
        self._begun_at = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        """Copy the entries; a checkpoint to resume from is loaded by now."""
        embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
        trained = [p for p in model.parameters() if p.requires_grad and p.numel() and id(p) not in embeddings]
        self._first = [(parameter, _some_entries(parameter)) for parameter in trained]
        self._begun_at = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Compare, after `STEPS` steps or the last one."""
        steps = state.global_step - self._begun_at
        if not self._first or (steps < STEPS and state.global_step < state.max_steps):
            return
        total = sum(parameter.numel() for parameter, _ in self._first)
        moved = sum(
            _has_moved(_some_entries(parameter), first).float().mean().item() * parameter.numel()
            for parameter, first in self._first
        )
        self._first = []
        if state.is_world_process_zero:
            say_moved(moved, total, steps)


def say_moved(moved: float, total: int, steps: int) -> None:
    """One line, and a warning below `LEAST_SHARE`."""
    share, first = moved / total, "the first step" if steps == 1 else f"the first {steps} steps"
    note(f"{share:.1%} of the trained entries moved in {first} ({round(moved):,} of {total:,}).")
    if share < LEAST_SHARE:
        warn(
            f"only {share:.1%} of the trained entries moved in {first}. The others had no gradient (do the rewards differ "
            "between candidates?), or --learning_rate or --mm_projector_lr is too small for their number format."
        )


def _has_moved(now: Tensor, first: Tensor) -> Tensor:
    """Which entries have another value; NaN and infinity are none."""
    return (now != first) & now.isfinite()


def _some_entries(parameter: Tensor) -> Tensor:
    """Up to 4096 entries of a tensor, evenly spread, as a copy."""
    flat = parameter.detach().reshape(-1)
    return flat[:: -(-len(flat) // _ENTRIES_OF_A_TENSOR)].clone()
