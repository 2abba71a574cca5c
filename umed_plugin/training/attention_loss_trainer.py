"""Stage 1 with ``--umed_attention_loss``: LLaVA's trainer, with `umed_plugin.model.attention_loss` added to its loss.

Logged since the last log, over all ranks:

- ``attention_loss``: mean over the records that contribute, before its weight. The trainer's ``loss`` holds it with its weight.
- ``attention_on_lesion``: their mean share of the attention, 0-1: the vision relevance of the reference answers.
- ``records_without_lesion``: share of the records that contribute nothing, 0-1: without boxes, or with an answer that names none.
"""

from __future__ import annotations

from typing import Any

import torch
from llava.train.llava_trainer import LLaVATrainer
from torch import Tensor

from umed_plugin.errors import UmedError, UsageError, warn
from umed_plugin.model.attention import AttentionSettings, rope_inverse_frequencies
from umed_plugin.model.attention_loss import AttentionLoss, LesionTokens, Measured
from umed_plugin.model.forward import base_llava
from umed_plugin.training.attention_loss_data import COVER, TOKENS


class AttentionLossTrainer(LLaVATrainer):
    """LLaVA's trainer with the attention loss.

    Args:
        positional, keywords: as LLaVA's script gives them; the training dataset is a
            `umed_plugin.training.attention_loss_data.LesionDataset`.

    Raises:
        UmedError: the model's attention cannot be measured, or no record has boxes.
        UsageError: chosen layers or heads do not exist, or one process drives several GPUs.
    """

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        super().__init__(*positional, **keywords)
        flags, llava = self.args.umed, base_llava(self.model)
        config, tower = llava.config, llava.get_vision_tower()
        if self.args.n_gpu > 1:
            raise UsageError(
                f"--umed_attention_loss: one process drives {self.args.n_gpu} GPUs. Start one process per GPU, with torchrun or "
                "deepspeed."
            )
        if tower.select_feature != "patch":
            raise UmedError(
                f"--umed_attention_loss needs --mm_vision_select_feature patch, and this checkpoint has {tower.select_feature}: "
                "its first image token is no patch."
            )
        rope_inverse_frequencies(
            config, 2, torch.device("cpu")
        )  # refuses what cannot be measured, before the first step
        self.train_dataset.use_grid(tower.config.image_size, tower.config.patch_size)
        settings = AttentionSettings(
            flags.vrr_layer_indices(config.num_hidden_layers),
            flags.vrr_head_indices(config.num_attention_heads),
            flags.umed_vrr_mask_sinks,
        )
        self._attention_loss = AttentionLoss(llava, settings, flags.umed_attention_loss)
        self._measured: list[Measured] = []
        self._warned = False

    def training_step(self, model: Any, inputs: dict[str, Any], *more: Any) -> Tensor:
        """One batch, forward and backward, both of them watched."""
        tokens, cover = inputs.pop(TOKENS), inputs.pop(COVER)
        config = base_llava(self.model).config
        lesions = LesionTokens.of(config, inputs["input_ids"], inputs["attention_mask"], tokens, cover)
        with self._attention_loss.watching(lesions):
            return super().training_step(model, inputs, *more)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        """LLaVA's loss plus the attention loss."""
        found = super().compute_loss(model, inputs, return_outputs, **more)
        loss, measured = self._attention_loss.added_to(found[0] if return_outputs else found)
        self._measured.append(measured)
        return (loss, found[1]) if return_outputs else loss

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """Add what was measured since the last log, over all ranks."""
        if "loss" in logs:
            logs.update(self._means())
        super().log(logs, *rest)

    def _means(self) -> dict[str, float]:
        """The three metrics, then starts anew. All ranks must call."""
        rows = [[m.records, m.contributing, m.loss, m.share] for m in self._measured] or [[0.0] * 4]
        self._measured = []
        own = torch.tensor(rows, dtype=torch.float32, device=self.args.device).sum(dim=0, keepdim=True)
        records, contributing, loss, share = self.accelerator.gather(own).sum(dim=0).tolist()
        metrics = {"records_without_lesion": 1 - contributing / max(records, 1)}
        if contributing:
            metrics |= {"attention_loss": loss / contributing, "attention_on_lesion": share / contributing}
        elif not self._warned and self.is_world_process_zero():
            self._warned = True
            warn(
                f"step {self.state.global_step}: no answer since the last log names a lesion that has a box, so the attention "
                "loss had no effect."
            )
        return metrics
