"""Where the name of an abnormality looks: its attention over the image's patches, for the eye and for vision relevance.

A heat is small enough for a line of ``predictions.jsonl``:

- ``grid``: [rows, columns] of patches; ``values``: base64 of one byte for each, row by row, 255 for ``peak``, the largest share
  of the attention on the image that a patch gets.
- ``covers``: part of the square's side that the patches cover, from its upper left corner.
- ``of_true_name``: whether the tokens name an abnormality that is there. An answer that names only others is looked at too: where
  it went wrong is what one wants to see.
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
from umed_plugin.model.attention import lesion_name_rows, name_token_rows, parts_added, watched_pass
from umed_plugin.model.forward import Candidates, PromptBatch, base_llava

Heat = dict[str, Any]


def looked_at(
    model: Any,
    tokenizer: Any,
    prompts: PromptBatch,
    answers: Candidates,
    records: Sequence[Mapping[str, Any]],
    geometries: Sequence[ImageGeometry],
) -> list[tuple[float, Heat | None]]:
    """Of each answer its vision relevance, 0-1, over all layers and heads, and its heat, None where it names no abnormality.

    Args:
        prompts, answers, records, geometries: N of each; records have ``terms`` and ``objects``.
    """
    true_rows = lesion_name_rows(tokenizer, answers, records)
    rows = [
        named or name_token_rows(tokenizer, ids, record["terms"], set(record["terms"]))
        for named, ids, record in zip(true_rows, answers.answers(), records)
    ]
    layers = range(base_llava(model).config.num_hidden_layers)
    maps = attention_maps(model, prompts, answers, rows, layers).cpu().numpy()
    looked = []
    for attention, of_true, of_any, record, geometry in zip(maps, true_rows, rows, records, geometries):
        relevance = float(attention @ geometry.patch_cover(record["objects"]["bbox"])) if of_true else 0.0
        looked.append((round(relevance, 6), encode_heat(attention, geometry, bool(of_true)) if of_any else None))
    return looked


@torch.no_grad()
def attention_maps(
    model: Any, prompts: PromptBatch, candidates: Candidates, token_rows: Sequence[Sequence[int]], layers: Sequence[int]
) -> Tensor:
    """Attention of each candidate's tokens on every image patch, mean over tokens, ``layers`` and heads; no sinks masked.

    Its sum over patches, weighted with their cover, is what `umed_plugin.model.attention.attention_on_lesion` gives, which
    says what the arguments are.

    Returns:
        [N, P] float32, each row summing to 1; a row is 0 where a candidate has no tokens.
    """
    maps = torch.zeros(len(candidates.mask), prompts.n_patches, device=candidates.token_ids.device)

    def add(owners: Tensor, _queries: Tensor, attention: Tensor) -> None:
        maps.index_add_(0, owners, attention.mean(dim=1))

    watched_pass(model, prompts, candidates, token_rows, layers, add)
    return maps / parts_added(token_rows, layers, maps.device)[:, None]


def encode_heat(attention: np.ndarray, geometry: ImageGeometry, of_true_name: bool) -> Heat:
    """The heat of [P] shares of attention that sum to 1, in the order of the patches."""
    peak = float(attention.max())
    values = np.round(attention / peak * 255).astype(np.uint8)
    return {
        "grid": [geometry.grid, geometry.grid],
        "values": base64.b64encode(values.tobytes()).decode(),
        "peak": round(peak, 6),
        "covers": geometry.patch_span,
        "of_true_name": of_true_name,
    }


def decode_heat(heat: Heat) -> np.ndarray:
    """Shares of the attention, float64 ``[rows, columns]``, to 1/255 of the peak.

    Raises:
        UmedError: the bytes are not as many as the grid has patches.
    """
    values = np.frombuffer(base64.b64decode(heat["values"]), np.uint8)
    rows, columns = heat["grid"]
    if len(values) != rows * columns:
        raise UmedError(f"a heat has {len(values)} values for a grid of {rows} x {columns} patches. Evaluate again.")
    return values.reshape(rows, columns) / 255 * heat["peak"]
