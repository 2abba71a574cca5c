"""Parts of writing a trained checkpoint in the layout of the one with which its training began.

Both `umed_plugin.checkpoints.merging` and `umed_plugin.checkpoints.exporting` use them: small files, the tower, dtypes, and
tensors that the original lacks.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.checkpoints.folder import TOWER, UNFREEZE, local_tower, read_object, weight_files
from umed_plugin.checkpoints.kept_share import KeptShare
from umed_plugin.checkpoints.weight_shards import refuse_not_finite, stored
from umed_plugin.errors import warn

_NOT_COPIED = (
    *("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "umed.json"),
    "umed_manifest.json",  # describes only the folder in which it is
)


def copy_small_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation config, weight index: all files except weights and a trainer's own."""
    weights = {file.name for file in weight_files(source)}
    for file in sorted(source.iterdir()):
        other_weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth") and file.name not in weights
        if file.is_file() and file.name not in weights and not other_weights and file.name not in _NOT_COPIED:
            shutil.copy2(file, folder / file.name)


def name_tower_here(config: dict[str, Any], *checkpoints: Path) -> None:
    """Name a tower that config.json names by a relative path by its absolute one: the new checkpoint lies elsewhere.

    Args:
        config: of the new checkpoint.
        checkpoints: in which the tower may lie.
    """
    name = config.get("mm_vision_tower")
    tower = local_tower(name, *checkpoints) if isinstance(name, str) and not os.path.isabs(name) else None
    if tower is not None:
        config["mm_vision_tower"] = os.path.normpath(tower)


def copy_tower(config: dict[str, Any], folder: Path, out: Path) -> None:
    """Copy the tower, if it is a folder on this machine, into ``folder``; name it by its final path in ``out``.

    Args:
        config: of the new checkpoint, after `name_tower_here`.
        folder: in which the new checkpoint is written.
        out: where it will lie.
    """
    tower = config.get("mm_vision_tower")
    if not isinstance(tower, str) or not os.path.isdir(tower):
        warn(f"--with-tower has no effect: mm_vision_tower is {tower!r}, which is not a folder on this machine.")
        return
    shutil.copytree(tower, folder / "vision_tower", dirs_exist_ok=True)
    config["mm_vision_tower"] = str(out.resolve() / "vision_tower")


def has_tower(tensors: dict[str, Any]) -> bool:
    """Whether tensors of the vision tower are among them."""
    return any(name.startswith(TOWER) for name in tensors)


def name_tower(config: dict[str, Any], trained_config: dict[str, Any], holds_tower: bool) -> None:
    """Make stock LLaVA load the tower inside the checkpoint, if training used that one.

    In a checkpoint without a tower, the key would make stock LLaVA use a randomly initialized one.
    """
    if holds_tower and trained_config.get(UNFREEZE):
        config[UNFREEZE] = True


def dtype_of(tensors: dict[str, Any], dtype: str | None) -> Any:
    """The requested dtype, else that of the first of the stored tensors."""
    import torch

    return getattr(torch, dtype) if dtype else next(iter(tensors.values())).torch_dtype()


def written(name: str, base: Any, trained: Any, dtype: str | None, kept: KeptShare | None, where: Path) -> Any:
    """A trained tensor as it is written: in the base's dtype, or, if it holds fractions, in the requested one.

    Raises:
        UmedError: values are NaN or infinite, as trained or as they would be written. ``where`` is the folder of the training.
    """
    import torch

    wanted = base.dtype if dtype is None or not base.is_floating_point() else getattr(torch, dtype)
    written = finite(name, trained, wanted, where).contiguous()
    if kept is not None and base.shape == trained.shape:  # with added tokens there is nothing to compare all rows with
        kept.add(name, base, trained, written)
    return written


def finite(name: str, trained: Any, dtype: Any, where: Path) -> Any:
    """A trained tensor in another dtype; refused if values are NaN or infinite before or after. See `written`."""
    diverged = (
        "The training diverged, or its base or its files are damaged. Train again with a lower --learning_rate, and with --bf16 "
        "True where it was --fp16."
    )
    refuse_not_finite(name, trained, where, diverged)
    cast = trained.to(dtype)
    narrow = str(dtype).removeprefix("torch.")
    refuse_not_finite(name, cast, f"{where}, written as {narrow}", "Write it with --dtype bfloat16 or --dtype float32.")
    return cast


def add_tensors(writer: Any, new: dict[str, Any], dtype: Any, file: Path, kept: KeptShare | None, where: Path) -> None:
    """Add tensors that the base lacks to its last weight file, in its dtype, and to the index. See `written`."""
    for name, tensor in new.items():
        writer.add(name, finite(name, tensor, dtype, where))
    if kept is not None:
        kept.added += len(new)
    for index in file.parent.glob(f"*{file.suffix}.index.json") if new else ():
        content = read_object(index)
        content["weight_map"].update(dict.fromkeys(new, file.name))
        files.write_json(index, content, indent=2)


def name_dtype(config: dict[str, Any], dtype: str | None, folder: Path) -> None:
    """State a requested dtype where the base's is stated, and the size of the weights in their index."""
    if dtype is None:
        return
    config.update({key: dtype for key in ("torch_dtype", "dtype") if key in config})
    for file in folder.glob("*.index.json"):
        index = read_object(file)
        tensors = [tensor for part in weight_files(folder) for tensor in stored(part).values()]
        index.setdefault("metadata", {})["total_size"] = sum(tensor.size for tensor in tensors)
        files.write_json(file, index, indent=2)
