"""Whether this machine's bitsandbytes can compute over 4 bits on a CPU; older releases cannot."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from umed_plugin.patches.quantized_base import find_faults


def machine_fault(bits: int = 4) -> list[str]:
    """What ``--bits`` is refused with here; empty if it is not."""
    args = SimpleNamespace(bits=bits, device=torch.device("cpu"))
    return find_faults(SimpleNamespace(active=True, training_args=args))


needs_kernels = pytest.mark.skipif(bool(machine_fault()), reason=f"no 4-bit kernels for a CPU here: {machine_fault()}")
