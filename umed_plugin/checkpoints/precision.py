"""The precision in which a checkpoint answers: what the device computes, and what the memory holds."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.adapter_folder import find_base
from umed_plugin.checkpoints.folder import is_lora, read_config, weight_files
from umed_plugin.checkpoints.weight_shards import stored
from umed_plugin.errors import UsageError, note

# Of the memory, for all but the weights: Python and its libraries, images, activations and the KV cache of an answer.
_REST = 3 * 10**9
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def answering_precision(checkpoint: Path | str, base: Path | str | None, device: str, wanted: str | None = None) -> str:
    """The precision of the weights when a checkpoint is asked.

    Without a wish it is float16 on a GPU, as in stock LLaVA, and float32 on a CPU. There it is bfloat16, and a note says so, when
    float32 weights would not fit into the memory of this machine.

    Args:
        checkpoint: a full checkpoint, or a LoRA folder over ``base``.
        base: base of a LoRA folder; None: the one that its adapter names.
        device: ``cuda`` or ``cpu``.
        wanted: ``float32``, ``bfloat16``, ``float16``, or None.

    Raises:
        UsageError: float16 on a CPU, which cannot compute in it.
        UmedError: it is not a LLaVA checkpoint.
    """
    if device != "cpu":
        return wanted or "float16"
    if wanted == "float16":
        raise UsageError("--dtype float16: a CPU cannot compute in it. Allowed on a CPU: float32, bfloat16.")
    if wanted is not None:
        return wanted
    read_config(checkpoint)  # says what is missing, if anything is
    folder = find_base(Path(checkpoint), base) if is_lora(checkpoint) else checkpoint
    needed, there = 4 * _values(folder) + _REST, memory_here()
    if needed <= there:
        return "float32"
    note(
        f"{checkpoint} answers in bfloat16: in float32 it would need {needed / 1e9:.0f} GB, and there are {there / 1e9:.0f} GB. "
        "Answers may differ from those in float32. --dtype chooses."
    )
    return "bfloat16"


def answering_device(wanted: str | None = None) -> str:
    """The device on which a checkpoint answers: the wanted one; without a wish ``cuda`` if there is one, else ``cpu``.

    Raises:
        UsageError: a GPU is wanted, and torch sees none.
    """
    import torch

    there = torch.cuda.is_available()
    if wanted is not None and wanted.startswith("cuda") and not there:
        built = (
            ""
            if torch.version.cuda or torch.version.hip
            else f", and this torch ({torch.__version__}) is built without CUDA"
        )
        raise UsageError(
            f"--device {wanted}: torch sees no GPU on this machine{built}. Allowed here: cpu, which is also the default."
        )
    return wanted or ("cuda" if there else "cpu")


def memory_here() -> int:
    """Bytes of memory of this machine, or of the container that this process runs in."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no container, or none with a limit
        return min(machine, int(_CONTAINER_LIMIT.read_text()))
    return machine


def torch_dtype(precision: str) -> Any:
    """The ``torch.dtype`` of this name."""
    import torch

    return getattr(torch, precision)


def _values(checkpoint: Path | str) -> int:
    """Number of values in all weight files."""
    return sum(tensor.values for file in weight_files(checkpoint) for tensor in stored(file).values())


def has_ampere() -> bool:
    """Whether all visible GPUs are NVIDIA's Ampere or later, which compute in bfloat16 and run flash-attn 2."""
    import torch

    return all(torch.cuda.get_device_properties(index).major >= 8 for index in range(torch.cuda.device_count()))
