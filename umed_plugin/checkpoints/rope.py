"""Rotary settings in config.json, as each generation of transformers writes them."""

from __future__ import annotations

from typing import Any

LLAVA_KINDS = ("linear", "dynamic")  # what LLaVA's pinned transformers can scale by


def old_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings under the keys that all versions of transformers read; version 5 saves them as ``rope_parameters``.

    Example:
        >>> old_rope({"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 10000.0}})
        {'rope_theta': 10000.0, 'rope_scaling': {'type': 'linear', 'factor': 2.0}}
    """
    config = dict(config)
    rope = config.pop("rope_parameters", None)
    if rope:
        config.update({key: rope[key] for key in ("rope_theta",) if key in rope})
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if config.get("rope_scaling") is not None:
        config["rope_scaling"] = old_scaling(config["rope_scaling"])
    return config


def kind_of_scaling(scaling: Any) -> Any:
    """What a ``rope_scaling`` names as its kind, under the newer key or the older; ``default`` is none."""
    return scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling


def old_scaling(scaling: Any) -> Any:
    """``rope_scaling`` with the two keys that LLaVA's pinned transformers reads. With others it refuses the configuration.

    A kind that only newer versions know is left as it is, and ``default`` becomes None.
    """
    kind = kind_of_scaling(scaling)
    if kind == "default":
        return None
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    if kind not in LLAVA_KINDS or isinstance(factor, bool) or not isinstance(factor, (int, float)):
        return scaling
    return {"type": kind, "factor": float(factor)}


def is_old(scaling: Any) -> bool:
    """Whether LLaVA's pinned transformers accepts a ``rope_scaling``: its kind and, as a fraction above 1, its factor."""
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    return (
        isinstance(factor, float)
        and factor > 1
        and set(scaling) == {"type", "factor"}
        and scaling["type"] in LLAVA_KINDS
    )
