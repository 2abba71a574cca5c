"""The KV caches: one for sampling, with room for the tokens to come; one for scoring, shared by the K answers of a prompt.

- `PreallocatedCache` holds prompt and answers while K candidates are sampled (`umed_plugin.model.sampling`) and while questions
  about one image are answered (`umed_plugin.model.shared_prefix`).
- `FinishedCache` is what sampling leaves of it, for tokens that are looked at again (`umed_plugin.model.sampled_attention`).
- `SharedPrefixCache` holds the prompt alone, while K answers are scored or learned from (`umed_plugin.model.forward`).

Shapes as in `umed_plugin.model.forward`; d is the size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache


class _OwnCache(DynamicCache):
    """What a model asks of a cache on every transformers version; subclasses hold the tensors and count their columns."""

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of columns that a mask for ``query_length`` new ones spans, and the index of the first."""
        return self.get_seq_length(layer_idx) + query_length, 0


class PreallocatedCache(_OwnCache):
    """A KV cache with free columns: a step writes its keys and values in place instead of copying all before it.

    Args:
        room: columns to keep free behind the first tokens.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._buffers: list[tuple[Tensor, Tensor]] = []  # per layer: [R, kv_heads, columns + room, d] keys and values
        self._columns: list[int] = []  # per layer: columns written so far

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *unused: Any) -> tuple[Tensor, Tensor]:
        """Write [R, kv_heads, n, d] keys and values of new columns; return those of all columns, as views."""
        if layer_idx == len(self._buffers):
            self._buffers.append((_with_room(key_states, self.room), _with_room(value_states, self.room)))
            self._columns.append(0)
        start, end = self._columns[layer_idx], self._columns[layer_idx] + key_states.shape[-2]
        keys, values = (buffer[:, :, :end] for buffer in self._buffers[layer_idx])
        keys[:, :, start:], values[:, :, start:] = key_states, value_states
        self._columns[layer_idx] = end
        return keys, values

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Columns written so far."""
        layer = layer_idx or 0
        return self._columns[layer] if layer < len(self._columns) else 0

    def truncate(self, columns: int) -> None:
        """Keep only the first columns; the next ones overwrite the rest."""
        self._columns = [min(columns, written) for written in self._columns]

    def take_rows(self, rows: Tensor) -> None:
        """Keep the rows of an index, which may repeat a row."""
        for layer, (keys, values) in enumerate(self._buffers):  # one by one: a single layer is in memory twice
            self._buffers[layer] = keys[rows], values[rows]

    def finished(self, rows: Tensor | None = None) -> FinishedCache:
        """What the rows of an index have written, as a copy without free columns; None: all rows, as views."""
        written = [tuple(buffer[:, :, :end] for buffer in layer) for layer, end in zip(self._buffers, self._columns)]
        taken = [(keys, values) if rows is None else (keys[rows], values[rows]) for keys, values in written]
        return FinishedCache(taken)


class FinishedCache(_OwnCache):
    """Keys and values of rows that are sampled to their end. New tokens read them and leave nothing in them.

    Args:
        layers: keys and values [R, kv_heads, S, d] of each layer.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._finished = layers

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *unused: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of all columns, those of the new tokens last."""
        keys, values = self._finished[layer_idx]
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Columns of the finished rows."""
        return self._finished[layer_idx or 0][0].shape[-2]

    def numel(self) -> int:
        """Number of values that the cache holds."""
        return sum(keys.numel() + values.numel() for keys, values in self._finished)


class SharedPrefixCache(_OwnCache):
    """Keys and values of Q prompts, shown to the K answers of each, layer by layer.

    The first pass fills it. Later passes read it and leave nothing in it. The gradient flows back into the prompts.
    """

    def __init__(self) -> None:
        super().__init__()
        self._prompts: list[tuple[Tensor, Tensor]] = []  # per layer: [Q, kv_heads, L, d] keys and values

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *unused: Any) -> tuple[Tensor, Tensor]:
        """Store [Q, kv_heads, L, d] of the prompts; for [N, kv_heads, T, d] of answers return them behind their prompts."""
        if layer_idx == len(self._prompts):
            self._prompts.append((key_states, value_states))
            return key_states, value_states
        keys, values = self._prompts[layer_idx]
        return _behind(keys, key_states), _behind(values, value_states)

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Columns of the prompts."""
        layer = layer_idx or 0
        return self._prompts[layer][0].shape[-2] if layer < len(self._prompts) else 0


def _behind(prompts: Tensor, answers: Tensor) -> Tensor:
    """[N, heads, L+T, d] from [Q, heads, L, d] and [N, heads, T, d], with one copy."""
    queries = len(prompts)
    answers = answers.unflatten(0, (queries, -1))
    return torch.cat([prompts[:, None].expand(-1, answers.shape[1], -1, -1, -1), answers], dim=-2).flatten(0, 1)


def _with_room(states: Tensor, room: int) -> Tensor:
    rows, heads, columns, size = states.shape
    return states.new_empty(rows, heads, columns + room, size)
