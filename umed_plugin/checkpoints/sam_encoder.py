"""Weights of a SAM ViT image encoder: what a file holds, checked before anything is loaded, and transformers' module of it.

Read are Segment Anything's own file (``image_encoder.blocks.0...``, with its prompt encoder and mask decoder, which are left
out), LVM-Med's ``lvmmed_vit.pth`` (arXiv 2306.11925: the encoder alone, ``model.blocks.0...``), and transformers' names of the
same. All sizes follow from the tensors' shapes, so a smaller encoder is read as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.pickles import printable
from umed_plugin.checkpoints.stored import StoredTensor
from umed_plugin.checkpoints.weight_shards import stored
from umed_plugin.errors import UmedError

SAM, LVM_MED = "image_encoder.", "model."
_FIRST = re.compile(r"(.*?)patch_embed\.proj(?:ection)?\.weight")
# SAM's name -> that of transformers.
_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^blocks\.", "layers."),
    (r"^(layers\.\d+)\.norm(\d)\.", r"\1.layer_norm\2."),
    (r"^neck\.0\.", "neck.conv1."),
    (r"^neck\.1\.", "neck.layer_norm1."),
    (r"^neck\.2\.", "neck.conv2."),
    (r"^neck\.3\.", "neck.layer_norm2."),
)
# Mean and standard deviation of the pixels, 0-1, on which SAM and LVM-Med were trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class SamFile:
    """The encoder in a file.

    Attributes:
        path: the file.
        tensors: by transformers' names; not read yet.
        settings: of transformers' ``SamVisionConfig``.
        kind: whose file it is, in words.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    settings: dict[str, Any]
    kind: str


def read_sam_file(path: Path | str) -> SamFile:
    """Find the encoder in a file and derive its sizes. No value is read, and no code in the file runs.

    Raises:
        UmedError: there is no such file, it holds code, or another network.
    """
    path = Path(path)
    if not path.is_file():
        raise UmedError(f"{path}: there is no such file. Needed: the weights of a SAM ViT image encoder.")
    everything = stored(path)
    found = [match for match in map(_FIRST.fullmatch, everything) if match]
    if not found:
        raise UmedError(f"{path}: {_other_network(everything)} Needed: the weights of a SAM ViT image encoder.")
    prefix = min((match[1] for match in found), key=len)
    tensors = {_renamed(name[len(prefix) :]): tensor for name, tensor in everything.items() if name.startswith(prefix)}
    tensors = {
        name: t for name, t in tensors.items() if name.startswith(("patch_embed.", "pos_embed", "layers.", "neck."))
    }
    kinds = {SAM: "Segment Anything's own file", LVM_MED: "LVM-Med's"}
    return SamFile(path, tensors, _settings(path, tensors), kinds.get(prefix, "a SAM encoder"))


def load_sam_encoder(file: SamFile, device: Any = "cpu") -> Any:
    """transformers' encoder with the file's weights, float32, frozen: pixels [B, 3, S, S] -> [B, C, S / patch, S / patch].

    Raises:
        UmedError: a tensor is missing, unknown, or has another shape.
    """
    from transformers.models.sam.configuration_sam import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    encoder = SamVisionEncoder(SamVisionConfig(**file.settings))
    own = encoder.state_dict()
    missing, unknown = sorted(set(own) - set(file.tensors)), sorted(set(file.tensors) - set(own))
    shapes = [name for name in own if name in file.tensors and tuple(own[name].shape) != file.tensors[name].shape]
    if missing or unknown or shapes:
        raise UmedError(
            f"{file.path}: does not fit transformers' SAM encoder: {len(missing)} tensors are missing, {len(unknown)} are "
            f"unknown, {len(shapes)} have another shape ({', '.join([*shapes, *missing, *unknown][:3])})."
        )
    encoder.load_state_dict({name: tensor.read().float() for name, tensor in file.tensors.items()})
    return encoder.to(device).eval().requires_grad_(False)


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _other_network(tensors: dict[str, StoredTensor]) -> str:
    """What a file holds instead, as a sentence."""
    if not tensors:
        return "is not a dictionary of tensors."
    first = next(iter(tensors))
    if any(re.search(r"(^|\.)layer\d\.\d+\.conv\d\.weight$", name) for name in tensors):
        return (
            f"holds a ResNet ({printable(first)}), whose features have no patches to compare. LVM-Med's other file, "
            "lvmmed_vit.pth, is the ViT."
        )
    return f"has no patch_embed.proj.weight, but {printable(first)}."


def _settings(path: Path, tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """The encoder's sizes.

    Raises:
        UmedError: a tensor that says them is missing.
    """
    try:
        width, channels, patch, _ = tensors["patch_embed.projection.weight"].shape
        grid = tensors["pos_embed"].shape[1]
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
        # A table of relative positions has 2 n - 1 rows: n is the window, or the whole grid where attention is global.
        tables = [tensors[f"layers.{layer}.attn.rel_pos_h"].shape for layer in range(depth)]
        windows = {(rows + 1) // 2 for rows, _ in tables if rows != 2 * grid - 1}
        return {
            "hidden_size": width,
            "num_channels": channels,
            "patch_size": patch,
            "image_size": grid * patch,
            "num_hidden_layers": depth,
            "num_attention_heads": width // tables[0][1],
            "mlp_dim": tensors["layers.0.mlp.lin1.weight"].shape[0],
            "window_size": windows.pop() if windows else 14,
            "global_attn_indexes": [layer for layer, (rows, _) in enumerate(tables) if rows == 2 * grid - 1],
            "output_channels": tensors["neck.conv1.weight"].shape[0],
        }
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UmedError(
            f"{path}: lacks a part of a SAM ViT image encoder ({error}). Copy or download it again."
        ) from error
