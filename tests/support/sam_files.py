"""Small SAM image encoders on disk, under the names that Segment Anything and LVM-Med give their tensors."""

from __future__ import annotations

import re
from pathlib import Path

import torch

# transformers' name -> SAM's: the other direction of `umed_plugin.checkpoints.sam_encoder`, written by hand.
_NAMES = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.layer_norm(\d)\.", r"blocks.\1.norm\2."),
    (r"^layers\.", "blocks."),
    (r"^neck\.conv1\.", "neck.0."),
    (r"^neck\.layer_norm1\.", "neck.1."),
    (r"^neck\.conv2\.", "neck.2."),
    (r"^neck\.layer_norm2\.", "neck.3."),
)


def sam_encoder(seed: int = 0, image_size: int = 64, window: int = 3):
    """transformers' encoder with random weights: 8 px patches, 2 blocks of 16, the second with global attention, 12 channels."""
    from transformers.models.sam.configuration_sam import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    config = SamVisionConfig(
        hidden_size=16,
        mlp_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=8,
        window_size=window,
        global_attn_indexes=[1],
        output_channels=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = SamVisionEncoder(config)
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


def write_sam_file(file: Path, prefix: str, encoder=None, **more: torch.Tensor) -> Path:
    """The encoder's tensors under SAM's names behind a prefix, by `torch.save`; ``more`` are further tensors of the file."""
    tensors = {}
    for name, tensor in (encoder or sam_encoder()).state_dict().items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        tensors[prefix + name] = tensor
    torch.save({**tensors, **more}, file)
    return file
