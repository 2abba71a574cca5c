"""``--umed_tower_lr``: stage 1 trains the vision tower too, with a learning rate of its own.

Trained is what the selected features depend on: embeddings, and the layers up to ``--mm_vision_select_layer``. What comes after
gets no gradient, and DDP would wait for it. `umed_plugin.patches.vision_tower` lets the gradient into LLaVA's tower, and notes
in the configuration that the checkpoint holds a tower of its own, as LLaVA does for an unfrozen one.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from umed_plugin.errors import UmedError
from umed_plugin.model.forward import base_llava


def unfreeze_tower(model: nn.Module) -> int:
    """Let the tower's weights be trained that its selected features depend on; return how many entries they have.

    Raises:
        UmedError: ``--mm_vision_select_layer`` names a layer that does not exist, or the embeddings, before all layers.
    """
    tower = base_llava(model).get_vision_tower()
    vision = tower.vision_tower.vision_model
    layers = len(vision.encoder.layers)
    if not -layers <= tower.select_layer <= layers or tower.select_layer == 0:
        raise UmedError(
            f"--umed_tower_lr: --mm_vision_select_layer {tower.select_layer} names no layer of the tower's {layers}. Needed: the "
            "one of the checkpoint's config.json, such as -2."
        )
    used = range(layers + 1)[tower.select_layer]  # 0 are the embeddings
    trained = [*vision.embeddings.parameters(), *vision.pre_layrnorm.parameters()]
    trained += [parameter for layer in vision.encoder.layers[:used] for parameter in layer.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    # Under ZeRO-3 a parameter itself has no entries.
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in trained)


def give_own_rate(optimizer: Any, tower: nn.Module, learning_rate: float) -> None:
    """Move the tower's parameters of an optimizer into groups of their own, with a learning rate of their own.

    Args:
        optimizer: torch's, before its first step and before a scheduler is made for it.
        tower: LLaVA's.
        learning_rate: of the new groups; weight decay and all else stay.

    Example:
        >>> import torch
        >>> tower, head = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD([*tower.parameters(), *head.parameters()], lr=1.0)
        >>> give_own_rate(optimizer, tower, 0.01)
        >>> [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
        [(1.0, 1), (0.01, 1)]
    """
    own = {id(parameter) for parameter in tower.parameters()}
    for group in list(optimizer.param_groups):
        of_tower = [parameter for parameter in group["params"] if id(parameter) in own]
        if not of_tower:
            continue
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        settings = {key: copy.copy(value) for key, value in group.items() if key != "params"}
        optimizer.add_param_group({**settings, "params": of_tower, "lr": learning_rate})


def drop_empty_groups(optimizer: Any) -> None:
    """Drop the groups without parameters, which DeepSpeed drops too, but after a schedule was made over all of them.

    Args:
        optimizer: torch's, before a scheduler is made for it.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([{"params": []}, {"params": [weight], "lr": 0.5}], lr=1.0)
        >>> drop_empty_groups(optimizer)
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.5]
    """
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
