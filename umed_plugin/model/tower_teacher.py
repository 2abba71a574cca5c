"""A medical image encoder as teacher of LLaVA's vision tower: LVM-Med's counterpart (arXiv 2306.11925).

LVM-Med is a SAM ViT-B image encoder that was trained on medical images. A second tower in the model would be one that stock LLaVA
cannot load. So the teacher stays outside, and the loss draws the tower's patch features to the teacher's:

    loss = mean over patches of 1 - cos(A f_p + a, g_p)

f_p are the tower's selected features [B, P, D], g_p the teacher's [B, C, n, n] averaged onto the tower's grid of side x side = P
patches, and (A, a) a linear map that is learnt beside the model and thrown away at the end.

Geometry: the teacher sees the very pixels that the tower sees, the padded or squeezed square after augmentation, resized to its
own size. So both grids divide the same square, and patch p is the same place in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from umed_plugin.checkpoints.sam_encoder import MEAN, STD


class TowerTeacher:
    """Patch features of a frozen SAM encoder.

    Args:
        encoder: from `umed_plugin.checkpoints.sam_encoder.load_sam_encoder`.
        mean, std: of the tower's image processor, by which its pixels were normalised.
    """

    def __init__(self, encoder: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        self.encoder = encoder
        self.size, self.channels = encoder.config.image_size, encoder.config.output_channels
        # x -> (x * std + mean - MEAN) / STD, from the tower's normalisation to the teacher's.
        own, theirs = torch.tensor([mean, std]), torch.tensor([MEAN, STD])
        self._scale, self._shift = own[1] / theirs[1], (own[0] - theirs[0]) / theirs[1]

    @torch.no_grad()
    def features(self, pixels: Tensor, side: int) -> Tensor:
        """[B, side * side, C] features of the squares [B, 3, S, S], row-major, as the tower's patches are."""
        scale, shift = (t.to(pixels.device)[:, None, None] for t in (self._scale, self._shift))
        resized = functional.interpolate(
            pixels.float() * scale + shift,
            size=(self.size, self.size),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        grid = self.encoder(resized).last_hidden_state
        return functional.adaptive_avg_pool2d(grid.float(), side).flatten(2).transpose(1, 2)


def new_map(width: int, channels: int, seed: int) -> nn.Linear:
    """The linear map from the tower's width to the teacher's; its start draws nothing from the global random state."""
    made: nn.Linear = nn.utils.skip_init(nn.Linear, width, channels)
    shuffle = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.weight.copy_(torch.randn(channels, width, generator=shuffle) / width**0.5)
        made.bias.zero_()
    return made


def patch_cosine(features: Tensor, targets: Tensor, onto: nn.Linear) -> Tensor:
    """[B, P] cosine of the mapped features [B, P, D] and the teacher's [B, P, C], float32."""
    mapped = functional.linear(features.float(), onto.weight, onto.bias)
    return functional.cosine_similarity(mapped, targets.float(), dim=-1)


@contextmanager
def tower_features(tower: nn.Module) -> Iterator[list[Tensor]]:
    """Keep what the tower returns in each pass, [B, P, D], with its graph."""
    found: list[Tensor] = []
    handle = tower.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()
