"""What lies in a checkpoint's folder: its settings and its weight files. `umed_plugin.checkpoints.adapter_folder` reads adapters.

Weight files are checked by `umed_plugin.checkpoints.safe_loading` before anything opens them, and no Python in a checkpoint is
imported. `umed_plugin.checkpoints.loading` makes a model of a folder, `umed_plugin.checkpoints.merging` writes folders.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.pickles import printable
from umed_plugin.checkpoints.safe_loading import check_plain, load_pickle
from umed_plugin.errors import UmedError, UsageError, unknown_name

# model_type -> LLaVA's module and class. Checkpoints from before LLaVA 1.2 have the type "llava".
FAMILIES = {
    "llava_mistral": ("llava.model.language_model.llava_mistral", "LlavaMistralForCausalLM"),
    "llava_llama": ("llava.model.language_model.llava_llama", "LlavaLlamaForCausalLM"),
    "llava": ("llava.model.language_model.llava_llama", "LlavaLlamaForCausalLM"),
}
# model_type -> prompt template: the plugin's, and the one that stock LLaVA uses.
UMED_TEMPLATES = {"llava_mistral": "umed_mistral", "llava_llama": "umed_v1", "llava": "umed_v1"}
STOCK_TEMPLATES = {"llava_mistral": "mistral_instruct", "llava_llama": "llava_v1", "llava": "llava_v1"}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ADAPTER, NON_LORA = "adapter_config.json", "non_lora_trainables.bin"
TOWER = "model.vision_tower."
# LLaVA looks on the Hub for a tower whose name begins or reads so, and refuses every other name that is no path here.
_HUB_TOWERS, _HUB_TOWER = ("openai", "laion"), "ShareGPT4V"
UNFREEZE = (
    "unfreeze_mm_vision_tower"  # key of config.json: stock LLaVA then loads the tower weights inside the checkpoint
)
# Key of config.json beside an adapter or a projector: the base's own tower was left out, and the original one trained with.
TOWER_WEIGHTS, ORIGINAL_TOWER = "umed_tower_weights", "original"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROJECTOR = "mm_projector.bin"  # written by --tune_mm_mlp_adapter True
BYTE_PAIR_FILES = ("vocab.json", "merges.txt")  # what transformers' slow GPT2Tokenizer reads
TOKENIZER_FILES = (
    "tokenizer.model",
    *BYTE_PAIR_FILES,
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
            "the original form, as in liuhaotian/ or microsoft/llava-med-v1.5-mistral-7b on the Hub. Convert it: umed convert "
            f"{shlex.quote(str(path))} --out DIR"
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


def is_buffer(name: str) -> bool:
    """Whether a tensor is a constant and no weight, such as 0, 1, 2, ...: older transformers save it, newer ones do not.

    Example:
        >>> is_buffer("model.layers.0.self_attn.rotary_emb.inv_freq"), is_buffer("model.norm.weight")
        (True, False)
    """
    return name.endswith(("rotary_emb.inv_freq", "position_ids"))


def is_hub_tower(name: str) -> bool:
    """Whether LLaVA looks on the Hub for a tower of this name.

    Example:
        >>> is_hub_tower("openai/clip-vit-large-patch14-336"), is_hub_tower("../clip")
        (True, False)
    """
    return name.startswith(_HUB_TOWERS) or _HUB_TOWER in name


def local_tower(name: str, *checkpoints: Path) -> Path | None:
    """The folder of a tower that a checkpoint names, as an absolute path; None if it is not on this machine.

    Args:
        name: ``mm_vision_tower`` of config.json.
        checkpoints: LLaVA resolves a relative name against the working folder; it is looked up in these too.
    """
    places = (Path(name), *(checkpoint / name for checkpoint in checkpoints))
    return next((place.absolute() for place in places if (place / "config.json").is_file()), None)


def left_out_own_tower(config: dict[str, Any]) -> bool:
    """Whether a training of an adapter or a projector used the original tower, not the different one inside its base."""
    return config.get(TOWER_WEIGHTS) == ORIGINAL_TOWER


def is_lora(path: Path | str) -> bool:
    """Whether the folder holds a LoRA adapter instead of a full model."""
    return (Path(path) / ADAPTER).is_file()


def check_base(base: Path | str | None, *checkpoints: Path | str, trained: tuple[str, ...] = (ADAPTER,)) -> None:
    """Refuse ``--base`` where nothing takes it: a full checkpoint would be measured in place of the adapter that is meant.

    Args:
        base: as given.
        checkpoints: folders that it may be the base of.
        trained: files that have one, of which a folder must hold one.

    Raises:
        UsageError: a base is given, and none of the folders has use for it.
    """
    folders = [Path(checkpoint) for checkpoint in checkpoints]
    uses = any((folder / name).is_file() for folder in folders for name in trained)
    if base is not None and not uses and all(folder.is_dir() for folder in folders):
        raise UsageError(
            f"--base {base} has no effect: {' and '.join(map(str, checkpoints))} holds no {' or '.join(trained)}. Remove it, or "
            "give the folder that was trained on this base."
        )


def weight_files(checkpoint: Path | str, prefix: str = "", cache_dir: str | None = None) -> list[Path]:
    """The weight files of a full checkpoint: one file, or the shards of its index, in transformers' order of preference.

    Args:
        checkpoint: a folder, or a name on the Hugging Face Hub.
        prefix: skip shards without a tensor whose name begins with it.
        cache_dir: where files from the Hub are cached.

    Raises:
        UmedError: there are none, or a shard is missing.
    """
    if not os.path.isdir(checkpoint) and not _HUB_NAME.fullmatch(str(checkpoint)):
        raise UmedError(f"{checkpoint}: no such folder, and no name on the Hugging Face Hub.")

    def find(name: str) -> Path | None:
        if os.path.isdir(checkpoint):
            inside = Path(checkpoint) / name
            return inside if inside.is_file() else None
        from transformers.utils import cached_file

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
            shards = sorted({shard for tensor, shard in weight_map(file).items() if tensor.startswith(prefix)})
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


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard of an index.

    Raises:
        UmedError: the index cannot be read, or names files outside its folder.
    """
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = sorted(shard for shard in set(places.values()) if not is_plain_name(shard))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UmedError(f"{index}: is not an index of weight files ({error!r}). Copy or download it again.") from error
    if outside:
        raise UmedError(
            f"{index}: names {printable(outside[0])!r}, which is not a file of its folder ({len(outside)} such in all). Allowed: "
            "names of files beside the index. Download the checkpoint again."
        )
    return places


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
