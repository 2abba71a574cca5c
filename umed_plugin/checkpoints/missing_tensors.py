"""Whether weight files hold every tensor of their model: transformers gives random values to those that they lack.

Names are compared, which are in the files' headers. So no weight is read, and the model is not built.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.folder import (
    EMBEDDING,
    FAMILIES,
    HEAD,
    TOWER,
    UNFREEZE,
    read_object,
    weight_files,
    weight_map,
)
from umed_plugin.checkpoints.tower_config import CLIP_SIZES, vision_part
from umed_plugin.checkpoints.tower_weights import bare_tower_name
from umed_plugin.checkpoints.weight_shards import stored
from umed_plugin.errors import UmedError

_PROJECTOR = "model.mm_projector."
LAYER, _PROJECTOR_LAYER = re.compile(r"model\.layers\.(\d+)\."), re.compile(r"model\.mm_projector\.(\d+)\.")
_MOST_MISSING = 1000  # layers of which every tensor is counted in a message
# Of a CLIP tower: each part of a layer has a weight and a bias, and so have the two normalisations around the layers.
_TOWER_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_TOWER_LAYER_PARTS = (
    *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
)
_TOWER_EMBEDDINGS = [
    f"embeddings.{part}" for part in ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
]
# LLaVA takes what a layer puts out. This normalisation comes after all of them, and changes only what LLaVA leaves.
_TOWER_UNUSED = ("post_layernorm.weight", "post_layernorm.bias")
# Keys of config.json that decide shapes and not names.
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def refuse_missing(checkpoint: Path | str, config: dict[str, Any], *, projector: bool = True) -> None:
    """Refuse a checkpoint whose weight files lack tensors of its model.

    Args:
        checkpoint: a full one, or a plain language model.
        config: its ``config.json``.
        projector: whether a LLaVA checkpoint needs the projector's tensors.

    Raises:
        UmedError: it lacks some, or a weight file is missing or cannot be read.
    """
    names = names_in(checkpoint)
    missing = missing_language(names, config)
    if projector and config.get("model_type") in FAMILIES:
        missing += missing_projector(names, config)
    refuse(missing, checkpoint)
    if config.get(UNFREEZE) and not any(name.startswith(TOWER) for name in names):
        raise UmedError(
            f"{checkpoint}/config.json: sets {UNFREEZE}, but its weight files hold no vision tower. Remove the setting to use "
            "the tower that mm_vision_tower names, or use a checkpoint that contains the tower."
        )


def refuse_missing_of_tower(tower: Path | str, *, whole: bool = False) -> None:
    """Refuse a vision tower's folder whose weight files lack tensors of it.

    Args:
        tower: the folder, or a name on the Hub.
        whole: ask also for what LLaVA does not use.

    Raises:
        UmedError: they lack some, or cannot be read.
    """
    if os.path.isdir(tower):  # files from the Hub are whole, or their download fails
        refuse(lacking_in_tower(Path(tower), whole=whole), tower)


def lacking_in_tower(folder: Path, inside: Collection[str] = (), *, whole: bool = False) -> list[str]:
    """Tensors that the weight files of a vision tower's folder lack; none if a whole tower replaces its weights.

    Args:
        folder: of the tower.
        inside: names of a checkpoint's own tower, by `tower_names`, if its weights replace the folder's.
        whole: name also what LLaVA does not use.

    Raises:
        UmedError: it has no config.json or no weight files, or one of them cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise UmedError(f"{folder}: has no config.json. Copy or download the vision tower's folder again.")
    shape = vision_part(read_object(folder / "config.json"))
    lacking = missing_of_tower(names_in(folder), shape, whole=whole)
    return lacking if lacking and (not inside or missing_of_tower(inside, shape)) else []


def tower_names(names: Collection[str]) -> list[str]:
    """Those of a checkpoint's names that belong to a tower inside it, as LLaVA's tower has them.

    Example:
        >>> tower_names(["lm_head.weight", "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"])
        ['vision_tower.vision_model.pre_layrnorm.bias']
    """
    return [name[len(TOWER) :] for name in names if name.startswith(TOWER)]


def names_in(folder: Path | str, cache_dir: str | None = None) -> set[str]:
    """Names of the tensors in weight files that transformers reads: of shards, those that their index names too.

    Args:
        folder: of a checkpoint or a tower, or its name on the Hub.
        cache_dir: where files from the Hub are cached.
    """
    paths = weight_files(folder, cache_dir=cache_dir)
    names = {name for path in paths for name in stored(path)}
    whole = "model.safetensors" if paths[0].suffix == ".safetensors" else "pytorch_model.bin"
    return names if paths[0].name == whole else names & {*weight_map(paths[0].parent / f"{whole}.index.json")}


def refuse(missing: list[str], folder: Path | str) -> None:
    """Raise `UmedError` if any tensor of a folder's model is missing."""
    if missing:
        raise UmedError(
            f"{folder}: its weight files, or their index, lack {missing[0]!r} ({len(missing)} such in all). Its model would get "
            "random values for them. Copy or download the folder again; umed doctor can rewrite an index."
        )


def missing_language(names: Collection[str], config: dict[str, Any]) -> list[str]:
    """Tensors of the language model, sorted, that are not among a checkpoint's names.

    Example:
        >>> missing_language(["model.embed_tokens.weight", "lm_head.weight"], {"num_hidden_layers": 0})
        ['model.norm.weight']
    """
    layers = config.get("num_hidden_layers", 32)  # Llama's and Mistral's default
    if not isinstance(layers, int):
        return []  # without a number of layers no model can be built
    looked_for = layers_to_look_for(layers, names, LAYER)
    if "quantization_config" in config:  # quantized weights have other names
        return [f"model.layers.{looked_for}"] if looked_for < layers else []
    shapes = language_shapes(
        {**dict.fromkeys(_SIZES, 1), "num_key_value_heads": 1, "head_dim": 1, **config}, looked_for
    )
    missing = {*shapes} - {*names}
    if config.get("tie_word_embeddings") and HEAD in names:
        missing.discard(EMBEDDING)  # one tensor under two names
    return sorted(missing)


def layers_to_look_for(layers: int, names: Collection[str], pattern: re.Pattern[str]) -> int:
    """``layers`` of a config.json, or fewer where so many more than the files hold are missing that the rest need no names.

    Args:
        layers: any number that somebody wrote.
        names: of the tensors.
        pattern: begins a layer's names; its first group is the layer's number.

    Example:
        >>> layers_to_look_for(10**9, ["model.layers.0.input_layernorm.weight"], LAYER)
        1001
    """
    return min(layers, len({match[1] for match in map(pattern.match, names) if match}) + _MOST_MISSING)


def language_shapes(config: dict[str, Any], layers: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the language model's tensors according to config.json.

    Args:
        config: of config.json.
        layers: number of decoder layers.
    """
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or max(width // heads, 1)
    keys = (config.get("num_key_value_heads") or heads) * head
    layer = {
        "self_attn.q_proj.weight": (heads * head, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, heads * head),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    shapes = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    shapes.update({EMBEDDING: (vocabulary, width), "model.norm.weight": (width,)})
    if not config.get("tie_word_embeddings"):
        shapes[HEAD] = (vocabulary, width)
    return shapes


def missing_projector(names: Collection[str], config: dict[str, Any]) -> list[str]:
    """Tensors of LLaVA's projector that are not among a checkpoint's names.

    Example:
        >>> missing_projector(["model.mm_projector.0.weight", "model.mm_projector.0.bias"], {"mm_projector_type": "mlp1x_gelu"})
        []
        >>> missing_projector(["model.mm_projector.weight"], {"mm_projector_type": "linear"})
        ['model.mm_projector.bias']
    """
    kind = str(config.get("mm_projector_type", "linear"))
    layers = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    count = (
        layers_to_look_for(int(layers[1]) if len(layers[1]) < 10 else 10**9, names, _PROJECTOR_LAYER) if layers else 0
    )
    places = [""] if kind == "linear" else [f"{2 * i}." for i in range(count)]
    needed = [f"{_PROJECTOR}{place}{part}" for place in places for part in ("weight", "bias")]
    if "unpad" in str(config.get("mm_patch_merge_type", "flat")):
        needed.append("model.image_newline")
    return [name for name in needed if name not in names]


def missing_of_tower(names: Collection[str], config: Any, *, whole: bool = True) -> list[str]:
    """Tensors of a CLIP tower, without a prefix, that are not among the names.

    Args:
        names: with any of the prefixes that `bare_tower_name` takes away.
        config: of the tower, from a ``config.json``.
        whole: name also what LLaVA does not use.

    Example:
        >>> missing_of_tower(["vision_model.embeddings.class_embedding"], {"num_hidden_layers": 0})[0]
        'embeddings.patch_embedding.weight'
    """
    usual = CLIP_SIZES["num_hidden_layers"]
    layers = config.get("num_hidden_layers", usual) if isinstance(config, Mapping) else usual
    if not isinstance(layers, int):
        return []  # without a number of layers no tower can be built
    held = {bare_tower_name(name) for name in names}
    parts = [
        f"encoder.layers.{layer}.{part}"
        for layer in range(layers_to_look_for(layers, held, _TOWER_LAYER))
        for part in _TOWER_LAYER_PARTS
    ]
    weights = [f"{part}.{kind}" for part in ("pre_layrnorm", "post_layernorm", *parts) for kind in ("weight", "bias")]
    return sorted({*_TOWER_EMBEDDINGS, *weights} - held - {*(() if whole else _TOWER_UNUSED)})
