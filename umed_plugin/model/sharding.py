"""Whole weights where DeepSpeed's ZeRO-3 leaves each process a slice of them.

Under ZeRO-3 each module's forward pass puts its weights together and lets them go again, with all processes taking part: those
that sample answers of different lengths make different numbers of passes and would wait for one another for ever. So a rollout
gathers all weights once (`whole_parameters`) and then each process works alone. That takes the memory of the whole model for its
length. Where nothing is sliced, nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
    """Take off what lets the weights of a module go behind its forward pass; other hooks stay, those made inside too."""
    places = [hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    before = [dict(hooks) for hooks in places]
    try:
        for hooks, those in zip(places, before):
            for key in filter(lambda key: _is_deepspeeds(those[key]), those):
                del hooks[key]
        yield
    finally:
        for hooks, those in zip(places, before):
            back = {key: hook for key, hook in those.items() if key in hooks or _is_deepspeeds(hook)}
            made_inside = {key: hook for key, hook in hooks.items() if key not in those}
            hooks.clear()
            hooks.update({**back, **made_inside})


def _is_deepspeeds(hook: Callable[..., Any]) -> bool:
    return hook.__module__.startswith("deepspeed.")
