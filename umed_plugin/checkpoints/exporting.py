"""Export a fully fine-tuned checkpoint in the layout of the one with which its training began.

Names and dtypes stay the original's, unless another dtype is requested, and shapes too, unless training added tokens. Weights are
read and written tensor by tensor, and folders atomically.

How to run: ``umed merge TRAINED --base CKPT --out DIR``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.checkpoints.folder import (
    EMBEDDING,
    HEAD,
    READ_WHEN_ANSWERING,
    TOKENIZER_FILES,
    TOWER,
    UNFREEZE,
    is_buffer,
    read_config,
    weight_files,
)
from umed_plugin.checkpoints.kept_share import KeptShare
from umed_plugin.checkpoints.label_share import LABEL_SHARE
from umed_plugin.checkpoints.missing_tensors import refuse_missing
from umed_plugin.checkpoints.original_layout import (
    add_tensors,
    copy_small_files,
    copy_tower,
    dtype_of,
    has_tower,
    name_dtype,
    name_tower,
    name_tower_here,
    written,
)
from umed_plugin.checkpoints.tower_weights import tower_parts
from umed_plugin.checkpoints.weight_shards import stored, told, weight_writer
from umed_plugin.checkpoints.writing import writing_checkpoint
from umed_plugin.errors import UmedError


def export(
    checkpoint: Path | str,
    out: Path | str,
    *,
    like: Path | str,
    with_tower: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    dtype: str | None = None,
    kept: KeptShare | None = None,
) -> Path:
    """Write a fully fine-tuned checkpoint in the layout of the one with which training began; return its path.

    LLaVA's full fine-tuning saves float32 tensors, including the frozen tower's, and files that only a trainer reads. The
    export contains exactly the tensors of ``like``, in its dtypes and weight files, with its config keys (and
    ``umed_label_share``) and tokenizer files. A tower that was trained (``--umed_tower_lr``) comes besides, in the last weight
    file. If training added tokens, their rows, the tokenizer and ``vocab_size`` are the trained ones.

    Args:
        checkpoint: the trained one.
        out: must not exist, unless ``overwrite``; see `stock_name_fault` for its name.
        like: the checkpoint with which training began.
        with_tower: if the vision tower is a folder on this machine, copy it into ``out`` and name it in ``config.json`` by
            absolute path. ``out`` then does not need the folder of ``like``.
        overwrite: replace ``out``.
        progress: called with (weight files written, weight files in all).
        dtype, kept: as for `merge`.

    Raises:
        UmedError: the two are of different model types, a tensor is missing, or ``out`` exists.
    """
    checkpoint, out, like = Path(checkpoint), Path(out), Path(like)
    trained_config, config = read_config(checkpoint), read_config(like)
    if trained_config["model_type"] != config["model_type"]:
        raise UmedError(
            f"{checkpoint}: is {trained_config['model_type']}, but {like} is {config['model_type']}. Check --base."
        )
    refuse_missing(like, config)
    kept_keys = (*READ_WHEN_ANSWERING, LABEL_SHARE)
    config.update({key: trained_config[key] for key in kept_keys if key in trained_config})
    name_tower_here(config, like, checkpoint)
    trained = {name: tensor for file in weight_files(checkpoint) for name, tensor in stored(file).items()}
    if trained_config.get("tie_word_embeddings") and EMBEDDING in trained:
        trained.setdefault(HEAD, trained[EMBEDDING])  # one tensor under two names, of which training saves the first
    old = {file: stored(file) for file in weight_files(like)}
    rows = _check_tensors(
        trained, {name: t for tensors in old.values() for name, t in tensors.items()}, checkpoint, like
    )
    holds_tower = any(map(has_tower, old.values()))
    says_so = trained_config.get(UNFREEZE)
    new_tower = tower_parts(trained) if says_so and not holds_tower else {}
    with writing_checkpoint(out, overwrite=overwrite, inputs=(checkpoint, like)) as folder:
        copy_small_files(like, folder)
        for file in told(list(old), progress):
            writer = weight_writer(folder / file.name, [*old[file], *new_tower])
            for name, tensor in old[file].items():
                before = tensor.read()
                # Training changes no buffer, and newer transformers do not save it.
                after = before if is_buffer(name) else trained[name].read()
                writer.add(name, written(name, before, after, dtype, kept, checkpoint))
            if new_tower and file is list(old)[-1]:
                tower = {name: tensor.read() for name, tensor in new_tower.items()}
                add_tensors(writer, tower, dtype_of(old[file], dtype), folder / file.name, kept, checkpoint)
            writer.close()
        if rows is not None:
            _take_tokenizer(checkpoint, folder)
            config["vocab_size"] = rows
        if with_tower:
            copy_tower(config, folder, out)
        name_tower(config, trained_config, holds_tower or bool(new_tower))
        name_dtype(config, dtype, folder)
        files.write_json(folder / "config.json", config, indent=2)
    return out


def _check_tensors(trained: dict[str, Any], old: dict[str, Any], checkpoint: Path, like: Path) -> int | None:
    """Compare names and shapes of a full training's tensors with the original's.

    Returns:
        The number of rows of the embeddings, if training added tokens; else None.

    Raises:
        UmedError: they differ in anything else.
    """
    missing = [name for name in old if name not in trained and not is_buffer(name)]
    if missing:
        raise UmedError(f"{checkpoint}: lacks {missing[0]!r} ({len(missing)} in all), which {like} has. Check --base.")
    lost = [n for n in trained if n not in old and n != HEAD and TOWER not in n and not is_buffer(n)]
    if lost:
        raise UmedError(
            f"{checkpoint}: trained {lost[0]!r} ({len(lost)} in all), which {like} does not have. Check --base."
        )
    before, after = (tensors[EMBEDDING].shape[0] for tensors in (old, trained)) if EMBEDDING in old else (0, 0)
    for name, tensor in old.items():
        if is_buffer(name):
            continue
        rows = after if name in (EMBEDDING, HEAD) and after > before else tensor.shape[0] if tensor.shape else 0
        if trained[name].shape != (*((rows,) if tensor.shape else ()), *tensor.shape[1:]):
            raise UmedError(
                f"{checkpoint}: {name} has shape {trained[name].shape}, but {tensor.shape} in {like}. Is --base the checkpoint "
                "with which training began?"
            )
    return after if after > before else None


def _take_tokenizer(checkpoint: Path, folder: Path) -> None:
    """Copy the tokenizer with the tokens that training added."""
    found = [checkpoint / name for name in TOKENIZER_FILES if (checkpoint / name).is_file()]
    if not found:
        raise UmedError(
            f"{checkpoint}: its embeddings have rows for added tokens, but it has no tokenizer. Copy the tokenizer that the "
            "training used into it."
        )
    for file in found:
        shutil.copy2(file, folder / file.name)
