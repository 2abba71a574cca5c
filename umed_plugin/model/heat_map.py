"""Heat maps: the attention over the image's patches of the tokens that name an abnormality.

They are shown to people, and vision relevance is their share on the lesion. A heat map is small enough for a line of
``predictions.jsonl``:

- ``grid``: [rows, columns] of patches; ``values``: base64 of one byte per patch, row by row, 255 for ``peak``, the largest share
  of the attention on the image that a patch gets.
- ``covers``: part of the square's side that the patches cover, from its upper left corner.
- ``of_true_name``: whether the tokens name an abnormality that is present. An answer that names only others gets a heat map too,
  which shows where the answer went wrong.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umed_plugin.errors import UmedError
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.model.attention import AttentionSettings, contributions, pass_with_attention
from umed_plugin.model.forward import Candidates, PromptBatch, base_llava
from umed_plugin.model.token_spans import lesion_naming_tokens, naming_tokens

HeatMap = dict[str, Any]


def relevance_and_heat_maps(
    model: Any,
    tokenizer: Any,
    prompts: PromptBatch,
    answers: Candidates,
    records: Sequence[Mapping[str, Any]],
    geometries: Sequence[ImageGeometry],
) -> list[tuple[float, HeatMap | None]]:
    """For each answer its vision relevance, 0-1, over all layers and heads, and its heat map; None if it names no abnormality.

    Args:
        prompts, answers, records, geometries: N of each; records have ``terms`` and ``objects``.
    """
    of_true_names = lesion_naming_tokens(tokenizer, answers, records)
    of_any_name = [
        named or naming_tokens(tokenizer, ids, record["terms"], set(record["terms"]))
        for named, ids, record in zip(of_true_names, answers.answers(), records)
    ]
    layers = range(base_llava(model).config.num_hidden_layers)
    maps = attention_maps(model, prompts, answers, of_any_name, layers).cpu().numpy()
    pairs: list[tuple[float, HeatMap | None]] = []
    for attention, true_name, any_name, record, geometry in zip(maps, of_true_names, of_any_name, records, geometries):
        relevance = float(attention @ geometry.patch_cover(record["objects"]["bbox"])) if true_name else 0.0
        heat_map = encode_heat_map(attention, geometry, bool(true_name)) if any_name else None
        pairs.append((round(relevance, 6), heat_map))
    return pairs


@torch.no_grad()
def attention_maps(
    model: Any,
    prompts: PromptBatch,
    candidates: Candidates,
    token_indices: Sequence[Sequence[int]],
    layers: Sequence[int],
) -> Tensor:
    """Attention of each candidate's tokens on every image patch: the mean over tokens, ``layers`` and heads; no sinks masked.

    Summed over patches with their cover as weights, it is the value of `umed_plugin.model.attention.attention_on_lesion`, which
    describes the arguments.

    Returns:
        [N, P] float32, each row summing to 1; a row is 0 if a candidate has no tokens.
    """
    maps = torch.zeros(len(candidates.mask), prompts.n_patches, device=candidates.token_ids.device)

    def add(owners: Tensor, _queries: Tensor, attention: Tensor) -> None:
        maps.index_add_(0, owners, attention.mean(dim=1))

    pass_with_attention(model, prompts, candidates, token_indices, AttentionSettings(layers), add)
    return maps / contributions(token_indices, layers, maps.device)[:, None]


def encode_heat_map(attention: np.ndarray, geometry: ImageGeometry, of_true_name: bool) -> HeatMap:
    """The heat map of [P] shares of attention that sum to 1, in the order of the patches."""
    peak = float(attention.max())
    values = np.round(attention / peak * 255).astype(np.uint8)
    return {
        "grid": [geometry.grid, geometry.grid],
        "values": base64.b64encode(values.tobytes()).decode(),
        "peak": round(peak, 6),
        "covers": geometry.patch_span,
        "of_true_name": of_true_name,
    }


def decode_heat_map(heat_map: HeatMap) -> np.ndarray:
    """Shares of the attention, float64 ``[rows, columns]``, with a precision of 1/255 of the peak.

    Raises:
        UmedError: the number of bytes is not the number of patches in the grid.
    """
    values = np.frombuffer(base64.b64decode(heat_map["values"]), np.uint8)
    rows, columns = heat_map["grid"]
    if len(values) != rows * columns:
        raise UmedError(
            f"a heat map has {len(values)} values for a grid of {rows} x {columns} patches. Evaluate again."
        )
    return values.reshape(rows, columns) / 255 * heat_map["peak"]
