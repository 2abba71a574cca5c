"""Read checkpoints: find their weight files, and load the model.

Stock LLaVA chooses the loader by the folder's name; this module reads ``model_type`` from ``config.json``. Vision-tower weights
inside a checkpoint are used (stock LLaVA drops them unless ``unfreeze_mm_vision_tower`` is set). Weight files are checked by
`umed_plugin.checkpoints.safe_loading` before anything opens them, and no Python in a checkpoint is imported.
`umed_plugin.checkpoints.merging` writes checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.pickles import printable, read_pickle
from umed_plugin.checkpoints.safe_loading import check_plain, load_pickle
from umed_plugin.checkpoints.stored import read_safetensors
from umed_plugin.checkpoints.utf8_paths import in_utf8
from umed_plugin.errors import UmedError, unknown_name

# model_type -> LLaVA's module and class. Checkpoints from before LLaVA 1.2 have the type "llava".
FAMILIES = {
    "llava_mistral": ("llava.model.language_model.llava_mistral", "LlavaMistralForCausalLM"),
    "llava_llama": ("llava.model.language_model.llava_llama", "LlavaLlamaForCausalLM"),
    "llava": ("llava.model.language_model.llava_llama", "LlavaLlamaForCausalLM"),
}
# model_type -> prompt template: the plugin's, and the one that stock LLaVA uses.
UMED_TEMPLATES = {"llava_mistral": "umed_mistral", "llava_llama": "umed_v1", "llava": "umed_v1"}
STOCK_TEMPLATES = {"llava_mistral": "mistral_instruct", "llava_llama": "llava_v1", "llava": "llava_v1"}
ADAPTER, NON_LORA = "adapter_config.json", "non_lora_trainables.bin"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TOWER = "model.vision_tower."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROJECTOR = "mm_projector.bin"  # written by --tune_mm_mlp_adapter True
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_LANGUAGE = ("llama", "mistral")  # model types without a projector, over which LLaVA trains one
# Keys of config.json that LLaVA reads when it answers. Training may change them, so a merged checkpoint gets the trained values.
READ_WHEN_ANSWERING = (
    "image_aspect_ratio",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_patch_merge_type",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
)


def read_config(path: Path | str) -> dict[str, Any]:
    """Return ``config.json`` of a LLaVA checkpoint or LoRA folder.

    Raises:
        UmedError: there is none, or it is not a LLaVA checkpoint.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        fault = "no such folder" if not Path(path).is_dir() else "a folder without config.json"
        raise UmedError(
            f"{path}: {fault}. Needed: a LLaVA checkpoint on this machine (config.json, weights, tokenizer). "
            "Download a checkpoint from the Hugging Face Hub with: huggingface-cli download NAME --local-dir DIR"
        )
    config = read_object(file)
    kind = config.get("model_type")
    if kind in _LANGUAGE:
        raise UmedError(
            f"{file}: is a plain language model ({kind}), not a LLaVA checkpoint. If a LoRA folder or a projector was trained "
            "over it, write the full checkpoint first: umed merge TRAINED --base CKPT --out DIR"
        )
    if kind == "llava" and "text_config" in config:
        raise UmedError(
            f"{file}: this is the transformers form of LLaVA (it has text_config), which LLaVA's own code cannot load. Needed: "
            "the original form, as in liuhaotian/ or microsoft/llava-med-v1.5-mistral-7b on the Hub."
        )
    if kind not in FAMILIES:
        raise UmedError(f"{file}: not a LLaVA checkpoint: {unknown_name('model_type', str(kind), FAMILIES)}")
    return config


def read_language_config(path: Path | str) -> dict[str, Any]:
    """``config.json`` of a LLaVA checkpoint, or of a plain language model over which LLaVA trains one; see `read_config`."""
    config = read_object(Path(path) / "config.json") if (Path(path) / "config.json").is_file() else {}
    return config if config.get("model_type") in _LANGUAGE else read_config(path)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UmedError: the file is something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise UmedError(f"{file}: is not JSON ({type(error).__name__}). Copy or download it again.") from error
    if not isinstance(content, dict):
        raise UmedError(f"{file}: is not a JSON object. Copy or download it again.")
    return content


def is_lora(path: Path | str) -> bool:
    """Whether the folder holds a LoRA adapter instead of a full model."""
    return (Path(path) / ADAPTER).is_file()


def weight_files(checkpoint: Path | str, prefix: str = "", cache_dir: str | None = None) -> list[Path]:
    """The weight files of a full checkpoint: one file, or the shards of its index, in transformers' order of preference.

    Args:
        checkpoint: a folder, or a name on the Hugging Face Hub.
        prefix: skip shards without a tensor whose name begins with it.
        cache_dir: where files from the Hub are cached.

    Raises:
        UmedError: there are none, or a shard is missing.
    """
    from transformers.utils import cached_file

    def find(name: str) -> Path | None:
        file = cached_file(
            str(checkpoint), name, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        return None if file is None else Path(file)

    for name in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        file = find(name)
        if file is not None and not name.endswith(".json"):
            return [file]
        if file is not None:
            weight_map = _weight_map(file)
            shards = sorted({shard for tensor, shard in weight_map.items() if tensor.startswith(prefix)})
            paths = {shard: find(shard) for shard in shards}
            missing = [shard for shard, path in paths.items() if path is None]
            if missing:
                raise UmedError(
                    f"{checkpoint}: {name} lists {', '.join(missing)}, which is missing. Download the checkpoint again."
                )
            return [path for path in paths.values() if path is not None]
    raise UmedError(
        f"{checkpoint}: contains no weights. Needed: model.safetensors or pytorch_model.bin, or their shards with the index."
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard of an index.

    Raises:
        UmedError: the index cannot be read, or names files outside its folder.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = sorted(shard for shard in set(weight_map.values()) if not is_plain_name(shard))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UmedError(f"{index}: is not an index of weight files ({error!r}). Copy or download it again.") from error
    if outside:
        raise UmedError(
            f"{index}: names {printable(outside[0])!r}, which is not a file of its folder ({len(outside)} such in all). Allowed: "
            "names of files beside the index. Download the checkpoint again."
        )
    return weight_map


def is_plain_name(name: Any) -> bool:
    """Whether a name in an index is that of a file beside it, not a path to somewhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def read_tensors(file: Path) -> dict[str, Any]:
    """Name -> tensor of one weight file, on the CPU, in its saved dtype.

    Raises:
        UmedError: it holds more than plain tensors, or cannot be read.
    """
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        check_plain([file])
        return load_file(file)
    import torch

    tensors = load_pickle(file)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UmedError(f"{file}: is not a dictionary of tensors, as weight files are. Copy or download it again.")
    return dict(tensors)


def load_checkpoint(
    path: Path | str, base: Path | str | None = None, device: str | None = None, dtype: Any = None
) -> tuple[Any, Any, Any]:
    """Load a checkpoint, or a LoRA folder over its base, in evaluation mode.

    Args:
        path: a full checkpoint, or a folder that LLaVA's training wrote with ``--lora_enable True``.
        base: base of a LoRA folder; by default the checkpoint that its adapter names.
        device: by default ``cuda`` if available, else ``cpu``.
        dtype: of the weights; by default ``torch.float32``.

    Returns:
        (tokenizer, model, image processor). For a LoRA folder the model is a PEFT model, whose adapter can be disabled.

    Raises:
        UmedError: it is not a LLaVA checkpoint, or its base, tower or weights are missing or do not fit.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint
        >>> checkpoint = make_checkpoint(Path(tempfile.mkdtemp()) / "llava-mistral-tiny")
        >>> tokenizer, model, image_processor = load_checkpoint(checkpoint, device="cpu")
        >>> type(model).__name__, model.dtype
        ('LlavaMistralForCausalLM', torch.float32)
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or torch.float32
    path = Path(path)
    if not is_lora(path):
        tokenizer, model = _load_full(path, dtype)
    else:
        refuse_transformers_adapter(path)
        config = read_config(path)
        tokenizer, model = _load_full(find_base(path, base), dtype, config)
        model = _wrap_adapter(model, path)
    model = model.to(device=device, dtype=dtype).eval()
    tower = model.get_vision_tower() if not is_lora(path) else model.get_base_model().get_vision_tower()
    return tokenizer, model, tower.image_processor


def named_base(lora_dir: Path, named: Any) -> Any:
    """The base that an adapter names. A path that was typed relative to another folder is looked for above the adapter's own."""
    if not isinstance(named, str) or Path(named).is_absolute() or Path(named).is_dir():
        return named
    above = (folder / named for folder in Path(os.path.abspath(lora_dir)).parents)
    return next((str(path) for path in above if path.is_dir()), named)


def find_base(lora_dir: Path, base: Path | str | None) -> Path:
    """The base of a LoRA folder: ``base`` if given, else the one that its adapter names.

    Raises:
        UmedError: it is not on this machine, or it is a LoRA folder itself.
    """
    folder = base or named_base(lora_dir, read_object(lora_dir / ADAPTER).get("base_model_name_or_path"))
    if not folder or not Path(folder).is_dir():
        raise UmedError(
            f"{lora_dir}: is a LoRA folder over {folder!r}, which is not a folder on this machine. Pass the checkpoint on which "
            "it was trained with --base."
        )
    if is_lora(folder):
        raise UmedError(
            f"--base {folder}: is a LoRA folder itself. Merge it first: umed merge {folder} --base CKPT --out DIR"
        )
    return Path(folder)


def _load_full(path: Path, dtype: Any, config: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """(tokenizer, model) of a full checkpoint, with its own tower weights; ``config`` overrides values."""
    import importlib

    from transformers import AutoTokenizer

    own = read_config(path)
    changes = {key: config[key] for key in READ_WHEN_ANSWERING if key in config} if config else {}
    _check_tower(path, own)
    check_plain([*weight_files(path), *_files_of_tower(own)])
    module, name = FAMILIES[own["model_type"]]
    model_class = getattr(importlib.import_module(module), name)
    with _quiet():
        model_config = model_class.config_class.from_pretrained(path, **changes)
        # In the requested dtype at once: 7 billion parameters in float32 are 28 GB. A tower inside the checkpoint is built, and
        # filled, while the model is: its weights need memory from the start.
        lean = not own.get("unfreeze_mm_vision_tower")
        model = model_class.from_pretrained(path, config=model_config, torch_dtype=dtype, low_cpu_mem_usage=lean)
        with in_utf8(Path(path)) as readable:
            tokenizer = AutoTokenizer.from_pretrained(readable, use_fast=False, trust_remote_code=False)
        tower = model.get_vision_tower()
        if not tower.is_loaded:
            tower.load_model()
    _add_image_tokens(tokenizer, model)
    inside = tower_tensors(path)
    if inside:
        misfit = tower_misfit(tower.state_dict(), inside)
        if misfit:
            raise UmedError(
                f"{path}: its vision-tower weights do not fit {tower.vision_tower_name}, the mm_vision_tower of its "
                f"config.json: {misfit}. Set mm_vision_tower to the tower with which the checkpoint was trained."
            )
        tower.load_state_dict(inside, strict=False)
    return tokenizer, model


def tower_tensors(checkpoint: Path | str, cache_dir: str | None = None) -> dict[str, Any]:
    """The vision tower's weights inside a checkpoint (folder or Hub), by their names in LLaVA's tower; empty if none."""
    tensors = {}
    for file in weight_files(checkpoint, TOWER, cache_dir):
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            check_plain([file])
            with safe_open(str(file), framework="pt", device="cpu") as stream:
                names = [name for name in list(stream.keys()) if name.startswith(TOWER)]
                tensors.update({name[len(TOWER) :]: stream.get_tensor(name) for name in names})
        else:
            tensors.update({n[len(TOWER) :]: t for n, t in read_tensors(file).items() if n.startswith(TOWER)})
    return {name: tensor for name, tensor in tensors.items() if not _is_counter(name)}


def tower_misfit(own: dict[str, Any], inside: dict[str, Any]) -> str | None:
    """Why the weights ``inside`` a checkpoint cannot replace a tower's ``own`` ones, as text; None if they fit."""
    own = {name: tensor for name, tensor in own.items() if not _is_counter(name)}
    missing, unknown = sorted(set(own) - set(inside)), sorted(set(inside) - set(own))
    shapes = [
        f"{name} is {tuple(inside[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(inside))
        if inside[name].shape != own[name].shape
    ]
    if not (missing or unknown or shapes):
        return None
    return (
        f"{len(missing)} tensors are missing, {len(unknown)} are unknown, {len(shapes)} have another shape "
        f"({'; '.join([*shapes, *missing, *unknown][:3])})"
    )


def _is_counter(name: str) -> bool:
    """``position_ids`` is 0, 1, 2, ... and not a weight: older transformers save it, newer ones do not."""
    return name.endswith("position_ids")


def _check_tower(path: Path, config: dict[str, Any]) -> None:
    tower = config.get("mm_vision_tower", config.get("vision_tower"))
    if tower is None:
        raise UmedError(
            f"{path}/config.json: has no mm_vision_tower, so this model cannot see images. Needed: a LLaVA checkpoint."
        )
    if os.path.isabs(tower) and not os.path.isdir(tower):
        raise UmedError(
            f"{path}/config.json: mm_vision_tower is {tower}, which does not exist. If the tower was moved, set mm_vision_tower "
            "to its new absolute path."
        )


def _files_of_tower(config: dict[str, Any]) -> list[Path]:
    """Weight files of a tower that is a folder on this machine."""
    tower = config.get("mm_vision_tower", config.get("vision_tower"))
    return weight_files(tower) if tower and os.path.isdir(tower) else []


def _add_image_tokens(tokenizer: Any, model: Any) -> None:
    """Add the tokens that the configuration requests and the tokenizer lacks, as LLaVA's loader does after loading."""
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

    adapter, others = adapter_tensors(lora_dir)
    unknown = model.load_state_dict(others, strict=False).unexpected_keys
    if unknown:
        raise UmedError(f"{lora_dir / NON_LORA}: contains {unknown[0]!r}, which the base does not have. Check --base.")
    config = LoraConfig.from_pretrained(lora_dir)
    with torch.no_grad():
        model = get_peft_model(model, config)
        set_peft_model_state_dict(model, adapter)
    return model


def refuse_transformers_adapter(lora_dir: Path) -> None:
    """Refuse an adapter that was trained over transformers' form of LLaVA, with TRL or peft.

    Raises:
        UmedError: its tensors are named as in that form.
    """
    for name in _ADAPTER_FILES:
        file = lora_dir / name
        if not file.is_file():
            continue
        check_plain([file])
        names = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file).tensors
        if any(".language_model." in tensor for tensor in names):
            raise UmedError(
                f"{lora_dir}: is an adapter of transformers' form of LLaVA, as TRL trains it. Merge it there first: "
                "model = PeftModel.from_pretrained(model, FOLDER).merge_and_unload(); model.save_pretrained(MERGED). Then "
                "convert it to LLaVA's layout: umed convert MERGED --out DIR"
            )


def adapter_tensors(lora_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a LoRA folder: (the adapter's tensors under PEFT's names, the other trained tensors under the base's names)."""
    files = [lora_dir / name for name in _ADAPTER_FILES if (lora_dir / name).is_file()]
    if not files:
        raise UmedError(f"{lora_dir}: has {ADAPTER} but neither adapter_model.safetensors nor adapter_model.bin.")
    if not (lora_dir / NON_LORA).is_file():
        raise UmedError(
            f"{lora_dir}: has no {NON_LORA} (the trained projector), which LLaVA writes at the end of training only. Use the "
            "output folder of a finished run, not one of its checkpoint-N folders."
        )
    others = {name.removeprefix("base_model.model."): t for name, t in read_tensors(lora_dir / NON_LORA).items()}
    return read_tensors(files[0]), others


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' warning that tower weights are unused: `_load_full` uses them right afterwards."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
