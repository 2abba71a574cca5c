"""Whether the files that a checkpoint answers with have changed: a hash of small files, and of size and time of weight files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from umed_plugin.checkpoints.adapter_folder import find_base
from umed_plugin.checkpoints.folder import ADAPTER, TOKENIZER_FILES, is_lora, read_object

_WEIGHTS = (".safetensors", ".bin")
# Their content counts. They are small: also a tokenizer's are read in a few milliseconds.
_SMALL = {"config.json", ADAPTER, "preprocessor_config.json", *TOKENIZER_FILES}


def checkpoint_hashes(checkpoint: Path | str, base: Path | str | None = None) -> list[str]:
    """`checkpoint_hash` of a checkpoint, and of the base over which a LoRA folder lies.

    Args:
        checkpoint: a full checkpoint, or a LoRA folder.
        base: of a LoRA folder; None: the one that its adapter names.

    Raises:
        UmedError: the base is not on this machine.
    """
    folders = [Path(checkpoint)]
    if is_lora(checkpoint):
        folders.append(find_base(Path(checkpoint), base))
    elif base is not None:
        folders.append(Path(base))
    return [checkpoint_hash(folder) for folder in folders]


def checkpoint_hash(checkpoint: Path | str) -> str:
    """A hash that changes with what a checkpoint's answers depend on, without reading its weights.

    It covers configuration and tokenizer by content, and weight files by name, size and modification time. A vision tower that is
    a folder on this machine is covered in the same way; a name on the Hub stands in config.json.
    """
    folder, digest = Path(checkpoint), hashlib.sha256()
    for part in (folder, *_local_tower(folder)):
        for state in _states(part):
            digest.update(state)
    return digest.hexdigest()[:16]


def _states(folder: Path) -> Iterator[bytes]:
    """What is hashed of each file in a folder that answers depend on; nothing of other files."""
    for file in sorted(folder.iterdir()):
        if file.name in _SMALL or file.name.endswith(".index.json"):
            content = file.read_bytes()
            yield os.fsencode(f"{file.name} {len(content)} ") + content
        elif file.suffix in _WEIGHTS:
            status = file.stat()
            yield os.fsencode(f"{file.name} {status.st_size} {status.st_mtime_ns} ")


def _local_tower(checkpoint: Path) -> list[Path]:
    """The folder of the vision tower, resolved as LLaVA does; empty for a tower on the Hub."""
    file = checkpoint / "config.json"
    config = read_object(file) if file.is_file() else {}
    tower = config.get("mm_vision_tower", config.get("vision_tower"))
    return [Path(tower)] if isinstance(tower, str) and os.path.isdir(tower) else []
