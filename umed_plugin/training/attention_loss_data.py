"""Stage 1's data for the attention loss: beside LLaVA's item, the tokens that name a lesion and the patches that it covers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llava.constants import IGNORE_INDEX
from torch import Tensor

from umed_plugin.data.records import Record, record_geometry, true_boxes
from umed_plugin.errors import UmedError
from umed_plugin.model.token_spans import record_tokens
from umed_plugin.training.tuning_data import GroundedDataset

TOKENS, COVER = "lesion_tokens", "lesion_cover"


def has_lesion(record: Record) -> bool:
    """Whether a record has true boxes; LLaVA's plain items have none."""
    return bool(record.get("objects", {}).get("bbox"))


class LesionDataset(GroundedDataset):
    """Items with two entries more, once `use_grid` has been called.

    - ``lesion_tokens``: indices in ``input_ids`` of the answer's tokens that name a lesion, int64 [n].
    - ``lesion_cover``: part of each patch that the true boxes cover, 0-1, float32 [P], row-major.

    Both are empty or 0 for a record without boxes.
    """

    _grid: tuple[int, int] | None = None

    def use_grid(self, image_size: int, patch_size: int) -> None:
        """From now on yield the entries, for a vision tower of these sizes in pixels.

        Raises:
            UmedError: no record has boxes.
        """
        if not any(has_lesion(record) for record in self.list_data_dict):
            raise UmedError(
                f"--umed_attention_loss {self.flags.umed_attention_loss}: none of the {len(self)} records has boxes ('objects'), "
                "so it would have no effect. Train on records of a recipe, or remove the flag."
            )
        self._grid = image_size, patch_size

    def sample(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """The item of record ``index`` as an epoch shows it: with ``--umed_augment`` its boxes have moved."""
        item = super().sample(index, epoch)
        if self._grid is None:
            return item
        record = self.study(index, epoch).record
        return {**item, **self._lesion(record, item["input_ids"], item["labels"], *self._grid)}

    def _lesion(
        self, record: Record, ids: Tensor, labels: Tensor, image_size: int, patch_size: int
    ) -> dict[str, Tensor]:
        if not has_lesion(record):
            none = torch.zeros((image_size // patch_size) ** 2)
            return {TOKENS: torch.zeros(0, dtype=torch.long), COVER: none}
        answer = (labels != IGNORE_INDEX).nonzero().flatten()
        named = record_tokens(self.tokenizer, ids[answer].tolist(), record)
        cover = record_geometry(record, image_size, patch_size).patch_cover(true_boxes(record))
        return {TOKENS: answer[named], COVER: torch.from_numpy(cover).float()}


class LesionCollator:
    """LLaVA's collator, and the entries of `LesionDataset`: ``lesion_tokens``, a list of B, and ``lesion_cover`` [B, P]."""

    def __init__(self, stock: Any) -> None:
        self._stock = stock

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One batch."""
        batch: dict[str, Any] = self._stock(items)
        return {**batch, TOKENS: [item[TOKENS] for item in items], COVER: torch.stack([item[COVER] for item in items])}
