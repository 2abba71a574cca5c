"""From transformers' form of a LLaVA model (``LlavaForConditionalGeneration``) to LLaVA's own layout, which stock LLaVA loads.

The inverse of :mod:`umed_plugin.checkpoints.to_transformers`; the model may have been trained in transformers' form meanwhile.
The vision tower is written to the checkpoint's folder ``vision_tower``. ``config.json`` names it by its absolute path, because
LLaVA resolves a relative one against the working folder.

How to run: ``umed convert FOLDER --out DIR``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.folder import EMBEDDING, HEAD, UNFREEZE, weight_files
from umed_plugin.checkpoints.generation import with_ends
from umed_plugin.checkpoints.hf_processor import read_image_processor, read_json, write_llava_tokenizer
from umed_plugin.checkpoints.missing_tensors import missing_language, missing_of_tower, names_in, refuse
from umed_plugin.checkpoints.rope import LLAVA_KINDS, kind_of_scaling, old_rope
from umed_plugin.checkpoints.to_transformers import (
    NAMES,
    OF_THE_FILE,
    ORIGINAL,
    PROJECTORS,
)
from umed_plugin.checkpoints.tower_weights import bare_tower_name
from umed_plugin.checkpoints.weight_shards import ShardWriter, of_all_bytes, stream
from umed_plugin.checkpoints.writing import writing_checkpoint
from umed_plugin.errors import UmedError
from umed_plugin.files import write_json

_CLASSES = {"mistral": ("llava_mistral", "LlavaMistralForCausalLM"), "llama": ("llava_llama", "LlavaLlamaForCausalLM")}
_PROJECTOR = "multi_modal_projector."
_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip


def is_transformers_form(path: Path | str) -> bool:
    """Whether the folder contains transformers' form of a LLaVA model, not LLaVA's own layout."""
    config = read_json(Path(path) / "config.json")
    return config.get("model_type") == "llava" and "text_config" in config


def to_llava(
    checkpoint: Path | str,
    out: Path | str,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write transformers' form of a LLaVA model in LLaVA's layout; return the folder.

    Args:
        checkpoint: folder with ``config.json``, weights, processor, and the ``tokenizer.model`` that LLaVA reads.
        out: must not exist, unless ``overwrite``. Stock LLaVA chooses its loader by the folder's name:
            `writing.stock_name_fault`.
        overwrite: replace ``out``.
        progress: called with (bytes done, bytes in all).

    Raises:
        UmedError: LLaVA's classes cannot express the model, a file of it is missing, or ``out`` exists.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from umed_plugin.checkpoints.to_transformers import to_transformers
        >>> from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint
        >>> checkpoint = make_checkpoint(Path(tempfile.mkdtemp()) / "llava-mistral-tiny")
        >>> transformers_form = to_transformers(checkpoint, checkpoint.with_name("tiny-hf"))
        >>> folder = to_llava(transformers_form, checkpoint.with_name("llava-mistral-back"))
        >>> read_json(folder / "config.json")["model_type"]
        'llava_mistral'
    """
    checkpoint, out = Path(checkpoint), Path(out)
    config = read_json(checkpoint / "config.json")
    _check_expressible(checkpoint, config)
    _refuse_missing(checkpoint, config)
    original = config.get(ORIGINAL, {})
    tower, projector = {}, {}
    with writing_checkpoint(out, overwrite=overwrite, inputs=(checkpoint,)) as folder:
        image_id = config["image_token_index"] if "image_token_index" in config else config["image_token_id"]
        rows = write_llava_tokenizer(checkpoint, folder, original.get("tokenizer_config", {}), image_id)
        processor, ratio = read_image_processor(checkpoint)
        files = weight_files(checkpoint)
        writer = ShardWriter(folder, of_all_bytes(files, progress))
        # One pass over the weights. The language model goes straight into shards; tower and projector, both small, are collected
        # first, since the one gets a folder of its own and the other may become a single layer.
        for file in files:
            for name, tensor in stream(file):
                known = _old_name(name, checkpoint)
                if known.startswith("vision_tower."):
                    tower[bare_tower_name(known)] = tensor
                elif known.startswith(_PROJECTOR):
                    projector[known[len(_PROJECTOR) :]] = tensor
                else:
                    ours = _llava_name(known)
                    writer.add(ours, tensor[:rows] if ours in (EMBEDDING, HEAD) else tensor)
        # Without an activation between its two layers, transformers' projector is LLaVA's linear one.
        kind = "linear" if config.get("projector_hidden_act", "gelu") == PROJECTORS["linear"] else "mlp2x_gelu"
        for name, tensor in _projector(projector, kind).items():
            writer.add(f"model.mm_projector.{name}", tensor)
        writer.finish()
        new = _llava_config(config, original.get("config", {}), rows, kind, ratio, len(projector["linear_1.weight"][0]))
        write_json(folder / "config.json", {**new, "mm_vision_tower": str(out.resolve() / "vision_tower")}, indent=2)
        _write_tower(folder / "vision_tower", tower, config["vision_config"], processor)
        generation = with_ends(read_json(checkpoint / "generation_config.json"), {**config, **config["text_config"]})
        generation.pop("suppress_tokens", None)
        write_json(folder / "generation_config.json", generation, indent=2)
    return out


def _check_expressible(checkpoint: Path, config: dict[str, Any]) -> None:
    """Refuse what LLaVA's classes cannot express, all faults at once."""
    language, vision = config["text_config"], config.get("vision_config", {})
    values = {
        "text_config.model_type": (language.get("model_type", "llama"), tuple(_CLASSES)),
        "vision_config.model_type": (vision.get("model_type", "clip_vision_model"), ("clip_vision_model",)),
        "projector_hidden_act": (config.get("projector_hidden_act", "gelu"), tuple(PROJECTORS.values())),
        "vision_feature_select_strategy": (
            config.get("vision_feature_select_strategy", "default"),
            ("default", "full"),
        ),
        "multimodal_projector_bias": (config.get("multimodal_projector_bias", True), (True,)),
        "kind of text_config.rope_scaling": (
            kind_of_scaling(old_rope(language).get("rope_scaling") or {}),
            ("default", *LLAVA_KINDS),
        ),
    }
    faults = [f"{k} is {v!r}; allowed: {', '.join(map(str, a))}" for k, (v, a) in values.items() if v not in a]
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        faults.append(f"vision_feature_layer is {layer!r}; allowed: the index of one layer")
    if faults:
        raise UmedError(
            f"{checkpoint / 'config.json'}: LLaVA's classes cannot express this model: {'; '.join(faults)}."
        )


def _refuse_missing(checkpoint: Path, config: dict[str, Any]) -> None:
    """Refuse transformers' form if its weight files lack tensors of the model."""
    names = {_old_name(name, checkpoint) for name in names_in(checkpoint)}
    tied = {"tie_word_embeddings": bool(config.get("tie_word_embeddings"))}
    language = {_llava_name(name) for name in names if name.startswith("language_model.")}
    missing = missing_language(language, {**tied, **config["text_config"]})
    needed = [f"{_PROJECTOR}linear_{layer}.{part}" for layer in (1, 2) for part in ("weight", "bias")]
    missing += [name for name in needed if name not in names]
    tower = [name for name in names if name.startswith("vision_tower.")]
    missing += missing_of_tower(tower, config.get("vision_config", {}))
    refuse(missing, checkpoint)


def _old_name(name: str, checkpoint: Path) -> str:
    """The name under which transformers saves a tensor, given that name or the one that version 5 uses in memory."""
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    known = name.removeprefix("model.")
    if not known.startswith(("language_model.", "vision_tower.", _PROJECTOR)):
        raise UmedError(
            f"{checkpoint}: contains {name!r}, which LlavaForConditionalGeneration does not have. Needed: a LLaVA model."
        )
    return known


def _llava_name(name: str) -> str:
    return next(ours + name[len(theirs) :] for ours, theirs in NAMES if name.startswith(theirs))


def _projector(tensors: dict[str, Any], kind: str) -> dict[str, Any]:
    """LLaVA's projector from transformers' two layers; without an activation between them they are one linear layer.

    linear_2(linear_1(x)) = W2 (W1 x + b1) + b2. If W2 is the identity, as `to_transformers` writes it, W1 is kept exactly.
    """
    if kind == "mlp2x_gelu":
        return {re.sub("^linear_2", "2", re.sub("^linear_1", "0", name)): tensor for name, tensor in tensors.items()}
    w1, b1, w2, b2 = (tensors[f"linear_{layer}.{part}"] for layer in (1, 2) for part in ("weight", "bias"))
    weight, bias = w2.double() @ w1.double(), w2.double() @ b1.double() + b2.double()
    return {"weight": weight.to(w1.dtype), "bias": bias.to(b1.dtype)}


def _llava_config(
    config: dict[str, Any], original: dict[str, Any], rows: int, kind: str, ratio: str, tower_width: int
) -> dict[str, Any]:
    """``config.json``: keys of the language model, and ``mm_*`` keys; those that transformers lacks are the original's."""
    language = old_rope({**_sizes(config["text_config"]), **config["text_config"]})
    language = {key: value for key, value in language.items() if key not in OF_THE_FILE}
    model_type, class_name = _CLASSES[config["text_config"].get("model_type", "llama")]
    defaults = {
        "mm_patch_merge_type": "flat", "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True,
        "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False, "tokenizer_padding_side": "right",
    }  # fmt: skip
    whole = config.get("vision_feature_select_strategy", "default") == "full"
    return {
        **language,
        **defaults,
        **{key: value for key, value in original.items() if key not in ("vision_tower", UNFREEZE)},
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": rows,
        "mm_hidden_size": tower_width,
        "mm_projector_type": kind,
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "cls_patch" if whole else "patch",
        "image_aspect_ratio": ratio,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings") or language.get("tie_word_embeddings")),
        "torch_dtype": config.get("torch_dtype") or config.get("dtype") or "float16",
    }


def _sizes(language: dict[str, Any]) -> dict[str, Any]:
    """What makes up the language model, where ``text_config`` leaves it to its class, as the models under llava-hf do.

    LLaVA's classes have the same values, but other programs read ``config.json`` alone.
    """
    from transformers import LlamaConfig, MistralConfig

    classes = {"llama": LlamaConfig, "mistral": MistralConfig}
    given = {key: value for key, value in language.items() if key in _SIZES}
    whole = classes[language.get("model_type", "llama")](**given).to_dict()
    return {key: whole[key] for key in _SIZES if key in whole}


def _write_tower(folder: Path, tensors: dict[str, Any], vision: dict[str, Any], processor: dict[str, Any]) -> None:
    folder.mkdir()
    writer = ShardWriter(folder)
    for name, tensor in tensors.items():
        writer.add(f"vision_model.{name}", tensor)
    writer.finish()
    shape = {key: value for key, value in vision.items() if key not in OF_THE_FILE}
    own = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    write_json(folder / "config.json", {**shape, **own}, indent=2)
    write_json(folder / "preprocessor_config.json", processor, indent=2)
