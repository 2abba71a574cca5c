"""Attention of chosen answer tokens on the image patches, without ``output_attentions``.

Vision relevance (the reward is in `umed_plugin.rewards.terms.vision_relevance`) asks which share of the attention that a
token pays to the image falls on the lesion. Two things of a layer are needed: q at the tokens and k at the patches. Hooks on
``q_proj`` and ``k_proj`` keep just these rows. That works the same under eager, SDPA and flash attention; the last two return
no weights.

For a token n, a layer l and a head h, with P all image patches and w_p in [0, 1] the part of patch p that the true boxes cover:

    s(n, l, h) = sum_p w_p * softmax_{p in P}(q_n . k_p / sqrt(d))

The value of a candidate is the mean of s over its tokens, the chosen layers and the chosen heads. The public transcription of the
paper sums over the lesion's patches in the softmax's denominator too, which makes the value constant. Summing over all image
patches is the reading that carries information.

Raw attention has sinks: patches that draw attention whatever is asked and carry little of the image. They are recognised by the
hidden state x [D] with which a patch enters the layer. The attention they get would not tell, because a lesion should get much
too (Kang et al., "See what you are told", arXiv 2503.03321, eq. 3, with tau = 20):

    max_d |x_d| / sqrt(mean_d x_d^2) >= tau

Masked sinks are left out of P, in numerator and denominator. Departure: the maximum runs over all D values, not over two known
ones of Llama 2. The ratio is at most sqrt(D), so a small model has no sink at tau = 20. Patches stand before the question, so
which ones are sinks does not depend on the question or the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from umed_plugin.model.forward import (
    AnswerPass,
    Candidates,
    PromptBatch,
    answer_pass,
    base_llava,
    positions,
    uses_packed_pass,
)
from umed_plugin.model.output_layer import Scoring
from umed_plugin.model.packing import pack
from umed_plugin.model.patch_attention import TokenPlaces, attention_sinks, attention_to_patches


@dataclass(frozen=True)
class AttentionSettings:
    """Whose attention counts.

    Attributes:
        layers: layer indices.
        heads: head indices; None: all.
        sink_ratio: tau of `attention_sinks`, which are masked; 0 masks none.
    """

    layers: Sequence[int]
    heads: Sequence[int] | None = None
    sink_ratio: float = 0.0


@dataclass(frozen=True)
class _Indices:
    """Where ``q_proj`` and ``k_proj`` output the patches of Q queries and the R watched tokens.

    Attributes:
        patches: row [Q, 1] and column [Q, P] of each image patch, in the first pass through the layers.
        tokens: row [R] and column [R] of each watched token, in the last pass.
        passes: 1 if prompts and answers stand in the same rows; 2 if the prompts go first.
    """

    patches: tuple[Tensor, Tensor]
    tokens: tuple[Tensor, Tensor]
    passes: int


@dataclass
class _Capture:
    """Keeps k [Q, P, kv_heads*d] of the patches and q [R, heads*d] of the tokens of a layer until both are there.

    Then ``measure`` gets q and k in float32 and the sinks, bool [Q, P], and they are dropped. With a single pass, at most one
    layer is held at a time. ``norms`` holds the weight [D] of the RMS norm before each layer's attention.
    """

    indices: _Indices
    measure: Callable[[Tensor, Tensor, Tensor | None], None]
    norms: dict[int, Tensor]
    sink_ratio: float
    keys: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    sinks: dict[int, Tensor] = field(default_factory=dict)

    def keep_queries(self, layer: int, states: Tensor, output: Tensor) -> None:
        """Llama and Mistral call ``q_proj`` before ``k_proj``. With two passes, the first has no answer tokens: skip it."""
        if self.indices.passes == 1 or layer in self.keys:
            self.queries[layer] = output[self.indices.tokens].float()

    def keep_keys(self, layer: int, states: Tensor, output: Tensor) -> None:
        """Keep the keys of the first pass. When the queries are there too, the layer is complete."""
        if layer not in self.keys:
            self.keys[layer] = output[self.indices.patches]
            if self.sink_ratio:
                self.sinks[layer] = attention_sinks(states[self.indices.patches], self.norms[layer], self.sink_ratio)
        if layer in self.queries:
            self.measure(self.queries.pop(layer), self.keys.pop(layer).float(), self.sinks.pop(layer, None))


@contextmanager
def hooks(llava: Any, layers: Sequence[int], capture: Any) -> Iterator[None]:
    """Attach ``keep_queries`` and ``keep_keys`` of the capture to ``q_proj`` and ``k_proj`` of the layers.

    A tensor that they return takes the place of the projection's output.
    """
    handles = []
    for layer in layers:
        attention = llava.get_model().layers[layer].self_attn
        for projection, keep in ((attention.q_proj, capture.keep_queries), (attention.k_proj, capture.keep_keys)):
            hook = partial(_call_with_states_and_output, keep, layer)
            handles.append(projection.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call_with_states_and_output(
    keep: Callable[[int, Tensor, Tensor], Tensor | None],
    layer: int,
    _module: Any,
    inputs: tuple[Tensor],
    output: Tensor,
) -> Tensor | None:
    return keep(layer, inputs[0], output)


@torch.no_grad()
def attention_on_lesion(
    model: Any,
    prompts: PromptBatch,
    candidates: Candidates,
    token_indices: Sequence[Sequence[int]],
    patch_weights: Tensor,
    settings: AttentionSettings,
    *,
    packed: bool = False,
    scoring: Scoring | None = None,
) -> tuple[Tensor, AnswerPass]:
    """Share of each candidate's attention on the image that falls on the lesion, and the outputs of the same pass.

    Args:
        model: a LLaVA model with Llama-style attention, in evaluation mode.
        prompts: Q prompts.
        candidates: N answers.
        token_indices: for each candidate the indices 0..T-1 of the answer tokens that name the abnormality; empty gives 0. What
            counts is the attention of the token itself, at the position where it is the input.
        patch_weights: [Q, P] part of each patch that the true boxes cover, 0-1, row-major.
        settings: layers, heads and sinks.
        packed: as in `umed_plugin.model.forward.answer_pass`.
        scoring: likewise.

    Returns:
        [N] values in 0..1, float32; and the pass's logits and hidden states, so that no second pass is needed.
    """
    shares = LesionShares(patch_weights, token_indices, settings.layers, candidates.token_ids.device)
    outputs = pass_with_attention(
        model, prompts, candidates, token_indices, settings, shares.add, packed=packed, scoring=scoring
    )
    return shares.mean(), outputs


class LesionShares:
    """Adds up the share of attention on the lesion over layers and tokens.

    Args:
        patch_weights: [Q, P] as in `attention_on_lesion`.
        token_indices: likewise.
        layers: whose attention is added.
        device: of the model.
    """

    def __init__(
        self,
        patch_weights: Tensor,
        token_indices: Sequence[Sequence[int]],
        layers: Sequence[int],
        device: torch.device,
    ) -> None:
        self._weights = patch_weights.float().to(device)
        self._counts = contributions(token_indices, layers, device)
        self._sums = torch.zeros_like(self._counts)

    def add(self, owners: Tensor, queries: Tensor, attention: Tensor) -> None:
        """Add one layer's attention [R, heads, P] of R tokens, with the candidate [R] and the query [R] of each."""
        shares = (attention * self._weights[queries][:, None]).sum(dim=-1).mean(dim=-1)
        self._sums.index_add_(0, owners, shares)

    def mean(self) -> Tensor:
        """[N] mean shares, 0..1; 0 for a candidate without tokens."""
        return self._sums / self._counts


def pass_with_attention(
    model: Any,
    prompts: PromptBatch,
    candidates: Candidates,
    token_indices: Sequence[Sequence[int]],
    settings: AttentionSettings,
    add: Callable[[Tensor, Tensor, Tensor], None],
    *,
    packed: bool = False,
    scoring: Scoring | None = None,
) -> AnswerPass:
    """One pass that calls ``add`` once per layer with the candidate [R], query [R] and attention [R, heads, P] of R tokens.

    The other arguments are those of `attention_on_lesion`.
    """
    llava = base_llava(model)
    watched = Watched.of(prompts, token_indices)
    if len(watched.owners) == 0:
        return answer_pass(model, prompts, candidates, packed=packed, scoring=scoring)

    # The pass itself runs as always; each layer calls `measure` as soon as its q and k are there.
    indices = _indices(prompts, candidates, watched, one_row=uses_packed_pass(llava, packed))
    measure = measuring(llava, prompts, watched, settings, add)
    with hooks(llava, settings.layers, _Capture(indices, measure, norm_weights(llava, settings), settings.sink_ratio)):
        return answer_pass(model, prompts, candidates, packed=packed, scoring=scoring)


@dataclass(frozen=True)
class Watched:
    """R answer tokens whose attention is measured, in the order of candidates.

    Attributes:
        owners: [R] candidate 0..N-1 of each.
        steps: [R] index 0..T-1 in its answer.
        queries: [R] query that it answers.
        of_query: which of the tokens answer each query. Queries without any are left out.
    """

    owners: Tensor
    steps: Tensor
    queries: Tensor
    of_query: dict[int, slice]

    @classmethod
    def of(cls, prompts: PromptBatch, token_indices: Sequence[Sequence[int]]) -> Watched:
        """The tokens of N candidates to Q prompts."""
        owners = [n for n, indices in enumerate(token_indices) for _ in indices]
        steps = [t for indices in token_indices for t in indices]
        of_query = _tokens_of_queries(token_indices, len(prompts.mask))
        queries = [query for query, tokens in of_query.items() for _ in range(tokens.start, tokens.stop)]

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=prompts.mask.device)

        return cls(tensor(owners), tensor(steps), tensor(queries), of_query)

    def positions(self, prompts: PromptBatch) -> Tensor:
        """[R] position ids: an answer's positions continue its prompt's."""
        return prompts.mask.sum(dim=1)[self.queries] + self.steps


def measuring(
    llava: Any,
    prompts: PromptBatch,
    watched: Watched,
    settings: AttentionSettings,
    add: Callable[[Tensor, Tensor, Tensor], None],
) -> Callable[[Tensor, Tensor, Tensor | None], None]:
    """A function from q of the tokens, k of the patches and sinks, as a layer's hooks give them, to a call of ``add``."""
    patch_positions = positions(prompts.mask).gather(1, patch_indices(prompts)[1])
    places = TokenPlaces(watched.of_query, watched.queries, watched.positions(prompts), patch_positions)

    def measure(q: Tensor, k: Tensor, sinks: Tensor | None) -> None:
        add(watched.owners, watched.queries, attention_to_patches(llava, q, k, sinks, places, settings.heads))

    return measure


def norm_weights(llava: Any, settings: AttentionSettings) -> dict[int, Tensor]:
    """Weights [D] of the RMS norms before the attention of the layers that count."""
    return {layer: llava.get_model().layers[layer].input_layernorm.weight for layer in settings.layers}


def patch_indices(prompts: PromptBatch) -> tuple[Tensor, Tensor]:
    """Row [Q, 1] and column [Q, P] of the image patches in the prompts."""
    columns = prompts.image_start[:, None] + torch.arange(prompts.n_patches, device=prompts.mask.device)
    return torch.arange(len(columns), device=columns.device)[:, None], columns


def contributions(token_indices: Sequence[Sequence[int]], layers: Sequence[int], device: torch.device) -> Tensor:
    """[N] tokens times layers that were added up for each candidate, counting at least 1 token."""
    counts = [max(len(indices), 1) * len(layers) for indices in token_indices]
    return torch.tensor(counts, dtype=torch.float, device=device)


def _indices(prompts: PromptBatch, candidates: Candidates, watched: Watched, one_row: bool) -> _Indices:
    """Indices of the patches and of the watched tokens."""
    patches, owners, steps = patch_indices(prompts), watched.owners, watched.steps
    if not one_row:
        return _Indices(patches, (owners, steps), passes=2)
    rows = pack(prompts.mask, candidates.mask)
    return _Indices(patches, (rows.row[owners, 0], rows.column[owners, steps]), passes=1)


def _tokens_of_queries(token_indices: Sequence[Sequence[int]], queries: int) -> dict[int, slice]:
    """Which of the R watched tokens, in the order of candidates, answer each query. Queries without any are left out."""
    each = len(token_indices) // queries
    counts = [sum(map(len, token_indices[query * each : (query + 1) * each])) for query in range(queries)]
    return {query: slice(sum(counts[:query]), sum(counts[: query + 1])) for query in range(queries) if counts[query]}
