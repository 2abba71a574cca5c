"""Vision relevance from the KV cache that sampling leaves: only the tokens that name the lesion are computed again.

Sampling has computed the keys and values of all prompts and answers. So the attention of a few tokens needs no second pass over
everything: each token goes through the layers once more and reads the cache. At 4 tokens out of 100 in each of 8 answers, that
is 32 tokens a question in place of 1,440. Only packed rows are read again (`umed_plugin.model.packing`).

- **Equality**: in float32 the values equal those of `umed_plugin.model.attention.attention_on_lesion` up to rounding, about 1e-6.
  In bfloat16 keys and values were rounded one token at a time, by other kernels: values of about 0.1 differ by about 1e-3, as
  those of two passes do.
- **Memory**: the cache lives until the tokens have been computed, then it goes. Finished rows leave the buffers of
  `umed_plugin.model.kv_cache.PreallocatedCache` without free columns, so all of it is never more than sampling took at its
  start. To this come the patches' keys before their rotation: P/(2S) of the cache, with S columns in a row. Fewer queries
  sampled together (``--umed_sampling_batch_size``) bound both.

Shapes as in `umed_plugin.model.forward` and `umed_plugin.model.packing`; M named tokens in a row, padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from umed_plugin.model.attention import (
    AttentionSettings,
    LesionShares,
    Watched,
    hooks,
    measuring,
    norm_weights,
    patch_indices,
)
from umed_plugin.model.forward import Candidates, PromptBatch, prefill, unwrapped
from umed_plugin.model.output_layer import output_layer_sees
from umed_plugin.model.packing import PADDING, Columns, block_mask, sliding_window
from umed_plugin.model.patch_attention import attention_sinks
from umed_plugin.model.sampling import (
    FinishedRows,
    SamplingSettings,
    adapter_for_decoding,
    continue_prompts,
    empty_cache,
)


@dataclass
class _PatchKeys:
    """Keeps k [Q, P, kv_heads*d] of the patches, before the rotary embedding, and which patches are sinks, bool [Q, P]."""

    patches: tuple[Tensor, Tensor]
    norms: dict[int, Tensor]
    sink_ratio: float
    keys: dict[int, Tensor] = field(default_factory=dict)
    sinks: dict[int, Tensor] = field(default_factory=dict)

    def keep_queries(self, layer: int, states: Tensor, output: Tensor) -> None:
        """The prompts' pass has none of the named tokens."""

    def keep_keys(self, layer: int, states: Tensor, output: Tensor) -> None:
        self.keys[layer] = output[self.patches]
        if self.sink_ratio:
            self.sinks[layer] = attention_sinks(states[self.patches], self.norms[layer], self.sink_ratio)


@dataclass
class _NamedQueries:
    """Measures q of the named tokens, at ``tokens`` in their rows, against the patches' keys."""

    patches: _PatchKeys
    tokens: tuple[Tensor, Tensor]
    measure: Callable[[Tensor, Tensor, Tensor | None], None]

    def keep_queries(self, layer: int, states: Tensor, output: Tensor) -> None:
        keys, sinks = self.patches.keys[layer].float(), self.patches.sinks.get(layer)
        self.measure(output[self.tokens].float(), keys, sinks)

    def keep_keys(self, layer: int, states: Tensor, output: Tensor) -> None:
        """The patches' keys are there already."""


@torch.no_grad()
def generate_with_attention(
    model: Any,
    prompts: PromptBatch,
    sampling: SamplingSettings,
    naming: Callable[[Candidates], Sequence[Sequence[int]]],
    patch_weights: Tensor,
    settings: AttentionSettings,
) -> tuple[Candidates, Tensor]:
    """Sample K answers to each of Q prompts, and measure the share of their attention that falls on the lesion.

    Args:
        model: as in `umed_plugin.model.sampling.generate`, with Llama-style attention.
        prompts: Q prompts.
        sampling: packed.
        naming: gives the indices 0..T-1 of the tokens that name the abnormality, for each of N candidates.
        patch_weights: [Q, P] part of each patch that the true boxes cover, 0-1, row-major.
        settings: layers, heads and sinks.

    Returns:
        Candidates as of `umed_plugin.model.sampling.generate`, and [N] values in 0..1, float32, as of
        `umed_plugin.model.attention.attention_on_lesion`.
    """
    llava = unwrapped(model)
    patches = _PatchKeys(patch_indices(prompts), norm_weights(llava, settings), settings.sink_ratio)
    finished: list[FinishedRows] = []
    cache = empty_cache(sampling)
    with adapter_for_decoding(model):
        with hooks(llava, settings.layers, patches):
            first = prefill(model, prompts, cache)
        candidates = continue_prompts(model, cache, first.logits[:, -1], prompts.mask, sampling, finished)

    token_indices = naming(candidates)
    shares = LesionShares(patch_weights, token_indices, settings.layers, candidates.token_ids.device)
    for rows in finished:
        watched = Watched.of(prompts, _of_rows(token_indices, rows, len(prompts.mask)))
        if len(watched.owners):
            measure = measuring(llava, prompts, watched, settings, shares.add)
            _pass_of_named(model, prompts, candidates, watched, rows, patches, measure)
    return candidates, shares.mean()


def _of_rows(token_indices: Sequence[Sequence[int]], rows: FinishedRows, queries: int) -> list[Sequence[int]]:
    """The indices of the candidates to the queries in these rows; none of the others."""
    each, inside = len(token_indices) // queries, set(rows.queries.tolist())
    return [indices if n // each in inside else () for n, indices in enumerate(token_indices)]


def _pass_of_named(
    model: Any,
    prompts: PromptBatch,
    candidates: Candidates,
    watched: Watched,
    rows: FinishedRows,
    patches: _PatchKeys,
    measure: Callable[[Tensor, Tensor, Tensor | None], None],
) -> None:
    """Run the watched tokens behind the finished rows of their queries; the layers' hooks measure them."""
    llava = unwrapped(model)
    each = len(candidates.mask) // len(prompts.mask)
    row, slot = _places(watched, rows)
    shape = len(rows.queries), int(slot.max()) + 1
    tokens, segments, positions = (torch.zeros(shape, dtype=torch.long, device=row.device) for _ in range(3))
    segments.fill_(PADDING)
    tokens[row, slot] = candidates.token_ids[watched.owners, watched.steps]
    segments[row, slot] = watched.owners % each + 1
    positions[row, slot] = watched.positions(prompts)

    embeds = llava.get_input_embeddings()(tokens)
    mask = _mask_of_named(Columns(segments, positions), rows.columns, sliding_window(llava), embeds.dtype)
    inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    # The logits are not needed; one column's are the fewest that there are.
    one_column = output_layer_sees(llava, lambda hidden: hidden[:, :1])
    with hooks(llava, list(patches.keys), _NamedQueries(patches, (row, slot), measure)), one_column:
        model(**inputs, past_key_values=rows.cache, use_cache=False, return_dict=True)


def _places(watched: Watched, rows: FinishedRows) -> tuple[Tensor, Tensor]:
    """Row [R] and slot [R] of each watched token: the tokens of a query stand side by side in its row."""
    row_of_query = {query: row for row, query in enumerate(rows.queries.tolist())}
    row = [row_of_query[query] for query in watched.queries.tolist()]
    slot = [place for tokens in watched.of_query.values() for place in range(tokens.stop - tokens.start)]
    device = watched.queries.device
    return torch.tensor(row, device=device), torch.tensor(slot, device=device)


def _mask_of_named(named: Columns, seen: Columns, window: int | None, dtype: torch.dtype) -> Tensor:
    """[R, 1, M, S+M] what is added to the scores: a named token sees what the cache has from before it, and itself.

    Its own column is in the cache too, unless it was the last that was drawn. So all named tokens bring their own.
    """
    one_back = Columns(named.segments, named.positions - 1)
    before = block_mask(one_back, seen, None if window is None else window - 1, dtype)
    count = named.segments.shape[1]
    itself = torch.full((count, count), torch.finfo(dtype).min, dtype=dtype, device=before.device).fill_diagonal_(0)
    return torch.cat([before, itself.expand(len(before), 1, -1, -1)], dim=-1)
