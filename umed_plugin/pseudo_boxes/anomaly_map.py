"""The anomaly map: where the patches of a frozen vision tower look unusual.

As in MediCLIP (arXiv 2405.11315), patch tokens F_l of three depths of the tower go through a 1x1 map A_l each, and are compared
with two directions, normal and abnormal:

    M = softmax over both ( upsample( mean over l of  A_l(F_l) / |A_l(F_l)| . T ) )

Departures: MediCLIP's T comes from a text encoder, which a LLaVA checkpoint does not have; here T is two learned unit vectors.
The upsampling keeps the centres of patches where they are (``align_corners=False``), so that a box is not moved at the border.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

NORMAL, ABNORMAL = 0, 1
_GAMMA, _EPSILON, _SMOOTH = 2.0, 1e-5, 1.0


class AnomalyMap(nn.Module):
    """What is trained: A_l and T.

    Args:
        width: D, of the tower's patch tokens.
        depths: number of depths, L.
    """

    def __init__(self, width: int, depths: int = 3) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(nn.Linear(width, width) for _ in range(depths))
        self.directions = nn.Parameter(torch.randn(2, width))

    def forward(self, features: Sequence[Tensor], side: int) -> Tensor:
        """The map of both directions, ``[B, 2, side, side]``; they sum to 1 at each place.

        Args:
            features: of each depth ``[B, P, D]``, P = g * g patches in rows.
            side: of the map, in pixels.
        """
        towards = functional.normalize(self.directions, dim=-1)
        per_depth = [
            functional.normalize(adapter(patches), dim=-1) @ towards.T
            for adapter, patches in zip(self.adapters, features)
        ]
        similarity = torch.stack(per_depth).mean(0)
        grid = round(similarity.shape[1] ** 0.5)
        maps = similarity.transpose(1, 2).reshape(-1, 2, grid, grid)
        maps = functional.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
        return maps.softmax(dim=1)


def map_loss(maps: Tensor, changed: Tensor) -> Tensor:
    """Focal loss (gamma 2) of both directions plus Dice loss of the abnormal one; 0 for a perfect map.

    Args:
        maps: from `AnomalyMap`, ``[B, 2, S, S]``.
        changed: float ``[B, S, S]``, 1 where an anomaly is.
    """
    right = torch.where(changed > 0.5, maps[:, ABNORMAL], maps[:, NORMAL])
    focal = (-((1 - right) ** _GAMMA) * (right + _EPSILON).log()).mean()
    abnormal = maps[:, ABNORMAL].flatten(1)
    target = changed.flatten(1)
    dice = (2 * (abnormal * target).sum(1) + _SMOOTH) / (abnormal.sum(1) + target.sum(1) + _SMOOTH)
    return focal + (1 - dice).mean()
