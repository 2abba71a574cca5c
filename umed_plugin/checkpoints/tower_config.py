"""What the ``config.json`` of a vision tower says, if it is on this machine: in a folder, or in the Hugging Face cache."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.folder import local_tower
from umed_plugin.errors import UmedError
from umed_plugin.files import read_object

# transformers leaves these out of the config.json of a CLIP that has these values.
CLIP_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}


def vision_part(config: Mapping[str, Any]) -> Any:
    """What a tower's ``config.json`` says of the vision model: a complete CLIP says it under ``vision_config``."""
    return config.get("vision_config", config)


def cached_tower(name: str, cache_dir: str | None = None) -> Path | None:
    """The folder of a tower in the cache of the Hugging Face Hub; None if it is not there. Nothing is downloaded.

    Args:
        name: on the Hub.
        cache_dir: None: where transformers caches files.
    """
    from transformers.utils import cached_file

    try:
        cached = cached_file(
            name, "config.json", local_files_only=True, cache_dir=cache_dir,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except (OSError, ValueError):  # a name such as ../clip, which nothing on the hub can have
        return None
    return None if cached is None else Path(cached).parent


def tower_sizes(name: str, cache_dir: str | None = None) -> dict[str, int] | None:
    """The sizes of a tower, by the keys of `CLIP_SIZES`; None if it is not on this machine, or does not say them.

    Args:
        name: a folder, or a name on the Hub (looked up in the local cache only).
        cache_dir: as for `cached_tower`.
    """
    folder = local_tower(name) if name else None
    if folder is None and name and not os.path.isabs(name):
        folder = cached_tower(name, cache_dir)
    if folder is None:
        return None
    try:
        return _sizes(read_object(folder / "config.json"))
    except (UmedError, OSError):
        return None


def _sizes(config: Mapping[str, Any]) -> dict[str, int] | None:
    tower = vision_part(config)
    if not isinstance(tower, Mapping):
        return None
    is_clip = config.get("model_type") in ("clip", "clip_vision_model")
    sizes = {key: tower.get(key, usual if is_clip else None) for key, usual in CLIP_SIZES.items()}
    return sizes if all(type(size) is int and size > 0 for size in sizes.values()) else None
