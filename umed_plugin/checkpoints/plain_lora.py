"""What a plain LoRA adapter is, as LLaVA's ``--lora_enable`` writes it: two matrices for each layer that its settings name.

PEFT builds its layers from the settings, and gives them the tensors whose names it then has. It says nothing of a tensor that it
leaves out, and each of its versions drops other fields. So whatever reads an adapter asks here first.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

# Keys of adapter_config.json that make more of an adapter than two matrices for each layer.
_EXTENSIONS = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "use_dora",
    "lora_bias",
    "layer_replication",
    "megatron_config",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Values of init_lora_weights with which training begins at the base itself. Others change the base.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_HEAD = "lm_head"  # PEFT leaves it out of "all-linear"
# Keys that leave some of the named layers out.
_NARROWED = ("layers_to_transform", "exclude_modules")


def settings_fault(config: dict[str, Any]) -> str | None:
    """Why an ``adapter_config.json`` is not that of plain LoRA, as a sentence; None if it is.

    Example:
        >>> settings_fault({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
        >>> settings_fault({"peft_type": "IA3", "target_modules": ["q_proj"]}).partition(".")[0]
        "peft_type 'IA3' with no extensions"
    """
    extensions = [key for key in _EXTENSIONS if config.get(key)]
    if config.get("init_lora_weights") not in _STARTS:
        extensions.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if config.get("peft_type") != "LORA" or extensions:
        return (
            f"peft_type {config.get('peft_type')!r} with {', '.join(extensions) or 'no extensions'}. Only plain LoRA, as "
            "LLaVA's --lora_enable writes it, can be loaded or merged."
        )
    rank, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if type(rank) is not int or rank < 1:
        return f"r is {rank!r}. Needed: the rank of the adapter, a whole number above 0."
    if not isinstance(alpha, (int, float)) or not abs(alpha) <= 2**53:
        return f"lora_alpha is {alpha!r}. Needed: the number that the training had."
    if not _are_targets(targets):
        return f"target_modules is {targets!r}. Needed: the names of the layers that were trained, such as ['q_proj']."
    return None


def _are_targets(targets: Any) -> bool:
    if isinstance(targets, list):
        return bool(targets) and all(isinstance(target, str) for target in targets)
    try:
        return isinstance(targets, str) and bool(re.compile(targets))
    except re.error:
        return False


def layer_of(name: str) -> str:
    """The layer that a tensor of an adapter changes, by its name in the base.

    Example:
        >>> layer_of("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
        'model.layers.0.self_attn.q_proj'
    """
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def tensors_fault(config: dict[str, Any], shapes: dict[str, Collection[int]]) -> str | None:
    """Why the low-rank matrices of an adapter are not those of its settings, as a sentence; None if they are.

    Args:
        config: its settings, without a fault.
        shapes: of its tensors, by name.
    """
    sides = {name: int(".lora_B." in name) for name in shapes if name.endswith((".lora_A.weight", ".lora_B.weight"))}
    outside = [name for name in sides if not _may_be_target(layer_of(name), config)]
    if outside:
        return (
            f"contains {outside[0]!r} ({len(outside)} such in all), which is no layer of the target_modules of its "
            "adapter_config.json. PEFT would leave it out. Copy both files again from the same training's output folder."
        )
    for name, side in sides.items():
        shape = tuple(shapes[name])
        if len(shape) != 2 or shape[side] != config["r"]:
            return (
                f"{name} has shape {shape}, but r is {config['r']} in its adapter_config.json. Copy both files again from the "
                "same training's output folder."
            )
    return None


def untrained_layers(config: dict[str, Any], changed: Collection[str], base: Collection[str]) -> list[str]:
    """Layers of the base that an adapter's settings name and its tensors do not change.

    Args:
        config: settings of the adapter, without a fault.
        changed: the layers that its tensors change.
        base: names of the base's layers that can have low-rank matrices.
    """
    if any(config.get(key) is not None for key in _NARROWED):
        return []
    return [layer for layer in base if layer not in changed and _is_target(layer, config)]


def untrained_fault(lora_dir: Path, layers: list[str]) -> str:
    """What to say of an adapter that lacks the matrices of some layers."""
    return (
        f"{lora_dir}: its adapter lacks the matrices of {layers[0]!r} ({len(set(layers))} such layers in all), which is one of "
        "the target_modules of its adapter_config.json. Copy both files again from the same training's output folder."
    )


def _may_be_target(layer: str, config: dict[str, Any]) -> bool:
    """Whether some PEFT gives a layer its matrices: up to 0.4, ``attn.q_proj`` names the end of ``self_attn.q_proj`` too."""
    targets = config["target_modules"]
    return _is_target(layer, config) or (not isinstance(targets, str) and layer.endswith(tuple(targets)))


def _is_target(layer: str, config: dict[str, Any]) -> bool:
    """Whether PEFT gives a layer its matrices, as far as ``target_modules`` decides."""
    targets = config["target_modules"]
    if targets == "all-linear":
        return layer != _HEAD
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
    return any(layer == target or layer.endswith(f".{target}") for target in targets)
