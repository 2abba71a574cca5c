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

from umed_plugin.errors import UmedError
from umed_plugin.model.forward import (
    AnswerPass,
    Candidates,
    PromptBatch,
    Scoring,
    answer_pass,
    base_llava,
    positions,
    uses_packed_pass,
)
from umed_plugin.model.packing import pack


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


def attention_sinks(normed: Tensor, norm_weight: Tensor, ratio: float) -> Tensor:
    """Which positions are attention sinks: one value of the hidden state is at least ``ratio`` times its root mean square.

    Args:
        normed: [..., D] hidden states after the layer's RMS norm, as its attention gets them: x / rms(x) * weight.
        norm_weight: [D] weight of that norm.
        ratio: tau, 1 to sqrt(D).

    Returns:
        bool [...].
    """
    weight = norm_weight.float()
    scaled = normed.float() / torch.where(weight == 0, torch.ones_like(weight), weight)
    return scaled.abs().amax(dim=-1) >= ratio


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


@dataclass(frozen=True)
class TokenPlaces:
    """Where R tokens and the patches of Q queries stand. Hooks see q and k before the rotary embedding, which needs positions.

    Attributes:
        of_query: which of the tokens belong to each query, in order; queries without any may be missing.
        queries: [R] the query of each token.
        token_positions: [R].
        patch_positions: [Q, P].
    """

    of_query: dict[int, slice]
    queries: Tensor
    token_positions: Tensor
    patch_positions: Tensor


def attention_to_patches(
    llava: Any, q: Tensor, k: Tensor, sinks: Tensor | None, places: TokenPlaces, heads: Sequence[int] | None
) -> Tensor:
    """[R, heads, P] attention of R tokens on the image patches of their query, which sums to 1 over the patches; float32.

    Args:
        llava: the model that q and k belong to.
        q: [R, heads*d] in float32, before the rotary embedding.
        k: [Q, P, kv_heads*d] likewise.
        sinks: bool [Q, P] patches to leave out, or None. Where all are sinks, none is left out: a softmax needs one.
        places: of tokens and patches.
        heads: indices of those that count; None: all.
    """
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores
        scores = _scores_of_patches(llava, q, k, places)
    if heads is not None:
        scores = scores[:, list(heads)]
    if sinks is not None:
        masked = sinks & ~sinks.all(dim=1, keepdim=True)
        scores = scores.masked_fill(masked[places.queries][:, None], float("-inf"))
    return scores.softmax(dim=-1)


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


def _scores_of_patches(llava: Any, queries: Tensor, keys: Tensor, places: TokenPlaces) -> Tensor:
    """[R, heads, P] values of q.k/sqrt(d) of R tokens at the image patches of their query."""
    config = llava.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    inv_freq = rope_inverse_frequencies(config, queries.shape[-1] // heads, queries.device)
    q = rotate(queries.unflatten(-1, (heads, -1)), places.token_positions, inv_freq)  # [R, heads, d]
    k = rotate(keys.unflatten(-1, (kv_heads, -1)), places.patch_positions, inv_freq)  # [Q, P, kv_heads, d]
    # Grouped-query attention: heads that share a key are adjacent.
    q = q.unflatten(1, (kv_heads, -1)) / q.shape[-1] ** 0.5
    # Query by query; otherwise its keys would be copied for each token.
    scores = [torch.einsum("rgsd,pgd->rgsp", q[tokens], k[query]) for query, tokens in places.of_query.items()]
    return torch.cat(scores).flatten(1, 2)


def rope_inverse_frequencies(config: Any, head_size: int, device: torch.device) -> Tensor:
    """[d/2] inverse frequencies of the model's rotary embedding, ``theta^(-2i/d)``, in float32.

    The model's own buffer is not used: a cast of the model to bfloat16 rounds it, which turns distant tokens by half a radian.

    Raises:
        UmedError: the model has no rotary embedding, or a scaled one, whose angles are not position times frequency.
    """
    scaling = getattr(config, "rope_scaling", None)
    if scaling and scaling.get("rope_type", scaling.get("type")) != "default":
        raise UmedError(
            f"vision relevance does not support the rotary scaling {scaling!r} in config.json. Remove vision_relevance from "
            "--umed_rewards and --umed_attention_loss, or use a checkpoint without rope_scaling."
        )
    if not hasattr(config, "rope_theta"):
        raise UmedError(
            f"vision relevance needs rotary position embeddings (Llama, Mistral), and the config of this {config.model_type} "
            "model has no rope_theta. Remove vision_relevance from --umed_rewards and --umed_attention_loss."
        )
    return config.rope_theta ** (-torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size)


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout of Llama and Mistral (arXiv 2104.09864).

    Args:
        x: [..., heads, d] with the leading axes of ``positions``.
        positions: [...] token positions.
        inv_freq: [d/2].
    """
    angles = positions[..., None].float() * inv_freq
    cos, sin = angles.cos()[..., None, :], angles.sin()[..., None, :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
