"""How much of what was learnt is left when weights are written in fewer bits.

A small change of a weight is rounded away: near 0.02, bf16 numbers are 1e-4 apart. With what was learnt ``D = trained - base``
and what rounding loses ``E = written - trained``, over all tensors that changed::

    kept share = 1 - sqrt(sum E^2 / sum D^2)

It is 1 if the trained weights are written exactly, and 0 if the loss is as large as what was learnt. The sums are taken tensor by
tensor while a checkpoint is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from umed_plugin.checkpoints.folder import TOWER
from umed_plugin.errors import note, warn

LEAST_KEPT = 0.9


@dataclass
class KeptShare:
    """Collects the two sums of the formula above.

    Example:
        >>> import torch
        >>> kept, base = KeptShare(), torch.full((2,), 0.02)
        >>> trained = base + torch.tensor([1e-3, 0.0])
        >>> kept.add("lm_head.weight", base, trained, trained.bfloat16())
        >>> round(kept.share, 2)
        0.97
    """

    learnt: float = 0.0
    lost: float = 0.0
    added: int = 0  # tensors that the base lacks, so that there is no change of them to keep

    def add(self, name: str, base: Any, trained: Any, written: Any) -> None:
        """Add one tensor: of the base, as trained, and as it is written. The frozen vision tower is passed over."""
        if name.startswith(TOWER) or not base.is_floating_point() or base.shape != trained.shape:
            return
        change = trained.float() - base.float()
        if change.any():
            self.learnt += change.square().sum().item()
            self.lost += (written.float() - trained.float()).square().sum().item()

    @property
    def share(self) -> float | None:
        """In 0..1; None if nothing was learnt."""
        if not self.learnt:
            return None
        return max(0.0, 1 - math.sqrt(self.lost / self.learnt)) if math.isfinite(self.lost) else 0.0

    def report(self) -> None:
        """Tell the user, with a warning below `LEAST_KEPT`."""
        if self.share is None and self.added:
            note(f"the training changed no weight of the base, and added {self.added} tensors.")
            return
        if self.share is None:
            warn("the training changed no weight: the result answers as its base.")
            return
        text = f"the merge keeps {self.share:.1%} of what was learnt"
        if self.share >= LEAST_KEPT:
            note(f"{text}.")
            return
        warn(
            f"{text}; the rest is smaller than the steps between numbers of the base's dtype. Write more bits with "
            "--dtype float32, which doubles the files, or with --dtype float16, which has 8 times finer steps than bfloat16."
        )
