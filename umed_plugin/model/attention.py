"""Attention of chosen answer tokens on the image patches, without ``output_attentions``.

Vision relevance (the reward is in ``rewards.vision_relevance``) asks how much of the attention that a token pays to the image
falls on the lesion. Only the rows of q for the tokens and the rows of k for the patches matter, so hooks on ``q_proj`` and
``k_proj`` keep just these; this works the same under eager, SDPA and flash attention, where no weights are returned.

For a token n, a layer l and a head h, with P all image patches and w_p in [0, 1] the part of patch p that the true boxes cover:

    s(n, l, h) = sum_p w_p * softmax_{p in P}(q_n . k_p / sqrt(d))

and the value of a candidate is the mean of s over its tokens, the chosen layers and the chosen heads. The paper's transcription
in public has the lesion's patches in the softmax's denominator too, which makes the value constant; all image patches is the
reading that carries information.

Raw attention has sinks: patches that draw attention whatever is asked and carry little of the image. They are known by the hidden
state x [D] with which a patch enters the layer, not by the attention that they get, which a lesion shall get too (Kang et al.,
"See what you are told", arXiv 2503.03321, eq. 3, with tau = 20):

    max_d |x_d| / sqrt(mean_d x_d^2) >= tau

Where sinks are masked they are left out of P, in numerator and denominator. Departure: the maximum runs over all D values and not
over two known ones of Llama 2. The ratio is at most sqrt(D), so a small model has none at 20. Patches stand before the question,
so which ones are sinks does not depend on it or on the answer.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from umed_plugin.errors import UmedError
from umed_plugin.grounding.terms import Terms, find_terms
from umed_plugin.model.forward import (
    AnswerPass,
    Candidates,
    PromptBatch,
    answer_pass,
    base_llava,
    positions,
    query_of_row,
    takes_one_row,
)
from umed_plugin.model.packing import pack

_SPACE_MARK = "\u2581"  # of sentencepiece
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # what sentencepiece makes of a character that it does not know


@dataclass(frozen=True)
class _Places:
    """Where the patches of Q queries and R asked tokens stand in what ``q_proj`` and ``k_proj`` put out.

    Attributes:
        patches: row [Q, 1] and column [Q, P] of each image patch, in the first pass through the layers.
        tokens: row [R] and column [R] of each asked token, in the last pass.
        passes: 1 when prompts and answers stand in the same rows; 2 when the prompts go first.
    """

    patches: tuple[Tensor, Tensor]
    tokens: tuple[Tensor, Tensor]
    passes: int


@dataclass
class _Capture:
    """Keeps from each layer k [Q, P, kv_heads*d] of the patches and q [R, heads*d] of the tokens, until both are there.

    Then ``measure`` gets q and k in float32 and the sinks, bool [Q, P], and they are dropped: in a single pass the rows of one
    layer at most are held. ``norms`` holds the weight [D] of the RMS norm before each layer's attention.
    """

    places: _Places
    measure: Callable[[Tensor, Tensor, Tensor | None], None]
    norms: dict[int, Tensor]
    sink_ratio: float
    keys: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    sinks: dict[int, Tensor] = field(default_factory=dict)

    def keep_queries(self, layer: int, states: Tensor, output: Tensor) -> None:
        """Llama and Mistral call ``q_proj`` before ``k_proj``."""
        if self.places.passes == 1 or layer in self.keys:
            self.queries[layer] = output[self.places.tokens].float()

    def keep_keys(self, layer: int, states: Tensor, output: Tensor) -> None:
        if layer not in self.keys:
            self.keys[layer] = output[self.places.patches]
            if self.sink_ratio:
                self.sinks[layer] = attention_sinks(states[self.places.patches], self.norms[layer], self.sink_ratio)
        if layer in self.queries:
            self.measure(self.queries.pop(layer), self.keys.pop(layer).float(), self.sinks.pop(layer, None))


@contextmanager
def _hooks(llava: Any, layers: Sequence[int], capture: _Capture) -> Iterator[None]:
    """Attach the capture to ``q_proj`` and ``k_proj`` of the layers."""
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
    keep: Callable[[int, Tensor, Tensor], None], layer: int, _module: Any, inputs: tuple[Tensor], output: Tensor
) -> None:
    keep(layer, inputs[0], output)


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
    token_rows: Sequence[Sequence[int]],
    patch_weights: Tensor,
    layers: Sequence[int],
    *,
    heads: Sequence[int] | None = None,
    sink_ratio: float = 0.0,
    packed: bool = False,
) -> tuple[Tensor, AnswerPass]:
    """Share of each candidate's attention on the image that falls on the lesion, and what else the same pass gives.

    Args:
        model: a LLaVA model with Llama-style attention, in evaluation mode.
        prompts: Q prompts.
        candidates: N answers.
        token_rows: for each candidate the indices 0..T-1 of the answer tokens that name the abnormality; empty gives 0.
            The attention is that of the token itself, at the position where it is the input.
        patch_weights: [Q, P] part of each patch that the true boxes cover, 0-1, row-major.
        layers: layer indices.
        heads: head indices; None takes all.
        sink_ratio: masks attention sinks (:func:`attention_sinks`); 0 masks none.
        packed: as in :func:`umed_plugin.model.forward.answer_pass`.

    Returns:
        [N] values in 0..1, float32; and the pass's logits and hidden states, so that no second pass is needed.
    """
    value = torch.zeros(len(candidates.mask), device=candidates.token_ids.device)
    weights = patch_weights.float().to(value.device)

    def add(owners: Tensor, queries: Tensor, attention: Tensor) -> None:
        value.index_add_(0, owners, (attention * weights[queries][:, None]).sum(dim=-1).mean(dim=-1))

    passed = watched_pass(model, prompts, candidates, token_rows, layers, add, heads, sink_ratio, packed)
    return value / parts_added(token_rows, layers, value.device), passed


def watched_pass(
    model: Any,
    prompts: PromptBatch,
    candidates: Candidates,
    token_rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    add: Callable[[Tensor, Tensor, Tensor], None],
    heads: Sequence[int] | None = None,
    sink_ratio: float = 0.0,
    packed: bool = False,
) -> AnswerPass:
    """One pass in which ``add`` gets, of every layer, the R asked tokens' candidates, queries and attention [R, heads, P].

    The other arguments are those of :func:`attention_on_lesion`.
    """
    llava = base_llava(model)
    device = candidates.token_ids.device
    owners = torch.tensor([n for n, rows in enumerate(token_rows) for _ in rows], dtype=torch.long, device=device)
    if len(owners) == 0:
        return answer_pass(model, prompts, candidates, packed=packed)
    steps = torch.tensor([t for rows in token_rows for t in rows], dtype=torch.long, device=device)
    queries = query_of_row(prompts, candidates)[owners]
    places = _places(prompts, candidates, owners, steps, one_row=takes_one_row(llava, packed))
    prompt_length = prompts.mask.sum(dim=1)  # an answer's positions go on where its prompt's end
    token_positions = prompt_length[queries] + steps
    patch_positions = positions(prompts.mask).gather(1, places.patches[1])
    asked = _tokens_of_queries(token_rows, len(prompts.mask))

    def measure(q: Tensor, k: Tensor, sinks: Tensor | None) -> None:
        with torch.autocast(q.device.type, enabled=False):  # it would round the scores
            scores = _scores_of_patches(llava, q, k, asked, token_positions, patch_positions)
        if heads is not None:
            scores = scores[:, list(heads)]
        if sinks is not None:
            masked = sinks & ~sinks.all(dim=1, keepdim=True)  # nothing would be left to look at
            scores = scores.masked_fill(masked[queries][:, None], float("-inf"))
        add(owners, queries, scores.softmax(dim=-1))

    norms = {layer: llava.get_model().layers[layer].input_layernorm.weight for layer in layers}
    with _hooks(llava, layers, _Capture(places, measure, norms, sink_ratio)):
        return answer_pass(model, prompts, candidates, packed=packed)


def parts_added(token_rows: Sequence[Sequence[int]], layers: Sequence[int], device: torch.device) -> Tensor:
    """[N] tokens times layers that were added up for each candidate, at least 1 token."""
    return torch.tensor([max(len(rows), 1) * len(layers) for rows in token_rows], dtype=torch.float, device=device)


def _places(prompts: PromptBatch, candidates: Candidates, owners: Tensor, steps: Tensor, one_row: bool) -> _Places:
    """Places of the patches and of the answer tokens ``steps`` of the candidates ``owners``."""
    columns = prompts.image_start[:, None] + torch.arange(prompts.n_patches, device=owners.device)
    patches = torch.arange(len(columns), device=owners.device)[:, None], columns
    if not one_row:
        return _Places(patches, (owners, steps), passes=2)
    rows = pack(prompts.mask, candidates.mask)
    return _Places(patches, (rows.row[owners, 0], rows.column[owners, steps]), passes=1)


def _tokens_of_queries(token_rows: Sequence[Sequence[int]], queries: int) -> dict[int, slice]:
    """Which of R asked tokens answer each query; they stand candidate by candidate. Queries without any are left out."""
    each = len(token_rows) // queries
    counts = [sum(map(len, token_rows[query * each : (query + 1) * each])) for query in range(queries)]
    return {query: slice(sum(counts[:query]), sum(counts[: query + 1])) for query in range(queries) if counts[query]}


def _scores_of_patches(
    llava: Any, queries: Tensor, keys: Tensor, asked: dict[int, slice], token_positions: Tensor, patch_positions: Tensor
) -> Tensor:
    """[R, heads, P] values of q.k/sqrt(d) for the image patches, of R tokens that answer the queries that ``asked`` says."""
    config = llava.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    inv_freq = rope_inverse_frequencies(config, queries.shape[-1] // heads, queries.device)
    q = rotate(queries.unflatten(-1, (heads, -1)), token_positions, inv_freq)  # [R, heads, d]
    k = rotate(keys.unflatten(-1, (kv_heads, -1)), patch_positions, inv_freq)  # [Q, P, kv_heads, d]
    q = q.unflatten(1, (kv_heads, -1)) / q.shape[-1] ** 0.5  # heads that share a key stand side by side
    scores = q.new_empty(len(q), heads, k.shape[1])
    for query, tokens in asked.items():  # by query, or its keys would be copied for each of its tokens
        scores[tokens] = torch.einsum("rgsd,pgd->rgsp", q[tokens], k[query]).flatten(1, 2)
    return scores


def rope_inverse_frequencies(config: Any, head_size: int, device: torch.device) -> Tensor:
    """[d/2] inverse frequencies of the model's rotary embedding, ``theta^(-2i/d)``, in float32.

    The model's own buffer is not used: a cast of the model to bfloat16 rounds it, which turns far tokens by half a radian.

    Raises:
        UmedError: the model has no rotary embedding, or a scaled one, whose angles are not position times frequency.
    """
    scaling = getattr(config, "rope_scaling", None)
    if scaling and scaling.get("rope_type", scaling.get("type")) != "default":
        raise UmedError(
            f"vision relevance does not know the rotary scaling {scaling!r} in config.json. Leave vision_relevance out of "
            "--umed_rewards, or use a checkpoint without rope_scaling."
        )
    if not hasattr(config, "rope_theta"):
        raise UmedError(
            f"vision relevance needs rotary position embeddings (Llama, Mistral), and the config of this {config.model_type} "
            "model has no rope_theta. Leave vision_relevance out of --umed_rewards."
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


def name_token_rows(tokenizer: Any, token_ids: Sequence[int], terms: Terms, classes: Collection[str]) -> list[int]:
    """Indices of the answer tokens that name one of ``classes``, also where a name spans several word pieces.

    Args:
        tokenizer: a sentencepiece or byte-level BPE tokenizer.
        token_ids: one answer.
        terms: class -> plain name and synonyms, of all classes: the longer name of another class is not this one's.
        classes: those that count.
    """
    text, ends = spelled_out(tokenizer, token_ids)
    spans = [(start, end) for start, end, cls in find_terms(text, terms) if cls in classes]
    return tokens_within(ends, spans)


def spelled_out(tokenizer: Any, token_ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text that the tokens of one answer stand for, special ones included, and where in it each token ends."""
    text, ends = "", []
    characters = codecs.getincrementaldecoder("utf-8")("replace")  # pieces may end inside a character
    for piece in _piece_bytes(tokenizer, token_ids):
        text += characters.decode(piece)
        ends.append(len(text))
    return text, ends


def tokens_within(ends: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Indices of the tokens that share a character with one of the spans ``[start, end)`` of their text."""
    starts = [0, *ends[:-1]]
    return [t for t, (a, b) in enumerate(zip(starts, ends)) if any(a < end and b > start for start, end in spans)]


def _piece_bytes(tokenizer: Any, token_ids: Sequence[int]) -> list[bytes]:
    """The bytes of the text that each token stands for, with the space before a word (``decode`` drops it at the start)."""
    pieces = tokenizer.convert_ids_to_tokens(list(token_ids))
    if tokenizer.convert_tokens_to_ids(_SPACE_MARK) not in (None, tokenizer.unk_token_id):
        found = [_BYTE_PIECE.fullmatch(piece) for piece in pieces]
        return [
            bytes.fromhex(byte[1]) if byte else piece.replace(_SPACE_MARK, " ").encode()
            for byte, piece in zip(found, pieces)
        ]
    byte_of = byte_level_alphabet()
    return [
        bytes(byte_of[c] for c in piece) if all(c in byte_of for c in piece) else piece.encode() for piece in pieces
    ]


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte, as byte-level BPE writes bytes: those that can be printed as themselves, the others from 256 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {**{chr(byte): byte for byte in printed}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


def lesion_name_rows(tokenizer: Any, candidates: Candidates, records: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """For each of N answers the indices of the tokens that name a lesion of its record; one record for each answer."""
    return [
        name_token_rows(tokenizer, ids, record["terms"], set(record["objects"]["ref"]))
        for ids, record in zip(candidates.answers(), records)
    ]
