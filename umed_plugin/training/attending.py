"""``--umed_attention_loss``: `umed_plugin.model.attention_loss` as a further loss of stage 1.

Logged since the last log, over all ranks:

- ``attention_loss``: mean over the records that contribute, before its weight. The trainer's ``loss`` holds it with its weight.
- ``attention_on_lesion``: their mean share of the attention, 0-1: the vision relevance of the reference answers.
- ``records_without_lesion``: share of the records that contribute nothing, 0-1: without boxes, or with an answer that names none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from umed_plugin.errors import UmedError, warn
from umed_plugin.model.attention import AttentionSettings
from umed_plugin.model.attention_loss import AttentionLoss, LesionTokens, Measured
from umed_plugin.model.distillation import AnswerStates
from umed_plugin.model.forward import base_llava
from umed_plugin.model.patch_attention import rope_inverse_frequencies
from umed_plugin.training.attention_loss_data import COVER, TOKENS
from umed_plugin.training.extra_loss import Gather, PlainLoss


class AttendingLoss(PlainLoss):
    """An `umed_plugin.training.extra_loss.ExtraLoss`: the attention loss.

    Args:
        model: that learns, without DDP.
        dataset: a `umed_plugin.training.attention_loss_data.LesionDataset`.
        args: LLaVA's TrainingArguments with the flags.

    Raises:
        UmedError: the model's attention cannot be measured, or no record has boxes.
        UsageError: chosen layers or heads do not exist.
    """

    def __init__(self, model: Any, dataset: Any, args: Any) -> None:
        flags, llava = args.umed, base_llava(model)
        config, tower = llava.config, llava.get_vision_tower()
        if tower.select_feature != "patch":
            raise UmedError(
                f"--umed_attention_loss needs --mm_vision_select_feature patch, and this checkpoint has {tower.select_feature}: "
                "its first image token is no patch."
            )
        rope_inverse_frequencies(
            config, 2, torch.device("cpu")
        )  # refuses what cannot be measured, before the first step
        dataset.use_grid(tower.config.image_size, tower.config.patch_size)
        settings = AttentionSettings(
            flags.vrr_layer_indices(config.num_hidden_layers),
            flags.vrr_head_indices(config.num_attention_heads),
            flags.vrr_sink_ratio(config.hidden_size),
        )
        self._config = config
        self._attention_loss = AttentionLoss(llava, settings, flags.umed_attention_loss)
        self._measured: list[Measured] = []
        self._warns = args.process_index == 0

    @contextmanager
    def watching(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Forward and backward pass, both of them watched."""
        tokens, cover = inputs.pop(TOKENS), inputs.pop(COVER)
        lesions = LesionTokens.of(self._config, inputs["input_ids"], inputs["attention_mask"], tokens, cover)
        with self._attention_loss.watching(lesions):
            yield

    def added_to(self, loss: Tensor, answers: AnswerStates | None) -> Tensor:
        """The loss plus the attention loss."""
        loss, measured = self._attention_loss.added_to(loss)
        self._measured.append(measured)
        return loss

    def metrics(self, gather: Gather) -> dict[str, float]:
        """The three metrics."""
        rows = [[m.records, m.contributing, m.loss, m.share] for m in self._measured] or [[0.0] * 4]
        self._measured = []
        records, contributing, loss, share = gather([sum(column) for column in zip(*rows)])
        metrics = {"records_without_lesion": 1 - contributing / max(records, 1)}
        if contributing:
            metrics |= {"attention_loss": loss / contributing, "attention_on_lesion": share / contributing}
        elif self._warns:
            self._warns = False
            warn(
                "no answer since the last log names a lesion that has a box, so the attention loss had no effect in these steps."
            )
        return metrics
