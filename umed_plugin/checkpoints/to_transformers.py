"""From LLaVA's layout to transformers' ``LlavaForConditionalGeneration`` with its processor, for vLLM, TRL and others.

Tensors are renamed one by one and keep their values and dtypes, so the logits stay the same. Transformers' form also contains the
tower's weights, the tokenizer with ``<image>``, the chat template and the image processor. All other keys of LLaVA's
``config.json`` are kept under ``llava_checkpoint`` for the way back (:mod:`umed_plugin.checkpoints.to_llava`).

Differences between the two forms:
- A linear projector becomes transformers' two layers without an activation between them; the second is the identity.
- ``<image>`` is a row of transformers' embeddings. Its output row is the mean of all rows, so its probability is at most that of
  an average token, and ``generate`` suppresses it.
- Padding to a square (``image_aspect_ratio: pad``) is done by transformers' ``LlavaImageProcessor``. Versions from 2024 and
  before do not have it, and crop the center of the image instead.

How to run: ``umed convert CKPT --out DIR``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.folder import (
    EMBEDDING,
    HEAD,
    STOCK_TEMPLATES,
    TOWER,
    is_buffer,
    is_lora,
    read_config,
    weight_files,
)
from umed_plugin.checkpoints.generation import with_ends
from umed_plugin.checkpoints.hf_processor import read_json, write_image_processor, write_tokenizer
from umed_plugin.checkpoints.loading import tower_tensors
from umed_plugin.checkpoints.missing_tensors import refuse_missing, refuse_missing_of_tower
from umed_plugin.checkpoints.rope import old_rope
from umed_plugin.checkpoints.tower_weights import bare_tower_name
from umed_plugin.checkpoints.weight_shards import ShardWriter, of_all_bytes, stream
from umed_plugin.checkpoints.writing import writing_checkpoint
from umed_plugin.errors import UmedError
from umed_plugin.files import write_json

ORIGINAL = "llava_checkpoint"
PROJECTORS = {"mlp2x_gelu": "gelu", "linear": "linear"}  # LLaVA's type -> activation between transformers' two layers
# (prefix of LLaVA's name, prefix of transformers' name). transformers 5 uses other names in memory, but reads and writes these.
NAMES = (
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
# Keys of LLaVA's config.json that do not belong to the language model.
LLAVA_KEYS = re.compile(
    "mm_.*|tune_mm.*|freeze_mm.*|unfreeze_mm.*|use_mm_proj|image_aspect_ratio|image_crop_resolution|image_grid_pinpoints|"
    "image_split_resolution|tokenizer_.*|vision_tower|pretrain_mm_mlp_adapter|umed_label_share"
)
OF_THE_FILE = (
    "architectures",
    "auto_map",
    "model_type",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "_name_or_path",
)


def to_transformers(
    checkpoint: Path | str,
    out: Path | str,
    *,
    template: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a LLaVA checkpoint as ``LlavaForConditionalGeneration`` with its processor; return the folder.

    Args:
        checkpoint: in LLaVA's layout; its tower inside, in a folder, or on the hub.
        out: must not exist, unless ``overwrite``.
        template: conversation template for the chat template; by default the one that stock LLaVA uses.
        overwrite: replace ``out``.
        progress: called with (bytes done, bytes in all).

    Raises:
        UmedError: transformers' class cannot express the checkpoint, a file of it is missing, or ``out`` exists.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint
        >>> checkpoint = make_checkpoint(Path(tempfile.mkdtemp()) / "llava-mistral-tiny")
        >>> folder = to_transformers(checkpoint, checkpoint.with_name("tiny-hf"), template="umed_mistral")
        >>> read_json(folder / "config.json")["architectures"]
        ['LlavaForConditionalGeneration']
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if is_lora(checkpoint):
        raise UmedError(
            f"{checkpoint}: is a LoRA folder. Merge it first: umed merge {shlex.quote(str(checkpoint))} --base CKPT --out DIR"
        )
    config = read_config(checkpoint)
    _check_expressible(checkpoint, config)
    refuse_missing(checkpoint, config)
    tower, inside = str(_tower_of(config)), tower_tensors(checkpoint)
    vision = _vision_config(tower, checkpoint)
    if not inside:
        refuse_missing_of_tower(tower, whole=True)  # transformers' class is loaded with all of it
    with writing_checkpoint(out, overwrite=overwrite, inputs=(checkpoint,)) as folder:
        name = template or STOCK_TEMPLATES[config["model_type"]]
        vocabulary = write_tokenizer(checkpoint, config, folder, name)
        write_image_processor(tower, config, folder, vision["patch_size"])
        new = _transformers_config(checkpoint, config, vision, vocabulary.image, vocabulary.pad)
        write_json(folder / "config.json", new, indent=2)
        generation = with_ends(read_json(checkpoint / "generation_config.json"), config)
        generation.update(pad_token_id=vocabulary.pad, suppress_tokens=[vocabulary.image])
        write_json(folder / "generation_config.json", generation, indent=2)
        # Weights last: the tokenizer decides how many rows the embeddings have, and is checked against LLaVA's before that.
        writer = ShardWriter(folder, of_all_bytes(weight_files(checkpoint), progress))
        _write_tower(writer, inside or _tensors_of_tower(tower), vision, checkpoint)
        for llava_name, tensor in _language_tensors(checkpoint):
            if llava_name in (EMBEDDING, HEAD):
                tensor = _with_image_row(tensor, vocabulary.image)
            if llava_name != HEAD or not config.get("tie_word_embeddings"):
                writer.add(_transformers_name(llava_name, checkpoint), tensor)
            if llava_name == "model.mm_projector.weight":
                _write_identity(writer, like=tensor)
        writer.finish()
    return out


def _check_expressible(checkpoint: Path, config: dict[str, Any]) -> None:
    """Refuse what transformers' class cannot express, all faults at once."""
    allowed = {
        "mm_projector_type": ("linear", tuple(PROJECTORS)),
        "mm_patch_merge_type": ("flat", ("flat",)),
        "image_aspect_ratio": ("square", ("pad", "square", None)),
        "mm_vision_select_feature": ("patch", ("patch", "cls_patch")),
    }
    faults = [
        f"{key} is {config.get(key, default)!r}; allowed: {', '.join(map(str, values))}"
        for key, (default, values) in allowed.items()
        if config.get(key, default) not in values
    ]
    if _tower_of(config) is None:
        faults.append("mm_vision_tower is missing, so this model cannot see images")
    if faults:
        raise UmedError(
            f"{checkpoint / 'config.json'}: transformers' LlavaForConditionalGeneration cannot express this model: "
            f"{'; '.join(faults)}. Serve it with LLaVA itself."
        )


def _tower_of(config: dict[str, Any]) -> str | None:
    return config.get("mm_vision_tower", config.get("vision_tower"))


def _vision_config(tower: str, checkpoint: Path) -> dict[str, Any]:
    """Configuration of a CLIP tower (a folder, or a name on the Hub) without the keys of its file."""
    from transformers import CLIPVisionConfig

    try:
        values = CLIPVisionConfig.from_pretrained(tower).to_diff_dict()
    except OSError as error:
        raise UmedError(
            f"{checkpoint / 'config.json'}: mm_vision_tower is {tower!r}, which is neither a folder with a CLIP model nor "
            "available from the Hub. If the tower was moved, set mm_vision_tower to its new absolute path."
        ) from error
    return {
        **{key: value for key, value in values.items() if key not in OF_THE_FILE},
        "model_type": "clip_vision_model",
    }


def _transformers_config(
    checkpoint: Path, config: dict[str, Any], vision: dict[str, Any], image_id: int, pad_id: int
) -> dict[str, Any]:
    language = {k: v for k, v in config.items() if not LLAVA_KEYS.fullmatch(k) and k not in OF_THE_FILE}
    kind = "mistral" if config["model_type"] == "llava_mistral" else "llama"
    whole = config.get("mm_vision_select_feature", "patch") == "cls_patch"
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    original = {key: value for key, value in config.items() if LLAVA_KEYS.fullmatch(key) or key == "model_type"}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {**old_rope(language), "model_type": kind, "vocab_size": image_id + 1},
        "vision_config": vision,
        "image_token_index": image_id,
        "image_seq_length": patches + whole,
        "pad_token_id": pad_id,
        "projector_hidden_act": PROJECTORS[config.get("mm_projector_type", "linear")],
        "vision_feature_layer": config["mm_vision_select_layer"],
        "vision_feature_select_strategy": "full" if whole else "default",
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "torch_dtype": config.get("torch_dtype", config.get("dtype", "float16")),
        ORIGINAL: {"config": original, "tokenizer_config": read_json(checkpoint / "tokenizer_config.json")},
    }


def _tensors_of_tower(tower: str) -> dict[str, Any]:
    """The vision part of a CLIP checkpoint, which may have a text part too."""
    tensors = dict(pair for file in weight_files(tower) for pair in stream(file))
    return {
        name: tensor for name, tensor in tensors.items() if re.match("vision_model|embeddings|encoder|p\\w+_lay", name)
    }


def _write_tower(writer: ShardWriter, tensors: dict[str, Any], vision: dict[str, Any], checkpoint: Path) -> None:
    """Check that the tower's weights fit its configuration, and write them."""
    tensors = {bare_tower_name(name): tensor for name, tensor in tensors.items() if not is_buffer(name)}
    positions = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    expected = (positions, vision["hidden_size"])
    embedding = tensors.get("embeddings.position_embedding.weight")
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")}
    shape = None if embedding is None else tuple(embedding.shape)
    if shape != expected or len(layers) != vision["num_hidden_layers"]:
        raise UmedError(
            f"{checkpoint}: its vision-tower weights do not fit the tower that config.json names as mm_vision_tower: position "
            f"embeddings {shape} and {len(layers)} layers. Needed: {expected} and {vision['num_hidden_layers']}. Set "
            "mm_vision_tower to the tower with which the checkpoint was trained."
        )
    for name, tensor in tensors.items():
        writer.add(f"vision_tower.vision_model.{name}", tensor)


def _language_tensors(checkpoint: Path) -> Iterator[tuple[str, Any]]:
    """LLaVA's tensors, except the tower's and the buffers that old transformers saved."""
    for file in weight_files(checkpoint):
        for name, tensor in stream(file):
            if not name.startswith(TOWER) and not is_buffer(name):
                yield name, tensor


def _transformers_name(name: str, checkpoint: Path) -> str:
    if name in ("model.mm_projector.weight", "model.mm_projector.bias"):  # a linear projector
        return name.replace("model.mm_projector", "multi_modal_projector.linear_1")
    for ours, theirs in NAMES:
        if name.startswith(ours) and (ours != "model." or re.match(r"model\.(embed_tokens|layers|norm)\.", name)):
            return theirs + name[len(ours) :]
    raise UmedError(
        f"{checkpoint}: contains {name!r}, which transformers' LlavaForConditionalGeneration does not have. Serve it with LLaVA."
    )


def _with_image_row(tensor: Any, image_id: int) -> Any:
    """Rows 0..image_id of embeddings [V, H]; missing rows are the mean of LLaVA's rows.

    By Jensen's inequality a token whose output row is the mean is never likelier than the average token. Rows after the
    tokenizer's last token are dropped, as LLaVA's loader does.
    """
    import torch

    rows = tensor[:image_id]
    mean = rows.float().mean(dim=0, keepdim=True).to(tensor.dtype)
    return torch.cat([rows, mean.expand(image_id + 1 - len(rows), -1)])


def _write_identity(writer: ShardWriter, like: Any) -> None:
    """Write the identity as second layer [H, H] after a linear projector [H, D]."""
    import torch

    size = len(like)
    writer.add("multi_modal_projector.linear_2.weight", torch.eye(size, dtype=like.dtype))
    writer.add("multi_modal_projector.linear_2.bias", torch.zeros(size, dtype=like.dtype))
