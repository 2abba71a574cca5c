"""The reference policy: the model as it was when stage 2 began.

With LoRA it is the policy with its adapter switched off. The projector is trained beside the adapter, so its first weights are
kept too. In full fine-tuning nothing is switched off and the first weights of everything trainable are kept: a frozen copy,
less the parts that never change (the vision tower). The weights are swapped in for one pass, which costs no time. Under
ZeRO-3 too the copy is of whole weights in each process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from umed_plugin.model.sharding import gathered_parameters


class ReferencePolicy:
    """Keeps the first values of the weights that training changes.

    Make it before a checkpoint is loaded for resuming: the reference is the start of stage 2, not of the resumed run.

    Args:
        model: the policy, on the device it is trained on.
    """

    def __init__(self, model: Any) -> None:
        self._has_adapter = hasattr(model, "disable_adapter")
        with gathered_parameters(model):
            self._first_values = {
                name: parameter.detach().clone()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and not (self._has_adapter and "lora_" in name)
            }

    @contextmanager
    def as_reference(self, model: Any) -> Iterator[Any]:
        """Turn the policy into the reference for the length of a ``with`` block; gradients are off inside."""
        parameters = {name: parameter for name, parameter in model.named_parameters() if name in self._first_values}
        trained = {name: parameter.data for name, parameter in parameters.items()}
        adapter_off = model.disable_adapter() if self._has_adapter else nullcontext()
        try:
            for name, parameter in parameters.items():
                # DeepSpeed moves and casts the model once the trainer has been made.
                parameter.data = self._first_values[name].to(device=parameter.device, dtype=parameter.dtype)
            with torch.no_grad(), adapter_off:
                yield model
        finally:
            for name, parameter in parameters.items():
                parameter.data = trained[name]
