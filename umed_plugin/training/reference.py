"""The reference policy: the model as it was when a stage began.

With LoRA, it is the policy with its adapter switched off. The projector is trained beside the adapter, so a copy of its initial
weights is kept too. In full fine-tuning there is no adapter, and a copy of all trainable weights is kept; parts that never change
(the vision tower) are not copied. The weights are swapped in for one pass, which costs no time. Under ZeRO-3, each rank keeps a
copy of the full weights.

`umed_plugin.training.experience_maker` takes the reference's log-probabilities, once per rollout. In stage 1 it is the teacher of
``--umed_keep``: `umed_plugin.training.keeping`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from umed_plugin.model.sharding import gathered_parameters


class ReferencePolicy:
    """Keeps the initial values of the weights that training changes.

    Create it before a checkpoint is loaded for resuming: the reference is the start of stage 2, not of the resumed run.

    Args:
        model: the policy, on its training device.
    """

    def __init__(self, model: Any) -> None:
        self._has_adapter = hasattr(model, "disable_adapter")
        with gathered_parameters(model):
            self._initial_values = {
                name: parameter.detach().clone()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and not (self._has_adapter and "lora_" in name)
            }
            by_name = dict(model.named_parameters())
            self._values_by_id = {id(by_name[name]): value for name, value in self._initial_values.items()}

    def value_at_start(self, parameter: Any) -> Any:
        """The initial value of a parameter of the model; itself if training does not change it."""
        return self._values_by_id.get(id(parameter), parameter)

    @contextmanager
    def as_reference(self, model: Any) -> Iterator[Any]:
        """Turn the policy into the reference inside a ``with`` block; gradients are off."""
        parameters = {name: parameter for name, parameter in model.named_parameters() if name in self._initial_values}
        trained = {name: parameter.data for name, parameter in parameters.items()}
        adapter_off = model.disable_adapter() if self._has_adapter else nullcontext()
        try:
            for name, parameter in parameters.items():
                # DeepSpeed moves and casts the model after the trainer is created.
                parameter.data = self._initial_values[name].to(device=parameter.device, dtype=parameter.dtype)
            # Autocast keeps half-precision copies of trained weights by parameter, and would go on with those of the policy.
            torch.clear_autocast_cache()
            with torch.no_grad(), adapter_off:
                yield model
        finally:
            for name, parameter in parameters.items():
                parameter.data = trained[name]
            torch.clear_autocast_cache()
