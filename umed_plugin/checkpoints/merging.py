"""Writing checkpoints: merge a LoRA folder into its base, export one in the layout of the one that training began with.

Names, shapes and dtypes stay the original's. Merging works in float32, tensor by tensor, on the base's own files: one weight
file is in memory at a time. Exporting holds the trained checkpoint in memory whole. Everything is written aside and renamed.

How to run: ``umed merge TRAINED --base CKPT --out DIR``.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.checkpoints.loading import (
    ADAPTER,
    READ_WHEN_ANSWERING,
    TOWER,
    adapter_tensors,
    find_base,
    is_lora,
    read_config,
    read_tensors,
    weight_files,
)
from umed_plugin.errors import UmedError

_LEFT_BEHIND = (
    *("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "umed.json"),
    "umed_manifest.json",  # says what its own folder was made from
)


def merge(
    lora_dir: Path | str,
    base: Path | str | None,
    out: Path | str,
    *,
    with_tower: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the full checkpoint that a LoRA folder and its base make together; return its path.

    Weight files, tensor names, shapes and dtypes are the base's; so are the keys of ``config.json`` and the tokenizer.

    Args:
        lora_dir: what LLaVA's training wrote with ``--lora_enable True``.
        base: the checkpoint it was trained on; None takes the one that the adapter names.
        out: must not exist, unless ``overwrite``.
        with_tower: as of `export`.
        overwrite: replace ``out``.
    """
    lora_dir, out = Path(lora_dir), Path(out)
    if not is_lora(lora_dir):
        raise UmedError(
            f"{lora_dir}: no LoRA folder: it has no {ADAPTER}. Needed: the output folder of a training run with "
            "--lora_enable True."
        )
    trained_config = read_config(lora_dir)
    base = find_base(lora_dir, base)
    config = read_config(base)
    config.update({key: trained_config[key] for key in READ_WHEN_ANSWERING if key in trained_config and key in config})
    if trained_config.get("image_aspect_ratio", "square") != config.get("image_aspect_ratio", "square"):
        config["image_aspect_ratio"] = trained_config["image_aspect_ratio"]
    holds_tower = False
    deltas = _lora_deltas(lora_dir)
    _, others = adapter_tensors(lora_dir)
    with files.replacing_folder(out, overwrite=overwrite) as folder:
        _copy_small_files(base, folder)
        for file in weight_files(base):
            merged = _merged_tensors(read_tensors(file), deltas, others, lora_dir)
            holds_tower = holds_tower or _holds_tower(merged)
            _write_tensors(merged, folder / file.name)
        left = [name for name, (_, b, *_) in deltas.items() if b.any()] + list(others)
        if left:
            raise UmedError(
                f"{lora_dir}: trained {left[0]!r} ({len(left)} in all), which {base} does not have. Is --base right?"
            )
        if with_tower:
            _take_tower_along(config, folder, out)
        _name_tower(config, trained_config, holds_tower)
        _write_config(config, folder)
    return out


def _take_tower_along(config: dict[str, Any], folder: Path, out: Path) -> None:
    """Copy the tower's folder, if it is one on this machine, into ``folder`` and name it as it will lie in ``out``."""
    tower = config.get("mm_vision_tower", "")
    if os.path.isdir(tower):
        shutil.copytree(tower, folder / "vision_tower", dirs_exist_ok=True)
        config["mm_vision_tower"] = str(out.resolve() / "vision_tower")


def _holds_tower(tensors: dict[str, Any]) -> bool:
    return any(name.startswith(TOWER) for name in tensors)


def _name_tower(config: dict[str, Any], trained_config: dict[str, Any], holds_tower: bool) -> None:
    """Tell stock LLaVA to answer with the tower inside the checkpoint, when that is the one it was trained with.

    Where no tower lies inside, the key would make stock LLaVA begin with a random one.
    """
    if holds_tower and trained_config.get("unfreeze_mm_vision_tower"):
        config["unfreeze_mm_vision_tower"] = True


def _lora_deltas(lora_dir: Path) -> dict[str, tuple[Any, Any, float, bool]]:
    """Name of a base tensor -> (A [r, in], B [out, r], scaling, whether the base holds it transposed)."""
    config = json.loads((lora_dir / ADAPTER).read_text(encoding="utf-8"))
    unsupported = [key for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora") if config.get(key)]
    if config.get("peft_type") != "LORA" or unsupported:
        raise UmedError(
            f"{lora_dir / ADAPTER}: peft_type {config.get('peft_type')!r}, uses {', '.join(unsupported) or 'nothing special'}. "
            "Only plain LoRA, as LLaVA's --lora_enable writes it, can be merged."
        )
    rank = config["r"]
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    tensors, _ = adapter_tensors(lora_dir)
    others = [name for name in tensors if ".lora_A." not in name and ".lora_B." not in name]
    if others:
        raise UmedError(
            f"{lora_dir}: its adapter holds {others[0]!r} ({len(others)} such in all) beside the low-rank matrices, and merging "
            "would lose it. Train with --lora_bias none (LLaVA's default) and without adapters on embeddings."
        )
    deltas = {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        target = name.removeprefix("base_model.model.").replace(".lora_A", "").replace(".default", "")
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        deltas[target] = (a, b, scaling, bool(config.get("fan_in_fan_out")))
    return deltas


def _merged_tensors(
    tensors: dict[str, Any], deltas: dict[str, Any], others: dict[str, Any], lora_dir: Path
) -> dict[str, Any]:
    """One weight file's tensors with what training changed; what was used is taken out of ``deltas`` and ``others``."""
    merged = {}
    for name, old in tensors.items():
        new, change = others.pop(name, old).float(), None
        if name in deltas:
            a, b, scaling, transposed = deltas.pop(name)
            change = (b.float() @ a.float()) * scaling
            change = change.T if transposed else change
        for trained in (new, change):
            if trained is not None and trained.shape != old.shape:
                raise UmedError(
                    f"{lora_dir}: {name} is {tuple(trained.shape)}, in the base {tuple(old.shape)}. Is --base the checkpoint "
                    "that it was trained on?"
                )
        merged[name] = (new if change is None else new + change).to(old.dtype).contiguous()
    return merged


def export(
    checkpoint: Path | str, out: Path | str, *, like: Path | str, with_tower: bool = False, overwrite: bool = False
) -> Path:
    """Write a full checkpoint in the layout of the one it came from; return its path.

    LLaVA's full fine-tuning saves float32 tensors, those of the frozen tower too, and files that only a trainer reads. The
    export holds exactly the tensors of ``like``, in its dtypes and weight files, with its config keys and tokenizer files.

    Args:
        checkpoint: the trained one.
        out: must not exist, unless ``overwrite``; see `stock_name_fault` for its name.
        like: the checkpoint that training began with.
        with_tower: copy the vision tower's folder into ``out`` and name it in ``config.json`` (by absolute path), when it
            is a folder on this machine: ``out`` then does not need the folder of ``like``.
        overwrite: replace ``out``.
    """
    checkpoint, out, like = Path(checkpoint), Path(out), Path(like)
    trained_config, config = read_config(checkpoint), read_config(like)
    if trained_config["model_type"] != config["model_type"]:
        raise UmedError(f"{checkpoint} is {trained_config['model_type']}, but {like} is {config['model_type']}.")
    config.update({key: trained_config[key] for key in READ_WHEN_ANSWERING if key in trained_config})
    trained = {name: tensor for file in weight_files(checkpoint) for name, tensor in read_tensors(file).items()}
    holds_tower = False
    with files.replacing_folder(out, overwrite=overwrite) as folder:
        _copy_small_files(like, folder)
        for file in weight_files(like):
            old = read_tensors(file)
            missing = [name for name in old if name not in trained]
            if missing:
                raise UmedError(f"{checkpoint}: lacks {missing[0]!r} ({len(missing)} in all), which {like} has.")
            holds_tower = holds_tower or _holds_tower(old)
            _write_tensors(
                {name: trained[name].to(t.dtype).contiguous() for name, t in old.items()}, folder / file.name
            )
        if with_tower:
            _take_tower_along(config, folder, out)
        _name_tower(config, trained_config, holds_tower)
        _write_config(config, folder)
    return out


def stock_name_fault(path: Path | str, model_type: str) -> str | None:
    """What stock LLaVA would get wrong about a folder because of its name; None when it loads it right."""
    path = Path(path).resolve()
    name = f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name
    lowered, wanted = name.lower(), "llava and mistral" if model_type == "llava_mistral" else "llava"
    wrong = [word for word in ("mpt", "mistral", "lora") if word in lowered and word not in wanted]
    if all(word in lowered for word in wanted.split(" and ")) and not wrong:
        return None
    advice = f"its name should hold {wanted}" + (f" and not {wrong[0]}" if wrong else "")
    return f"stock LLaVA chooses its loader by the folder's name; to load {path.name!r} as {model_type}, {advice}."


def _copy_small_files(source: Path, folder: Path) -> None:
    """Tokenizer, generation config, weight index: all files but weights, config.json and a trainer's own."""
    weights = {file.name for file in weight_files(source)}
    for file in sorted(source.iterdir()):
        other_weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth") and file.name not in weights
        if file.is_file() and file.name not in weights and not other_weights and file.name not in _LEFT_BEHIND:
            shutil.copy2(file, folder / file.name)


def _write_tensors(tensors: dict[str, Any], file: Path) -> None:
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, file, metadata={"format": "pt"})
    else:
        import torch

        torch.save(tensors, file)


def _write_config(config: dict[str, Any], folder: Path) -> None:
    files.write_json(folder / "config.json", config, indent=2)
