"""The frozen CLIP vision tower of a LLaVA checkpoint, or one by itself, and its patch tokens at three depths."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from umed_plugin.checkpoints.adapter_folder import find_base
from umed_plugin.checkpoints.folder import (
    FAMILIES,
    is_buffer,
    is_lora,
    left_out_own_tower,
    read_config,
    read_object,
    weight_files,
)
from umed_plugin.checkpoints.loading import tower_misfit, tower_tensors
from umed_plugin.checkpoints.missing_tensors import refuse_missing_of_tower
from umed_plugin.checkpoints.precision import answering_device
from umed_plugin.checkpoints.safe_loading import behind_the_door, check_plain
from umed_plugin.data.images.drawing import square_of
from umed_plugin.errors import UmedError
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.pseudo_boxes.synthesis import Picture
from umed_plugin.terminal.progress import library_bars

_CLIP = ("clip", "clip_vision_model")
_PREFIX = "vision_tower."  # of a tower's tensors inside a checkpoint
_SHARES = (0.5, 0.75, 1.0)  # of the tower's depth


class PatchTower:
    """A CLIP vision tower in evaluation mode, in float32.

    Args:
        path: folder of a LLaVA checkpoint, full or LoRA, or of a CLIP tower.
        device: ``cuda`` or ``cpu``; None: ``cuda`` if there is one.

    Attributes:
        side: of the square that it sees, in pixels.
        width: of its patch tokens.
        depths: numbers of the blocks after which tokens are taken, from 1.
        digest: of its weights and normalisation.

    Raises:
        UmedError: the folder holds neither, or its weights are missing or do not fit.
    """

    def __init__(self, path: Path | str, device: str | None = None) -> None:
        from transformers import CLIPImageProcessor, CLIPVisionModel

        self.device = answering_device(device)
        folder, inside = _tower_of(Path(path))
        if Path(folder).is_dir():
            check_plain(weight_files(folder))
            if not inside:
                refuse_missing_of_tower(folder)
        try:
            with library_bars(), behind_the_door():
                self._model = CLIPVisionModel.from_pretrained(folder)
            processor = CLIPImageProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UmedError(f"--tower {path}: the tower {folder} cannot be loaded: {error}") from error
        if inside:
            misfit = tower_misfit({_PREFIX + name: value for name, value in self._model.state_dict().items()}, inside)
            if misfit:
                raise UmedError(f"--tower {path}: its vision-tower weights do not fit {folder}: {misfit}")
            own = {name.removeprefix(_PREFIX): value for name, value in inside.items()}
            self._model.load_state_dict(own, strict=False)
        self._model.float().eval().requires_grad_(False).to(self.device)
        config: Any = self._model.config
        self.side, self.width = int(config.image_size), int(config.hidden_size)
        layers = int(config.num_hidden_layers)
        self.depths = [max(1, round(share * layers)) for share in _SHARES]
        self._mean, self._std = (np.array(values, np.float32) for values in (processor.image_mean, processor.image_std))
        self.digest = self._digest()

    def picture(self, image: Image.Image, geometry: ImageGeometry) -> Picture:
        """An image as the tower sees it in training: cut or padded to a square, the padding in the tower's mean colour.

        Args:
            image: 8-bit RGB.
            geometry: of the image, in the mode of training (``pad`` or ``square``).
        """
        square = np.asarray(square_of(image, geometry, min_side=self.side, max_side=self.side), np.float32) / 255
        ((x1, y1, x2, y2),) = geometry.to_square([(0.0, 0.0, float(image.width), float(image.height))])
        inside = np.zeros(square.shape[:2], bool)
        left, top = (int(np.ceil(value * self.side - 1e-6)) for value in (x1, y1))
        right, bottom = (int(np.floor(value * self.side + 1e-6)) for value in (x2, y2))
        inside[top : max(bottom, top + 1), left : max(right, left + 1)] = True
        return Picture(np.where(inside[:, :, None], square, self._mean).astype(np.float32), inside)

    @torch.no_grad()
    def features(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        """Patch tokens ``[B, P, D]`` after each of ``depths``, without the class token.

        Args:
            images: B float32 RGB arrays ``[S, S, 3]`` in 0-1.
        """
        pixels = np.stack([(image - self._mean) / self._std for image in images]).transpose(0, 3, 1, 2)
        batch = torch.from_numpy(np.ascontiguousarray(pixels, np.float32)).to(self.device)
        states = self._model(pixel_values=batch, output_hidden_states=True).hidden_states
        return [states[depth][:, 1:] for depth in self.depths]

    def _digest(self) -> str:
        digest = hashlib.sha256(self._mean.tobytes() + self._std.tobytes())
        for name, tensor in sorted(self._model.state_dict().items()):
            if not is_buffer(name):  # older transformers save it
                digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()


def _tower_of(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Folder or name of a tower, and the weights inside the checkpoint that replace its own."""
    file = path / "config.json"
    if file.is_file() and not is_lora(path):
        kind = read_object(file).get("model_type")
        if kind in _CLIP:
            return str(path), {}
        if kind not in FAMILIES:
            raise UmedError(
                f"--tower {path}: config.json has model_type {kind!r}. Needed: a LLaVA checkpoint ({', '.join(FAMILIES)}) or a "
                f"CLIP vision tower ({', '.join(_CLIP)})."
            )
    checkpoint = find_base(path, None) if is_lora(path) else path
    config = read_config(checkpoint)
    name = config.get("mm_vision_tower", config.get("vision_tower"))
    if not isinstance(name, str):
        raise UmedError(f"--tower {path}: config.json has no mm_vision_tower, so this model cannot see images.")
    beside = checkpoint / name
    left_out = is_lora(path) and left_out_own_tower(read_config(path))
    return str(beside) if beside.is_dir() else name, {} if left_out else tower_tensors(checkpoint)
