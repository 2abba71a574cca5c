"""Whole weights where DeepSpeed's ZeRO-3 leaves each process a slice of them.

Under ZeRO-3 each module's forward pass puts its weights together and lets them go again, with all processes taking part: processes
that sample answers of different lengths make different numbers of passes and would wait for one another for ever. So a rollout
gathers all of them once (`whole_parameters`) and then each process works alone. That takes the memory of the whole model for its
length. Where nothing is sliced, nothing happens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 has sliced the model's weights."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Put the weights together for the length of a ``with`` block, which all processes enter; what is changed inside is lost.

    Args:
        model: the module itself, not DeepSpeed's wrapper.
    """
    if not is_sharded(model):
        yield
        return
    import deepspeed

    with _without_deepspeeds_hooks(model), deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield


@contextmanager
def _without_deepspeeds_hooks(model: nn.Module) -> Iterator[None]:
    """Take off what would let the weights of a module go behind its forward pass; other hooks stay."""
    kept = [(module, module._forward_pre_hooks, module._forward_hooks) for module in model.modules()]
    try:
        for module, before, behind in kept:
            module._forward_pre_hooks, module._forward_hooks = _others(before), _others(behind)
        yield
    finally:
        for module, before, behind in kept:
            module._forward_pre_hooks, module._forward_hooks = before, behind


def _others(hooks: OrderedDict) -> OrderedDict:
    return OrderedDict((key, hook) for key, hook in hooks.items() if not hook.__module__.startswith("deepspeed."))
