"""A whole vision tower for a checkpoint that had none inside: what ``--umed_tower_lr`` trained, and the rest as it was.

Training saves only what it changed, and stock LLaVA gives random values to what a checkpoint lacks. So the export holds every
tensor of the tower.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from umed_plugin.checkpoints.folder import TOWER, is_buffer, weight_files
from umed_plugin.checkpoints.weight_shards import stored
from umed_plugin.errors import UmedError

_LAST_NORM = {"weight": 1.0, "bias": 0.0}  # as a normalisation begins
_INSIDE = "vision_tower."  # LLaVA's tower holds transformers' one under this name
_MODEL = "vision_model."
_PARTS = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")


def whole_tower(trained: dict[str, Any], config: dict[str, Any], where: Any) -> dict[str, Any]:
    """Every tensor of a tower by its name in LLaVA's checkpoints: the trained ones, and the others from the original tower.

    Args:
        trained: tensors whose names begin with `TOWER`.
        config: ``config.json`` of the checkpoint; ``mm_vision_tower`` names the original, a folder or a name on the Hub.
        where: the folder that was trained, for messages.

    Raises:
        UmedError: the original has not the tensors that were trained.
    """
    name = str(config.get("mm_vision_tower", config.get("vision_tower")))
    original = {
        f"{TOWER}{_INSIDE}{_MODEL}{bare_tower_name(key)}": tensor
        for file in weight_files(name)
        for key, tensor in stored(file).items()
        if bare_tower_name(key).startswith(_PARTS) and not is_buffer(key)  # a whole CLIP has a text model too
    }
    unknown = sorted(set(trained) - set(original))
    if unknown:
        raise UmedError(
            f"{where}: trained {unknown[0]!r} ({len(unknown)} in all), which the tower {name} does not have. Is mm_vision_tower "
            "of config.json the tower of the training?"
        )
    tower = {key: trained[key] if key in trained else tensor.read() for key, tensor in original.items()}
    # LLaVA does not use the last normalisation, so a tower may be trained without it. Its class has one all the same.
    beginning = f"{TOWER}{_INSIDE}{_MODEL}"
    for part, value in _LAST_NORM.items():
        first = tower.get(f"{beginning}pre_layrnorm.{part}")
        if first is not None:
            tower.setdefault(f"{beginning}post_layernorm.{part}", first.new_full(first.shape, value))
    return tower


def tower_parts(tensors: dict[str, Any]) -> dict[str, Any]:
    """Those of a checkpoint's tensors that belong to its vision tower; a buffer is no weight."""
    return {name: t for name, t in tensors.items() if name.startswith(TOWER) and not is_buffer(name)}


def bare_tower_name(name: str) -> str:
    """A tower tensor's name without any prefix, ``embeddings...``: transformers 5 saves a tower without ``vision_model``."""
    return re.sub(r"^(vision_tower\.)*(vision_model\.)?", "", name)


def as_in(own: Iterable[str], tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors by the names that a model, or LLaVA's tower alone, has for them.

    Without LLaVA's patches, as in a plain script, transformers 5 builds a tower without the level ``vision_model``.

    Args:
        own: names of the model's tensors.
        tensors: by the names of LLaVA's checkpoints; a name that the model has not stays as it is.

    Example:
        >>> as_in(["model.vision_tower.vision_tower.post.bias"], {"model.vision_tower.vision_tower.vision_model.post.bias": 1})
        {'model.vision_tower.vision_tower.post.bias': 1}
    """
    known = {_without_levels(name): name for name in own}
    return {known.get(_without_levels(name), name): tensor for name, tensor in tensors.items()}


def _without_levels(name: str) -> str:
    """A tensor's name with what comes before the tower, and what is inside it, but not the levels between."""
    before, tower, inside = f".{name}".partition(f".{_INSIDE}")
    return f"{before}{tower}{bare_tower_name(inside)}"
