"""Checkpoints: load one by what it is, merge a LoRA folder into its base, export one that stock LLaVA loads.

Stock LLaVA decides by the folder's name how to load a checkpoint; this module reads ``model_type`` from ``config.json``.
Vision-tower weights that lie inside a checkpoint are used (stock LLaVA drops them unless ``unfreeze_mm_vision_tower`` is
set). Merging works tensor by tensor in float32 on the base's own files, so that names, shapes and dtypes stay the base's and
no more than one weight file is in memory. Everything is written aside and renamed; pickles are loaded with
``weights_only=True``.

How to run: ``umed merge LORA_DIR --base CKPT --out DIR``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError, unknown_name

# model_type -> module and class of LLaVA's. "llava" is what checkpoints older than LLaVA 1.2 call themselves.
FAMILIES = {
    "llava_mistral": ("llava.model.language_model.llava_mistral", "LlavaMistralForCausalLM"),
    "llava_llama": ("llava.model.language_model.llava_llama", "LlavaLlamaForCausalLM"),
    "llava": ("llava.model.language_model.llava_llama", "LlavaLlamaForCausalLM"),
}
ADAPTER, NON_LORA = "adapter_config.json", "non_lora_trainables.bin"
TOWER = "model.vision_tower.vision_tower."
# What LLaVA reads from config.json when it answers; training may have set it anew, so it goes along into a merged checkpoint.
_READ_WHEN_ANSWERING = (
    "image_aspect_ratio",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_patch_merge_type",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
)
_LEFT_BEHIND = ("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")


def read_config(path: Path | str) -> dict[str, Any]:
    """Return ``config.json`` of a LLaVA checkpoint or LoRA folder.

    Raises:
        UmedError: there is none, or it is not LLaVA's.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        found = "no such folder" if not Path(path).is_dir() else "a folder without config.json"
        raise UmedError(
            f"{path}: {found}. Needed: a LLaVA checkpoint on this machine (config.json, weights, tokenizer). "
            "A checkpoint on the Hugging Face hub is fetched with: huggingface-cli download NAME --local-dir DIR"
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind == "llava" and "text_config" in config:
        raise UmedError(
            f"{file}: this is the transformers form of LLaVA (it has text_config). Needed: the original form, as on the hub "
            "under liuhaotian/ or microsoft/llava-med-v1.5-mistral-7b; LLaVA's own code cannot load the other."
        )
    if kind not in FAMILIES:
        raise UmedError(f"{file}: not a LLaVA checkpoint: {unknown_name('model_type', str(kind), FAMILIES)}")
    return config


def is_lora(path: Path | str) -> bool:
    """Whether the folder holds a LoRA adapter instead of a full model."""
    return (Path(path) / ADAPTER).is_file()


def weight_files(path: Path | str) -> list[Path]:
    """The files that hold a full checkpoint's weights: safetensors if there are any, else ``pytorch_model*.bin``.

    Raises:
        UmedError: there are none.
    """
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        files = sorted(Path(path).glob(pattern))
        if files:
            return files
    raise UmedError(f"{path}: holds no weights. Needed: model*.safetensors or pytorch_model*.bin.")


def read_tensors(file: Path) -> dict[str, Any]:
    """Name -> tensor of one weight file, on the CPU, in the dtype it was saved in."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    import torch

    return torch.load(file, map_location="cpu", weights_only=True)


def load_checkpoint(
    path: Path | str, base: Path | str | None = None, device: str | None = None, dtype: Any = None
) -> tuple[Any, Any, Any]:
    """Load a checkpoint, or a LoRA folder over its base, in evaluation mode.

    Args:
        path: a full checkpoint, or a folder that LLaVA's training wrote with ``--lora_enable True``.
        base: of a LoRA folder; by default the one that its adapter was trained on.
        device: ``cuda`` where there is one, else ``cpu``.
        dtype: of the weights; float32 by default.

    Returns:
        (tokenizer, model, image processor); the model of a LoRA folder is a PEFT model whose adapter can be switched off.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or torch.float32
    path = Path(path)
    if not is_lora(path):
        tokenizer, model = _load_full(path)
    else:
        config = read_config(path)
        tokenizer, model = _load_full(find_base(path, base), config)
        model = _wrap_adapter(model, path)
    model = model.to(device=device, dtype=dtype).eval()
    tower = model.get_vision_tower() if not is_lora(path) else model.get_base_model().get_vision_tower()
    return tokenizer, model, tower.image_processor


def find_base(lora_dir: Path, base: Path | str | None) -> Path:
    """The base of a LoRA folder: as given, else as its adapter names it.

    Raises:
        UmedError: it is not on this machine, or is itself a LoRA folder.
    """
    named = base or json.loads((lora_dir / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not named or not Path(named).is_dir():
        raise UmedError(
            f"{lora_dir} is a LoRA folder over {named!r}, which is no folder on this machine. Give the checkpoint that it "
            "was trained on with --base."
        )
    if is_lora(named):
        raise UmedError(
            f"--base {named} is a LoRA folder itself. Merge it first: umed merge {named} --base CKPT --out DIR"
        )
    return Path(named)


def _load_full(path: Path, config: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """(tokenizer, model) of a full checkpoint in float32, its own tower weights included; ``config`` overrides values."""
    import importlib

    from transformers import AutoTokenizer

    own = read_config(path)
    files = weight_files(path)
    changes = {key: config[key] for key in _READ_WHEN_ANSWERING if key in config} if config else {}
    _check_tower(path, own)
    module, name = FAMILIES[own["model_type"]]
    model_class = getattr(importlib.import_module(module), name)
    with _quiet():
        model_config = model_class.config_class.from_pretrained(path, **changes)
        model = model_class.from_pretrained(path, config=model_config)
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=False)
        tower = model.get_vision_tower()
        if not tower.is_loaded:
            tower.load_model()
    _add_image_tokens(tokenizer, model)
    inside = {name: tensor for file in files for name, tensor in _tower_tensors(file).items()}
    if inside:
        tower.vision_tower.load_state_dict(inside, strict=False)
    return tokenizer, model


def _tower_tensors(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as stream:
            return {name[len(TOWER) :]: stream.get_tensor(name) for name in stream.keys() if name.startswith(TOWER)}  # noqa: SIM118
    return {name[len(TOWER) :]: tensor for name, tensor in read_tensors(file).items() if name.startswith(TOWER)}


def _check_tower(path: Path, config: dict[str, Any]) -> None:
    tower = config.get("mm_vision_tower", config.get("vision_tower"))
    if tower is None:
        raise UmedError(
            f"{path}/config.json: has no mm_vision_tower, so this model sees no images. Needed: a LLaVA checkpoint."
        )
    if os.path.isabs(tower) and not os.path.isdir(tower):
        raise UmedError(
            f"{path}/config.json: mm_vision_tower is {tower}, and there is no such folder. If the tower was moved, write its "
            "new absolute path there."
        )


def _add_image_tokens(tokenizer: Any, model: Any) -> None:
    """What LLaVA's loader does after loading: tokens that the config asks for and the tokenizer does not have yet."""
    from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN

    if getattr(model.config, "mm_use_im_patch_token", True):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(model.config, "mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))


def _wrap_adapter(model: Any, lora_dir: Path) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    adapter, others = _adapter_tensors(lora_dir)
    unknown = model.load_state_dict(others, strict=False).unexpected_keys
    if unknown:
        raise UmedError(
            f"{lora_dir / NON_LORA}: holds {unknown[0]!r}, which the base does not have. Is --base the right one?"
        )
    config = LoraConfig.from_pretrained(lora_dir)
    with torch.no_grad():
        model = get_peft_model(model, config)
        set_peft_model_state_dict(model, adapter)
    return model


def _adapter_tensors(lora_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the adapter's tensors under PEFT's names, the other trained tensors under the base's names) of a LoRA folder."""
    files = [
        lora_dir / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (lora_dir / name).is_file()
    ]
    if not files:
        raise UmedError(f"{lora_dir}: has {ADAPTER} but neither adapter_model.safetensors nor adapter_model.bin.")
    if not (lora_dir / NON_LORA).is_file():
        raise UmedError(
            f"{lora_dir}: has no {NON_LORA} (the trained projector), which LLaVA writes at the end of training only. Take the "
            "output folder of a run that ended instead of one of its checkpoint-N folders."
        )
    others = {name.removeprefix("base_model.model."): t for name, t in read_tensors(lora_dir / NON_LORA).items()}
    return read_tensors(files[0]), others


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning that tower weights are unused: `_load_full` uses them right after."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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
    tensors, _ = _adapter_tensors(lora_dir)
    deltas = {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        target = name.removeprefix("base_model.model.").replace(".lora_A", "").replace(".default", "")
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        deltas[target] = (a, b, scaling, bool(config.get("fan_in_fan_out")))
    return deltas


def merge(lora_dir: Path | str, base: Path | str | None, out: Path | str, *, overwrite: bool = False) -> Path:
    """Write the full checkpoint that a LoRA folder and its base make together; return its path.

    Weight files, tensor names, shapes and dtypes are the base's; so are the keys of ``config.json`` and the tokenizer.

    Args:
        lora_dir: what LLaVA's training wrote with ``--lora_enable True``.
        base: the checkpoint it was trained on; None takes the one that the adapter names.
        out: must not exist, unless ``overwrite``.
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
    config.update({key: trained_config[key] for key in _READ_WHEN_ANSWERING if key in trained_config and key in config})
    if trained_config.get("image_aspect_ratio", "square") != config.get("image_aspect_ratio", "square"):
        config["image_aspect_ratio"] = trained_config["image_aspect_ratio"]
    deltas = _lora_deltas(lora_dir)
    _, others = _adapter_tensors(lora_dir)
    with _written_aside(out, overwrite) as folder:
        _copy_small_files(base, folder)
        for file in weight_files(base):
            _write_tensors(_merged_tensors(read_tensors(file), deltas, others, lora_dir), folder / file.name)
        left = [name for name, (_, b, *_) in deltas.items() if b.any()] + list(others)
        if left:
            raise UmedError(
                f"{lora_dir}: trained {left[0]!r} ({len(left)} in all), which {base} does not have. Is --base right?"
            )
        _write_config(config, folder)
    return out


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
    config.update({key: trained_config[key] for key in _READ_WHEN_ANSWERING if key in trained_config})
    trained = {name: tensor for file in weight_files(checkpoint) for name, tensor in read_tensors(file).items()}
    with _written_aside(out, overwrite) as folder:
        _copy_small_files(like, folder)
        for file in weight_files(like):
            old = read_tensors(file)
            missing = [name for name in old if name not in trained]
            if missing:
                raise UmedError(f"{checkpoint}: lacks {missing[0]!r} ({len(missing)} in all), which {like} has.")
            _write_tensors(
                {name: trained[name].to(t.dtype).contiguous() for name, t in old.items()}, folder / file.name
            )
        tower = config.get("mm_vision_tower", "")
        if with_tower and os.path.isdir(tower):
            shutil.copytree(tower, folder / "vision_tower", dirs_exist_ok=True)
            config["mm_vision_tower"] = str(out.resolve() / "vision_tower")
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


@contextmanager
def _written_aside(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when the block ends well and is removed when it does not."""
    if out.exists() and not overwrite:
        raise UmedError(
            f"{out}: exists already and is left as it is. Choose another --out, or replace it with --overwrite."
        )
    aside, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if out.exists():
            os.replace(out, old)
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


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
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
