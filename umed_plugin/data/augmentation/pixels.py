"""The pixels of an augmented study, by MONAI's dictionary transforms, in the square that the model sees.

Rotation, zoom and shift are one resampling, so that an image is interpolated once. A margin gets the mean colour of the image
processor, which is what LLaVA pads with. Grey levels change where the image is; the padding keeps its colour.

MONAI's transforms move boxes along for mirroring and zoom, not for rotation. So `SquareMove.boxes` moves all of them, and a test
holds it to MONAI's ``FlipBoxd``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import numpy as np
import torch

from umed_plugin.data.augmentation.study import GreyLevels
from umed_plugin.grounding.boxes import Box
from umed_plugin.grounding.square_move import SquareMove


def augment_pixels(
    image: torch.Tensor, content: Optional[Box], move: SquareMove, grey: GreyLevels, processor: Any
) -> torch.Tensor:
    """The image of an augmented study.

    Args:
        image: float32 [3, S, S], as the image processor gives it.
        content: where the image lies in the square, in 0-1; the rest is padding. None: everywhere.
        move: of the square.
        grey: change of its grey levels.
        processor: that gave the image; its mean and standard deviation are used.

    Returns:
        float32 [3, S, S].
    """
    mean, std = _scale(processor)
    with _one_thread():
        moved, mask = _moved(image, _mask(content, image.shape[-1]), move)
        if grey == GreyLevels():
            return moved
        return torch.where(mask > 0, (_regreyed(moved * std + mean, grey) - mean) / std, moved)


def moved_picture(picture: np.ndarray, move: SquareMove) -> np.ndarray:
    """A square picture, uint8 [S, S, 3], after the movement; margins are black."""
    values = torch.from_numpy(np.array(picture)).movedim(-1, 0).float()
    moved, _ = _moved(values, _mask(None, values.shape[-1]), move)
    return moved.clamp(0, 255).round().byte().movedim(0, -1).contiguous().numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products of matrices may round differently on another number of threads; data loader workers have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _scale(processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """mean, std [3, 1, 1] with ``image * std + mean`` in 0-1."""
    normalises = getattr(processor, "do_normalize", True)
    mean = torch.tensor(processor.image_mean if normalises else [0.0] * 3, dtype=torch.float32)
    std = torch.tensor(processor.image_std if normalises else [1.0] * 3, dtype=torch.float32)
    highest = 1.0 if getattr(processor, "do_rescale", True) else 255.0
    return mean[:, None, None] / highest, std[:, None, None] / highest


def _mask(content: Optional[Box], size: int) -> torch.Tensor:
    """float32 [1, S, S]: 1 in the pixels of which the image covers the middle."""
    x1, y1, x2, y2 = content or (0.0, 0.0, 1.0, 1.0)
    middle = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    rows, columns = (middle > y1) & (middle < y2), (middle > x1) & (middle < x2)
    return (rows[:, None] & columns[None, :]).float()[None]


def _moved(image: torch.Tensor, mask: torch.Tensor, move: SquareMove) -> tuple[torch.Tensor, torch.Tensor]:
    from monai.transforms import Affined, Compose, Flipd

    keys, transforms = ("image", "mask"), []
    axes = [axis for axis, taken in ((0, move.up_down), (1, move.left_right)) if taken]
    if axes:
        transforms.append(Flipd(keys, spatial_axis=axes))
    if move.resamples:
        matrix = move.source_matrix(image.shape[-1])
        transforms.append(Affined(keys, affine=matrix, mode=("bilinear", "nearest"), padding_mode="zeros"))
    if not transforms:
        return image, mask
    found = Compose(transforms)({"image": image, "mask": mask})
    return _plain(found["image"]), _plain(found["mask"])


def _regreyed(values: torch.Tensor, grey: GreyLevels) -> torch.Tensor:
    """Grey levels in 0-1 after the change. All channels get the same noise, so that a grey image stays grey."""
    from monai.transforms import AdjustContrastd, Compose, RandGaussianNoised, ScaleIntensityd

    changes = Compose(
        [
            AdjustContrastd("image", gamma=grey.gamma),
            ScaleIntensityd("image", minv=None, maxv=None, factor=grey.brightness),
            RandGaussianNoised("noise", prob=1.0, mean=0.0, std=grey.noise),
        ]
    )
    changes.set_random_state(seed=grey.seed)  # of all, and only now: making a Compose seeds its transforms at random
    found = changes({"image": values.clamp(0, 1), "noise": torch.zeros_like(values[:1])})
    return (_plain(found["image"]) + _plain(found["noise"])).clamp(0, 1)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without MONAI's metadata."""
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor
