"""The checkpoint that an upgrade starts from: full or LoRA, how it answers, and what its result is called."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.adapter_folder import find_base
from umed_plugin.checkpoints.folder import READ_WHEN_ANSWERING, is_lora, read_config
from umed_plugin.checkpoints.writing import stock_name_fault
from umed_plugin.errors import UmedError


@dataclass(frozen=True)
class Origin:
    """The checkpoint to upgrade.

    Attributes:
        checkpoint: the folder as given.
        full: the full checkpoint whose layout the result gets: ``checkpoint``, or the base of a LoRA checkpoint.
        config: how the model answers: ``config.json`` of ``full``, updated with what the adapter's training changed.
    """

    checkpoint: Path
    full: Path
    config: dict[str, Any]

    @property
    def lora(self) -> bool:
        """Whether an adapter is upgraded."""
        return self.full != self.checkpoint

    @property
    def image_mode(self) -> str:
        """``image_aspect_ratio``: how the model sees images that are not square. LLaVA treats unknown values as ``square``."""
        return str(self.config.get("image_aspect_ratio") or "square")

    @property
    def holds_tower(self) -> bool:
        """Whether the vision tower's folder is inside the checkpoint, so that the result needs a copy of it."""
        tower = str(self.config.get("mm_vision_tower", ""))
        return os.path.isabs(tower) and Path(tower).resolve().is_relative_to(self.full.resolve())


def find_origin(checkpoint: Path, base: str | None) -> Origin:
    """Read the checkpoint's configuration, and find the base of a LoRA checkpoint.

    Raises:
        UmedError: LLaVA's training cannot start from this checkpoint.
    """
    if not is_lora(checkpoint):
        if base is not None:
            raise UmedError(f"base has no effect: {checkpoint} is a full checkpoint. Set it to null.")
        return Origin(checkpoint, checkpoint, read_config(checkpoint))
    trained, full = read_config(checkpoint), find_base(checkpoint, base)
    # `umed merge` takes these keys from the adapter too.
    answering = {key: trained[key] for key in READ_WHEN_ANSWERING if key in trained}
    return Origin(checkpoint, full, {**read_config(full), **answering})


def result_name(origin: Origin) -> str:
    """Name of the result's folder: the input's name with ``-umed``, if stock LLaVA would load a folder of that name correctly."""
    model_type = origin.config["model_type"]
    name = f"{origin.full.name}-umed"
    if stock_name_fault(name, model_type) is None:
        return name
    return "llava-mistral-umed" if model_type == "llava_mistral" else "llava-umed"
