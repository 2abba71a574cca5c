"""Full parameters where DeepSpeed's ZeRO-3 leaves each rank a shard of them.

Under ZeRO-3 each module's forward pass gathers its parameters and releases them again, and all ranks take part in it. Ranks that
sample answers of different lengths make different numbers of passes and would deadlock. So stage 2 gathers the full parameters
once per rollout (`gathered_parameters`), and then each rank works alone. Meanwhile, each rank needs memory for the whole model.
Without sharding, nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 has sharded the model's parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered_parameters(model: nn.Module) -> Iterator[None]:
    """Gather the full parameters inside a ``with`` block, which all ranks enter. Changes made inside are lost.

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
    """Remove the hooks that release a module's parameters after its forward pass. Other hooks stay, also those added inside."""
    registries = [hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    before = [dict(hooks) for hooks in registries]
    try:
        for hooks, originals in zip(registries, before):
            for key in filter(lambda key: _is_deepspeeds(originals[key]), originals):
                del hooks[key]
        yield
    finally:
        # Hooks run in the order of the registry, so it is rebuilt: first what was there (less what was removed inside), then
        # what was added inside.
        for hooks, originals in zip(registries, before):
            back = {key: hook for key, hook in originals.items() if key in hooks or _is_deepspeeds(hook)}
            added_inside = {key: hook for key, hook in hooks.items() if key not in originals}
            hooks.clear()
            hooks.update({**back, **added_inside})


def _is_deepspeeds(hook: Callable[..., Any]) -> bool:
    return hook.__module__.startswith("deepspeed.")
