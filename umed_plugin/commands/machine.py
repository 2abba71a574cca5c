"""The machine that a plan or a checkpoint is for: its GPUs, and what they can compute."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from umed_plugin.checkpoints.precision import has_ampere


@dataclass(frozen=True)
class Machine:
    """What a plan depends on.

    Attributes:
        gpus: number of visible GPUs; 0: training runs on the CPU.
        gpu_bytes: memory of the smallest of them, bytes.
        bf16: whether they compute in bfloat16 (Ampere and later; V100 and T4 do not).

    Example:
        >>> from umed_plugin.commands.machine import Machine
        >>> Machine(gpus=1, gpu_bytes=24 * 2**30).precision
        'bf16'
        >>> Machine(gpus=1, gpu_bytes=32 * 2**30, bf16=False).precision
        'fp16'
        >>> Machine().precision
        'fp32'
    """

    gpus: int = 0
    gpu_bytes: int = 0
    bf16: bool = True

    @property
    def precision(self) -> str:
        """The precision that training uses here."""
        if not self.gpus:
            return "fp32"
        return "bf16" if self.bf16 else "fp16"


def this_machine() -> Machine:
    """The machine that this process runs on."""
    import torch

    if not torch.cuda.is_available():
        return Machine()
    gpus = torch.cuda.device_count()
    memory = min(torch.cuda.get_device_properties(index).total_memory for index in range(gpus))
    return Machine(gpus, memory, compute_bf16())


def compute_bf16() -> bool:
    """Whether all visible GPUs compute in bfloat16.

    torch 2.13's own answer is of one GPU and includes emulation, which transformers refuses to train in.
    """
    import torch

    return has_ampere() if torch.version.hip is None else torch.cuda.is_bf16_supported()


def add_dtype_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--dtype``, the precision in which a checkpoint answers."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of the weights (default: float16 on a GPU; on a CPU float32, or bfloat16 where float32 does not fit)",
    )
