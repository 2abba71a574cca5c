"""The folder of a checkpoint that is being written: what it may replace, and what it must not touch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from umed_plugin import files
from umed_plugin.checkpoints.folder import ADAPTER, FAMILIES

# Key in the config.json of a folder that `umed_plugin.checkpoints.language_model` has written: the checkpoint's name.
LANGUAGE_MODEL_OF = "umed_language_model_of"
# Only a trainer writes these, and what they are needed for cannot be made again.
_OF_A_TRAINING = (ADAPTER, "trainer_state.json", "training_args.bin", "optimizer.pt")


@contextmanager
def writing_checkpoint(out: Path, *, overwrite: bool, inputs: tuple[Path | None, ...]) -> Iterator[Path]:
    """Yield a folder to write a checkpoint into, which takes the place of ``out`` at the end. See `files.replacing_folder`.

    Args:
        out: the checkpoint.
        overwrite: replace a checkpoint that is there.
        inputs: checkpoints that are read; their towers count too, and None does not.

    Raises:
        UmedError: ``out`` is, or holds, an input, or is not a checkpoint that can be replaced.
    """
    read = [path for path in inputs if path is not None]
    read += [tower for path in read if (tower := _tower_of(path)) is not None]
    with files.replacing_folder(out, overwrite=overwrite, inputs=read, foreign=not_replaceable) as folder:
        yield folder


def _tower_of(checkpoint: Path) -> Path | None:
    """The folder of the tower that a checkpoint names, if it is on this machine and not inside the checkpoint."""
    name = _read(checkpoint / "config.json").get("mm_vision_tower")
    return Path(name) if isinstance(name, str) and os.path.isdir(name) else None


def not_replaceable(folder: Path) -> str | None:
    """Why ``--overwrite`` must not delete a folder, as text; None if it is a full checkpoint and nothing else."""
    config = folder / "config.json"
    content = _read(config)
    model_type = content.get("model_type")
    if model_type not in FAMILIES and LANGUAGE_MODEL_OF not in content:
        found = f"its model_type is {model_type!r}" if config.is_file() else "it has no config.json"
        return f"it is not a LLaVA checkpoint ({found})"
    names = sorted(entry.name for entry in folder.iterdir())
    of_training = [name for name in names if name in _OF_A_TRAINING or name.startswith("checkpoint-")]
    if of_training:
        return f"it is the output of a training run ({of_training[0]})"
    others = [name for name in names if (folder / name).is_dir() and name != "vision_tower"]
    return f"it holds another folder, {others[0]}" if others else None


def _read(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def stock_name_fault(path: Path | str, model_type: str) -> str | None:
    """Why stock LLaVA would load a folder incorrectly because of its name, with advice; None if it loads it correctly."""
    path = Path(path).resolve()
    name = f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name
    lowered, wanted = name.lower(), "llava and mistral" if model_type == "llava_mistral" else "llava"
    wrong = [word for word in ("mpt", "mistral", "lora") if word in lowered and word not in wanted]
    if all(word in lowered for word in wanted.split(" and ")) and not wrong:
        return None
    advice = f"its name should contain {wanted}" + (f" and not {wrong[0]}" if wrong else "")
    return f"stock LLaVA chooses its loader by the folder's name; to load {path.name!r} as {model_type}, {advice}."
