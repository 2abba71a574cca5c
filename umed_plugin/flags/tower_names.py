"""Whether two names of a vision tower, of which one may be a local copy of the other, can mean the same tower.

LLaVA knows a tower by a name on the hub or by a folder. A folder says its sizes in ``config.json``; a name of CLIP has patch and
image size in it, such as ``clip-vit-large-patch14-336``. Nothing is loaded. Imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_IN_THE_NAME = re.compile(r"patch(\d+)(?:-(\d+))?$")
_CLIPS_SIDE = 224  # pixels of OpenAI's CLIP where its name does not say


def last_part(tower: str) -> str:
    """The name of a tower, which a local copy of it keeps."""
    return tower.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()


def is_same_place(one: str, other: str) -> bool:
    """Whether both are the same name, or lead to the same folder."""
    return one == other or (os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other))


def find_differences(given: str, stored: str, config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What two towers of one name have in common, and where they differ, as far as it can be known without loading them.

    Args:
        given, stored: folder or name on the hub.
        config: the ``config.json`` of the checkpoint that was trained with ``stored``.

    Returns:
        What is equal, such as ``patch_size 14``; what differs, such as ``image_size 224 instead of 336``.
    """
    ours, theirs = sizes_of(given), sizes_of(stored)
    # With several scales (S2) LLaVA stores a multiple of the tower's width.
    if not config.get("s2") and isinstance(config.get("mm_hidden_size"), int):
        theirs.setdefault("hidden_size", config["mm_hidden_size"])
    known = [name for name in ("hidden_size", "patch_size", "image_size") if name in ours and name in theirs]
    equal = [f"{name} {ours[name]}" for name in known if ours[name] == theirs[name]]
    return equal, [f"{name} {ours[name]} instead of {theirs[name]}" for name in known if ours[name] != theirs[name]]


def sizes_of(tower: str) -> dict[str, int]:
    """Width of the tower's states, and pixels of a patch's and of the image's side, as far as folder or name say them.

    Example:
        >>> sizes_of("openai/clip-vit-large-patch14-336")
        {'patch_size': 14, 'image_size': 336}
    """
    if os.path.isdir(tower):
        return _sizes_in(Path(tower) / "config.json")
    found = _IN_THE_NAME.search(last_part(tower))
    if found is None:
        return {}
    side = int(found[2]) if found[2] else _CLIPS_SIDE if tower.startswith("openai/") else None
    return {"patch_size": int(found[1]), **({} if side is None else {"image_size": side})}


def _sizes_in(file: Path) -> dict[str, int]:
    """Of a tower's own file, or of that of a whole CLIP."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    vision = content.get("vision_config")
    values = vision if isinstance(vision, dict) else content
    names = ("hidden_size", "patch_size", "image_size")
    return {name: values[name] for name in names if isinstance(values.get(name), int)}
