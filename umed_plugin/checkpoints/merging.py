"""Merge a LoRA folder, or a projector, into its base.

Names and dtypes stay the base's, unless another dtype is requested. Weights are read and written tensor by tensor; a LoRA delta
is computed in float32. Only an adapter, and a ``.bin`` file that is written, are in memory as a whole. Folders are written
atomically. `umed_plugin.checkpoints.exporting` does the same for full fine-tuning.

How to run: ``umed merge TRAINED --base CKPT --out DIR``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.checkpoints.adapter_folder import (
    adapter_settings,
    adapter_tensors,
    find_base,
    refuse_transformers_adapter,
)
from umed_plugin.checkpoints.added_tokens import flags_that_add, why_lost
from umed_plugin.checkpoints.folder import (
    ADAPTER,
    EMBEDDING,
    FAMILIES,
    PROJECTOR,
    READ_WHEN_ANSWERING,
    TOWER,
    is_lora,
    left_out_own_tower,
    read_config,
    read_language_config,
    read_tensors,
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
from umed_plugin.checkpoints.plain_lora import layer_of, untrained_fault, untrained_layers
from umed_plugin.checkpoints.stored import StoredTensor
from umed_plugin.checkpoints.tower_weights import tower_parts, whole_tower
from umed_plugin.checkpoints.trained_on import check_trained_on
from umed_plugin.checkpoints.weight_shards import stored, told, weight_writer
from umed_plugin.checkpoints.writing import writing_checkpoint
from umed_plugin.errors import UmedError

# Ends of the two matrices' names.
_A, _B = ".lora_A.weight", ".lora_B.weight"


def merge(
    lora_dir: Path | str,
    base: Path | str | None,
    out: Path | str,
    *,
    with_tower: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    dtype: str | None = None,
    kept: KeptShare | None = None,
) -> Path:
    """Merge a LoRA folder into its base and write the full checkpoint; return its path.

    Weight files, tensor names, shapes and dtypes are the base's, and so are the tokenizer and the keys of ``config.json``, with
    ``umed_label_share`` besides. A tower that was trained (``--umed_tower_lr``) comes besides, whole, in the last weight file.

    Args:
        lora_dir: folder that LLaVA's training wrote with ``--lora_enable True``, or with ``--tune_mm_mlp_adapter True``.
        base: the checkpoint on which it was trained; None: the one that the adapter names.
        out: must not exist, unless ``overwrite``. See `stock_name_fault` for its name.
        with_tower: as for `export`.
        overwrite: replace ``out``.
        progress: called with (weight files written, weight files in all).
        dtype: of all weights, such as ``float32``; None: each has that of the base.
        kept: collects how much of what was learnt the dtype keeps.

    Raises:
        UmedError: ``lora_dir`` is not a plain LoRA folder, it does not fit the base, or ``out`` exists.

    Example:
        A LoRA folder of rank 1 on one layer, with the files that LLaVA's training writes:

        >>> import json, shutil, tempfile, torch
        >>> from pathlib import Path
        >>> from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint
        >>> base = make_checkpoint(Path(tempfile.mkdtemp()) / "llava-mistral-tiny")
        >>> lora = base.with_name("stage1-lora")
        >>> lora.mkdir()
        >>> config = shutil.copy(base / "config.json", lora)
        >>> adapter = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["layers.0.self_attn.q_proj"]}
        >>> size = (lora / "adapter_config.json").write_text(json.dumps(adapter))
        >>> layer = "base_model.model.model.layers.0.self_attn.q_proj"
        >>> matrices = {f"{layer}.lora_A.weight": torch.ones(1, 128), f"{layer}.lora_B.weight": torch.ones(128, 1)}
        >>> torch.save(matrices, lora / "adapter_model.bin")
        >>> torch.save({}, lora / "non_lora_trainables.bin")
        >>> merge(lora, base, base.with_name("llava-mistral-merged")).name
        'llava-mistral-merged'
    """
    lora_dir, out = Path(lora_dir), Path(out)
    if not is_lora(lora_dir) and not (lora_dir / PROJECTOR).is_file():
        raise UmedError(
            f"{lora_dir}: is not a LoRA folder: it has no {ADAPTER}, and no {PROJECTOR}. Needed: the output folder of a training "
            "run with --lora_enable True or --tune_mm_mlp_adapter True."
        )
    settings = None  # a projector has none
    if is_lora(lora_dir):
        refuse_transformers_adapter(lora_dir)
        settings = adapter_settings(lora_dir)
    trained_config = read_config(lora_dir)
    base = _find_base(lora_dir, base)
    base_config = read_language_config(base)
    refuse_missing(base, base_config)
    _refuse_unsaved_tokens(lora_dir, trained_config, base)
    plain = base_config["model_type"] not in FAMILIES
    # Over a plain language model, all that concerns images comes from the training.
    config = {**base_config, **trained_config} if plain else _merged_config(base_config, trained_config)
    name_tower_here(config, base, lora_dir)
    deltas, others = _trained_parts(lora_dir, settings)
    sources = weight_files(base)
    if settings is not None:
        _refuse_untrained(lora_dir, settings, deltas, [tensor for file in sources for tensor in stored(file).values()])
    holds_tower = any(has_tower(stored(file)) for file in sources)
    if holds_tower and left_out_own_tower(trained_config):
        others = {**_original_tower(others, config, sources, lora_dir), **others}
    new_tower: dict[str, Any] = {}
    if tower_parts(others) and not holds_tower:
        new_tower = whole_tower(_taken(others, tower_parts(others)), config, lora_dir)
    with writing_checkpoint(out, overwrite=overwrite, inputs=(lora_dir, base)) as folder:
        copy_small_files(base, folder)
        # Each tensor of the base is read, merged and written before the next; used entries leave `deltas` and `others`.
        for file in told(sources, progress):
            tensors = stored(file)
            writer = weight_writer(folder / file.name, [*tensors, *others, *new_tower])
            for name, tensor in tensors.items():
                old = tensor.read()
                trained = _merged(name, old, deltas, others, lora_dir)
                writer.add(name, written(name, old, trained, dtype, kept, lora_dir))
            if file is sources[-1]:
                new = {**(_new_projector(others) if plain else {}), **new_tower}
                add_tensors(writer, new, dtype_of(tensors, dtype), folder / file.name, kept, lora_dir)
            writer.close()
        # What is left was not used. An adapter that is all zero, such as one on the tower, changes nothing.
        unused = [name for name, (_, b, *_) in deltas.items() if b.any()] + list(others)
        if unused:
            raise UmedError(
                f"{lora_dir}: trained {unused[0]!r} ({len(unused)} in all), which {base} does not have. Check --base."
            )
        if with_tower:
            copy_tower(config, folder, out)
        name_tower(config, trained_config, holds_tower or bool(new_tower))
        name_dtype(config, dtype, folder)
        files.write_json(folder / "config.json", config, indent=2)
    return out


def trained_bits(trained: Path | str) -> int:
    """Bits of the frozen base under an adapter while it was trained: 4 or 8 (``--bits``), else 16.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from umed_plugin.checkpoints.merging import trained_bits
        >>> lora = Path(tempfile.mkdtemp())
        >>> config = {"model_type": "llava_mistral", "quantization_config": {"load_in_4bit": True}}
        >>> size = (lora / "config.json").write_text(json.dumps(config))
        >>> trained_bits(lora)
        4
    """
    quantization = read_config(trained).get("quantization_config") or {}
    return 4 if quantization.get("load_in_4bit") else 8 if quantization.get("load_in_8bit") else 16


def _find_base(trained: Path, base: Path | str | None) -> Path:
    """The checkpoint on which a LoRA folder or a projector was trained."""
    if is_lora(trained):
        return find_base(trained, base)
    if base is None:
        raise UmedError(f"{trained}: holds a projector. Pass the checkpoint on which it was trained with --base.")
    check_trained_on(trained, Path(base))
    return Path(base)


def _refuse_unsaved_tokens(trained: Path, config: dict[str, Any], base: Path) -> None:
    """Refuse a training that added tokens to the embeddings: with LoRA or a projector alone, LLaVA does not save their rows."""
    lost = flags_that_add(config, base)
    if lost:
        raise UmedError(f"{trained}: was trained with --{lost[0]} True, which added {why_lost(lost[0], base)}")


def _trained_parts(trained: Path, settings: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Deltas of an adapter, and the other trained tensors, by the base's names; ``settings`` are the adapter's, if it is one."""
    if settings is not None:
        adapter, others = adapter_tensors(trained, settings)
        return _lora_deltas(trained, settings, adapter), others
    return {}, {name.removeprefix("base_model.model."): t for name, t in read_tensors(trained / PROJECTOR).items()}


def _refuse_untrained(
    trained: Path, settings: dict[str, Any], deltas: Collection[str], base: list[StoredTensor]
) -> None:
    """Refuse an adapter that lacks a layer of its settings, as loading does: its file is not whole."""
    layers = [
        tensor.name.removesuffix(".weight")
        for tensor in base
        if tensor.name.endswith(".weight") and len(tensor.shape) == 2 and not tensor.name.startswith((TOWER, EMBEDDING))
    ]
    untrained = untrained_layers(settings, [name.removesuffix(".weight") for name in deltas], layers)
    if untrained:
        raise UmedError(untrained_fault(trained, untrained))


def _original_tower(others: dict[str, Any], config: dict[str, Any], sources: list[Path], where: Path) -> dict[str, Any]:
    """The tower with which the training saw, by the names of the one inside the base, which it left out.

    Raises:
        UmedError: it has not the tensors of the one inside the base.
    """
    tower = whole_tower(tower_parts(others), config, where)
    lacking = [name for file in sources for name in tower_parts(stored(file)) if name not in tower]
    if lacking:
        raise UmedError(
            f"{where}: was trained with --umed_tower_weights original, but the mm_vision_tower of the "
            f"base's config.json, {config.get('mm_vision_tower')}, lacks {lacking[0]!r} ({len(lacking)} in all). Name there the "
            "tower of the training."
        )
    return tower


def _taken(others: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """``part``, removed from ``others``."""
    return {name: others.pop(name) for name in part}


def _new_projector(others: dict[str, Any]) -> dict[str, Any]:
    """What a plain language model lacks, taken from the other trained tensors."""
    names = sorted(name for name in others if name.startswith(("model.mm_projector.", "model.image_newline")))
    return {name: others.pop(name) for name in names}


def _merged_config(config: dict[str, Any], trained_config: dict[str, Any]) -> dict[str, Any]:
    """The base's ``config.json`` with the trained values of the keys that it has, and stage 1's share of the labels."""
    config = {
        key: trained_config.get(key, value) if key in READ_WHEN_ANSWERING else value for key, value in config.items()
    }
    if LABEL_SHARE in trained_config:
        config[LABEL_SHARE] = trained_config[LABEL_SHARE]
    # LLaVA reads a missing key as `square`, so the key is added if training used another value.
    if trained_config.get("image_aspect_ratio", "square") != config.get("image_aspect_ratio", "square"):
        config["image_aspect_ratio"] = trained_config["image_aspect_ratio"]
    return config


def _lora_deltas(
    lora_dir: Path, settings: dict[str, Any], tensors: dict[str, Any]
) -> dict[str, tuple[Any, Any, float, bool]]:
    """Name of a base tensor -> (A [r, in], B [out, r], scaling, whether the base holds it transposed)."""
    rank = settings["r"]
    scaling = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
    others = [name for name in tensors if not name.endswith((_A, _B))]
    if others:
        raise UmedError(
            f"{lora_dir}: besides low-rank matrices its adapter contains {others[0]!r} ({len(others)} such in all), which "
            "merging would lose. Train with --lora_bias none (LLaVA's default) and without adapters on embeddings."
        )
    deltas = {}
    for name, a in tensors.items():
        if not name.endswith(_A):
            continue
        target = f"{layer_of(name)}.weight"
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        deltas[target] = (a, b, scaling, bool(settings.get("fan_in_fan_out")))
    return deltas


def _merged(name: str, old: Any, deltas: dict[str, Any], others: dict[str, Any], lora_dir: Path) -> Any:
    """One tensor of the base with its trained change; entries that were used are removed from ``deltas`` and ``others``."""
    new, change = others.pop(name, old), None
    if name in deltas:
        a, b, scaling, transposed = deltas.pop(name)
        change = (b.float() @ a.float()) * scaling
        change = change.T if transposed else change
    for trained in (new, change):
        if trained is not None and trained.shape != old.shape:
            raise UmedError(
                f"{lora_dir}: {name} has shape {tuple(trained.shape)}, but {tuple(old.shape)} in the base. Is --base the "
                "checkpoint on which it was trained?"
            )
    return new if change is None else new.float() + change
