"""Write checkpoints: merge a LoRA folder into its base, or export a fully fine-tuned one in the layout of the original.

Names and dtypes stay the original's, unless another dtype is requested, and shapes too, unless training added tokens. Weights are
read and written tensor by tensor; a LoRA delta is computed in float32. Only an adapter, and a ``.bin`` file that is written,
are in memory as a whole. Folders are written atomically.

How to run: ``umed merge TRAINED --base CKPT --out DIR``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.checkpoints.kept_share import KeptShare
from umed_plugin.checkpoints.loading import (
    ADAPTER,
    EMBEDDING,
    FAMILIES,
    HEAD,
    PROJECTOR,
    READ_WHEN_ANSWERING,
    TOKENIZER_FILES,
    TOWER,
    adapter_tensors,
    find_base,
    is_lora,
    read_config,
    read_language_config,
    read_object,
    read_tensors,
    refuse_transformers_adapter,
    weight_files,
)
from umed_plugin.checkpoints.tower_weights import tower_parts, whole_tower
from umed_plugin.checkpoints.weight_shards import stored, told, weight_writer
from umed_plugin.checkpoints.writing import writing_checkpoint
from umed_plugin.errors import UmedError

_NOT_COPIED = (
    *("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "umed.json"),
    "umed_manifest.json",  # describes only the folder in which it is
)


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

    Weight files, tensor names, shapes and dtypes are the base's, and so are the tokenizer and the keys of ``config.json``. A
    tower that was trained (``--umed_tower_lr``) comes besides, whole, in the last weight file.

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
        >>> adapter = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "base_model_name_or_path": str(base)}
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
    if is_lora(lora_dir):
        refuse_transformers_adapter(lora_dir)
    trained_config = read_config(lora_dir)
    base = _find_base(lora_dir, base)
    base_config = read_language_config(base)
    _refuse_unsaved_tokens(lora_dir, trained_config, base)
    plain = base_config["model_type"] not in FAMILIES
    # Over a plain language model, all that concerns images comes from the training.
    config = {**base_config, **trained_config} if plain else _merged_config(base_config, trained_config)
    deltas, others = _trained_parts(lora_dir)
    sources = weight_files(base)
    holds_tower = any(_holds_tower(stored(file)) for file in sources)
    new_tower: dict[str, Any] = {}
    if tower_parts(others) and not holds_tower:
        new_tower = whole_tower(_taken(others, tower_parts(others)), config, lora_dir)
    with writing_checkpoint(out, overwrite=overwrite, inputs=(lora_dir, base)) as folder:
        _copy_small_files(base, folder)
        # Each tensor of the base is read, merged and written before the next; used entries leave `deltas` and `others`.
        for file in told(sources, progress):
            tensors = stored(file)
            writer = weight_writer(folder / file.name, [*tensors, *others, *new_tower])
            for name, tensor in tensors.items():
                old = tensor.read()
                trained = _merged(name, old, deltas, others, lora_dir)
                writer.add(name, _written(name, old, trained, dtype, kept))
            if file is sources[-1]:
                new = {**(_new_projector(others) if plain else {}), **new_tower}
                _add_tensors(writer, new, _dtype_of(tensors, dtype), folder / file.name)
            writer.close()
        # What is left was not used. An adapter that is all zero, such as one on the tower, changes nothing.
        unused = [name for name, (_, b, *_) in deltas.items() if b.any()] + list(others)
        if unused:
            raise UmedError(
                f"{lora_dir}: trained {unused[0]!r} ({len(unused)} in all), which {base} does not have. Check --base."
            )
        if with_tower:
            _copy_tower(config, folder, out)
        _name_tower(config, trained_config, holds_tower or bool(new_tower))
        _name_dtype(config, dtype, folder)
        _write_config(config, folder)
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
    return Path(base)


def _refuse_unsaved_tokens(trained: Path, config: dict[str, Any], base: Path) -> None:
    """Refuse a training that added tokens to the embeddings: with LoRA or a projector alone, LLaVA does not save their rows."""
    requested = {"mm_use_im_patch_token": ("<im_patch>",), "mm_use_im_start_end": ("<im_start>", "<im_end>")}
    files_of_tokenizer = [base / name for name in TOKENIZER_FILES if (base / name).is_file()]
    known = b"".join(file.read_bytes() for file in files_of_tokenizer)
    asked = [key for key in requested if config.get(key)]
    lost = [key for key in asked if not all(token.encode() in known for token in requested[key])]
    if lost:
        raise UmedError(
            f"{trained}: was trained with --{lost[0]} True, which added tokens that {base} does not have. LLaVA saves the rows "
            f"of added tokens with full fine-tuning only. Train with --{lost[0]} False, as LLaVA's own checkpoints were."
        )


def _trained_parts(trained: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Deltas of an adapter, and the other trained tensors, by the base's names."""
    if is_lora(trained):
        adapter, others = adapter_tensors(trained)
        return _lora_deltas(trained, adapter), others
    return {}, {name.removeprefix("base_model.model."): t for name, t in read_tensors(trained / PROJECTOR).items()}


def _dtype_of(tensors: dict[str, Any], dtype: str | None) -> Any:
    import torch

    return getattr(torch, dtype) if dtype else next(iter(tensors.values())).torch_dtype()


def _taken(others: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """``part``, removed from ``others``."""
    return {name: others.pop(name) for name in part}


def _new_projector(others: dict[str, Any]) -> dict[str, Any]:
    """What a plain language model lacks, taken from the other trained tensors."""
    names = sorted(name for name in others if name.startswith(("model.mm_projector.", "model.image_newline")))
    return {name: others.pop(name) for name in names}


def _add_tensors(writer: Any, new: dict[str, Any], dtype: Any, file: Path) -> None:
    """Add tensors that the base lacks to its last weight file, in its dtype, and to the index."""
    for name, tensor in new.items():
        writer.add(name, tensor.to(dtype))
    for index in file.parent.glob(f"*{file.suffix}.index.json") if new else ():
        content = read_object(index)
        content["weight_map"].update(dict.fromkeys(new, file.name))
        files.write_json(index, content, indent=2)


def _merged_config(config: dict[str, Any], trained_config: dict[str, Any]) -> dict[str, Any]:
    """The base's ``config.json`` with the trained values of the keys that it has."""
    config = {
        key: trained_config.get(key, value) if key in READ_WHEN_ANSWERING else value for key, value in config.items()
    }
    # LLaVA reads a missing key as `square`, so the key is added if training used another value.
    if trained_config.get("image_aspect_ratio", "square") != config.get("image_aspect_ratio", "square"):
        config["image_aspect_ratio"] = trained_config["image_aspect_ratio"]
    return config


def _copy_tower(config: dict[str, Any], folder: Path, out: Path) -> None:
    """Copy the tower, if it is a folder on this machine, into ``folder``; name it by its final path in ``out``."""
    tower = config.get("mm_vision_tower", "")
    if os.path.isdir(tower):
        shutil.copytree(tower, folder / "vision_tower", dirs_exist_ok=True)
        config["mm_vision_tower"] = str(out.resolve() / "vision_tower")


def _holds_tower(tensors: dict[str, Any]) -> bool:
    return any(name.startswith(TOWER) for name in tensors)


def _name_tower(config: dict[str, Any], trained_config: dict[str, Any], holds_tower: bool) -> None:
    """Make stock LLaVA load the tower inside the checkpoint, if training used that one.

    In a checkpoint without a tower, the key would make stock LLaVA use a randomly initialized one.
    """
    if holds_tower and trained_config.get("unfreeze_mm_vision_tower"):
        config["unfreeze_mm_vision_tower"] = True


def _lora_deltas(lora_dir: Path, tensors: dict[str, Any]) -> dict[str, tuple[Any, Any, float, bool]]:
    """Name of a base tensor -> (A [r, in], B [out, r], scaling, whether the base holds it transposed)."""
    config = read_object(lora_dir / ADAPTER)
    unsupported = [key for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora") if config.get(key)]
    if config.get("peft_type") != "LORA" or unsupported:
        raise UmedError(
            f"{lora_dir / ADAPTER}: peft_type {config.get('peft_type')!r} with {', '.join(unsupported) or 'no extensions'}. "
            "Only plain LoRA, as LLaVA's --lora_enable writes it, can be merged."
        )
    rank = config["r"]
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    others = [name for name in tensors if ".lora_A." not in name and ".lora_B." not in name]
    if others:
        raise UmedError(
            f"{lora_dir}: besides low-rank matrices its adapter contains {others[0]!r} ({len(others)} such in all), which "
            "merging would lose. Train with --lora_bias none (LLaVA's default) and without adapters on embeddings."
        )
    deltas = {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        target = name.removeprefix("base_model.model.").replace(".lora_A", "").replace(".default", "")
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        deltas[target] = (a, b, scaling, bool(config.get("fan_in_fan_out")))
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
    return new if change is None else new.float().add_(change)


def _written(name: str, base: Any, trained: Any, dtype: str | None, kept: KeptShare | None) -> Any:
    """A trained tensor as it is written: in the base's dtype, or, if it holds fractions, in the requested one."""
    import torch

    wanted = base.dtype if dtype is None or not base.is_floating_point() else getattr(torch, dtype)
    written = trained.to(wanted).contiguous()
    if kept is not None and base.shape == trained.shape:  # with added tokens there is nothing to compare all rows with
        kept.add(name, base, trained, written)
    return written


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
    export contains exactly the tensors of ``like``, in its dtypes and weight files, with its config keys and tokenizer files. A
    tower that was trained (``--umed_tower_lr``) comes besides, in the last weight file. If training added tokens, their rows,
    the tokenizer and ``vocab_size`` are the trained ones.

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
    config.update({key: trained_config[key] for key in READ_WHEN_ANSWERING if key in trained_config})
    trained = {name: tensor for file in weight_files(checkpoint) for name, tensor in stored(file).items()}
    if trained_config.get("tie_word_embeddings") and EMBEDDING in trained:
        trained.setdefault(HEAD, trained[EMBEDDING])  # one tensor under two names, of which training saves the first
    old = {file: stored(file) for file in weight_files(like)}
    rows = _check_tensors(
        trained, {name: t for tensors in old.values() for name, t in tensors.items()}, checkpoint, like
    )
    holds_tower = any(map(_holds_tower, old.values()))
    says_so = trained_config.get("unfreeze_mm_vision_tower")
    new_tower = tower_parts(trained) if says_so and not holds_tower else {}
    with writing_checkpoint(out, overwrite=overwrite, inputs=(checkpoint, like)) as folder:
        _copy_small_files(like, folder)
        for file in told(list(old), progress):
            writer = weight_writer(folder / file.name, [*old[file], *new_tower])
            for name, tensor in old[file].items():
                writer.add(name, _written(name, tensor.read(), trained[name].read(), dtype, kept))
            if new_tower and file is list(old)[-1]:
                tower = {name: tensor.read() for name, tensor in new_tower.items()}
                _add_tensors(writer, tower, _dtype_of(old[file], dtype), folder / file.name)
            writer.close()
        if rows is not None:
            _take_tokenizer(checkpoint, folder)
            config["vocab_size"] = rows
        if with_tower:
            _copy_tower(config, folder, out)
        _name_tower(config, trained_config, holds_tower or bool(new_tower))
        _name_dtype(config, dtype, folder)
        _write_config(config, folder)
    return out


def _check_tensors(trained: dict[str, Any], old: dict[str, Any], checkpoint: Path, like: Path) -> int | None:
    """Compare names and shapes of a full training's tensors with the original's.

    Returns:
        The number of rows of the embeddings, if training added tokens; else None.

    Raises:
        UmedError: they differ in anything else.
    """
    missing = [name for name in old if name not in trained]
    if missing:
        raise UmedError(f"{checkpoint}: lacks {missing[0]!r} ({len(missing)} in all), which {like} has. Check --base.")
    lost = [n for n in trained if n not in old and n != HEAD and TOWER not in n and not n.endswith("inv_freq")]
    if lost:
        raise UmedError(
            f"{checkpoint}: trained {lost[0]!r} ({len(lost)} in all), which {like} does not have. Check --base."
        )
    before, after = (tensors[EMBEDDING].shape[0] for tensors in (old, trained)) if EMBEDDING in old else (0, 0)
    for name, tensor in old.items():
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


def _copy_small_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation config, weight index: all files except weights and a trainer's own."""
    weights = {file.name for file in weight_files(source)}
    for file in sorted(source.iterdir()):
        other_weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth") and file.name not in weights
        if file.is_file() and file.name not in weights and not other_weights and file.name not in _NOT_COPIED:
            shutil.copy2(file, folder / file.name)


def _name_dtype(config: dict[str, Any], dtype: str | None, folder: Path) -> None:
    """State a requested dtype where the base's is stated, and the size of the weights in their index."""
    if dtype is None:
        return
    config.update({key: dtype for key in ("torch_dtype", "dtype") if key in config})
    for file in folder.glob("*.index.json"):
        index = read_object(file)
        tensors = [tensor for part in weight_files(folder) for tensor in stored(part).values()]
        index.setdefault("metadata", {})["total_size"] = sum(tensor.size for tensor in tensors)
        files.write_json(file, index, indent=2)


def _write_config(config: dict[str, Any], folder: Path) -> None:
    files.write_json(folder / "config.json", config, indent=2)
