"""``--umed_tower_teacher``: `umed_plugin.model.tower_teacher` as a further loss of stage 1.

The map between the two feature spaces has an optimizer of its own, Adam with a learning rate of 1e-3: it is no part of the
model, so neither LLaVA's optimizer nor the checkpoint's export knows it. Its gradient is averaged over processes. It is saved
beside the weights in each checkpoint to resume from (``tower_map.pt``), and nowhere else.

Logged: ``tower_cosine``, the mean cosine of the batch's patches, -1 to 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umed_plugin.checkpoints.safe_loading import load_pickle
from umed_plugin.checkpoints.sam_encoder import load_sam_encoder, read_sam_file
from umed_plugin.errors import UmedError, note
from umed_plugin.model.distillation import AnswerStates
from umed_plugin.model.forward import IMAGE_TOKEN_INDEX, base_llava
from umed_plugin.model.tower_teacher import TowerTeacher, new_map, patch_cosine, tower_features
from umed_plugin.training.extra_loss import Gather, PlainLoss

STATE = "tower_map.pt"
LEARNING_RATE = 1e-3


class TowerTeachingLoss(PlainLoss):
    """An `umed_plugin.training.extra_loss.ExtraLoss`: 1 - cosine of the tower's patches and the teacher's.

    Args:
        model: that learns, without DDP, on its training device.
        teacher: of its tower.
        weight: of the loss.
        seed: of the map's start.

    Raises:
        UmedError: the tower's features are not one per patch.
    """

    def __init__(self, model: Any, teacher: TowerTeacher, weight: float, seed: int) -> None:
        self._tower = base_llava(model).get_vision_tower()
        if self._tower.select_feature != "patch":
            raise UmedError(
                f"--umed_tower_teacher needs --mm_vision_select_feature patch, and this checkpoint has "
                f"{self._tower.select_feature}: its first image token is no patch."
            )
        self._teacher, self._weight = teacher, weight
        self._map = new_map(self._tower.hidden_size, teacher.channels, seed).to(self._tower.device)
        self._optimizer = torch.optim.Adam(self._map.parameters(), lr=LEARNING_RATE)
        self._seen: list[Tensor] = []
        self._targets: Tensor | None = None
        self._with_image: Tensor | None = None
        self._sums = [0.0, 0.0]

    @contextmanager
    def watching(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Keep what the tower returns, until the batch is done."""
        with tower_features(self._tower) as self._seen:
            try:
                yield
            finally:
                self._targets = None

    def before_pass(self, inputs: dict[str, Any]) -> None:
        """Ask the teacher about the records that have an image; LLaVA gives the others a black one."""
        images = inputs["images"]
        pixels = images if isinstance(images, Tensor) else torch.stack(list(images))
        self._with_image = (inputs["input_ids"] == IMAGE_TOKEN_INDEX).any(dim=1)
        if self._with_image.any():
            self._targets = self._teacher.features(pixels[self._with_image], self._tower.num_patches_per_side)

    def added_to(self, loss: Tensor, answers: AnswerStates | None) -> Tensor:
        """The loss plus the weighted 1 - cosine, over the records that have an image."""
        if self._targets is None:
            return loss
        # The model's own pass is the last one: the teacher of --umed_keep may have used the tower before.
        cosine = patch_cosine(self._seen[-1][self._with_image], self._targets, self._map)
        self._sums[0] += float(cosine.detach().sum())
        self._sums[1] += cosine.numel()
        return loss + self._weight * (1 - cosine).mean().to(loss)

    def metrics(self, gather: Gather) -> dict[str, float]:
        """``tower_cosine``."""
        total, patches = gather(self._sums)
        self._sums = [0.0, 0.0]
        return {"tower_cosine": total / patches} if patches else {}

    def after_step(self) -> None:
        """Update the map, with the mean gradient of all processes."""
        for parameter in self._map.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= torch.distributed.get_world_size()
        # GradScaler skips such steps of the model too (fp16).
        if all(bool(parameter.grad.isfinite().all()) for parameter in self._map.parameters()):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        """Write ``tower_map.pt``."""
        torch.save({"map": self._map.state_dict(), "optimizer": self._optimizer.state_dict()}, folder / STATE)

    def load(self, folder: Path) -> None:
        """Read it again.

        Raises:
            UmedError: it is missing.
        """
        if not (folder / STATE).is_file():
            raise UmedError(
                f"{folder}: has no {STATE}, the map to the features of --umed_tower_teacher. Choose another --output_dir."
            )
        state = load_pickle(folder / STATE)
        self._map.load_state_dict(state["map"])
        self._optimizer.load_state_dict(state["optimizer"])


def tower_teaching_loss(model: Any, args: Any) -> TowerTeachingLoss:
    """The loss of ``--umed_tower_teacher``.

    Args:
        model: that learns, without DDP, on its training device.
        args: LLaVA's TrainingArguments with the flags.
    """
    flags, tower = args.umed, base_llava(model).get_vision_tower()
    file = read_sam_file(flags.umed_tower_teacher)
    encoder = load_sam_encoder(file, args.device)
    if args.process_index == 0:
        settings = file.settings
        note(
            f"the vision tower is drawn to {file.path} ({file.kind}: {settings['num_hidden_layers']} blocks of "
            f"{settings['hidden_size']}, {settings['image_size']} px). Its licence binds the use of the result."
        )
    processor = tower.image_processor
    teacher = TowerTeacher(encoder, processor.image_mean, processor.image_std)
    return TowerTeachingLoss(model, teacher, flags.umed_tower_teacher_weight, args.seed)
