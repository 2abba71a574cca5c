"""The attention of tokens on the image patches, from q and k of a layer; and which patches are attention sinks.

`umed_plugin.model.attention` takes q and k from a pass, and says what the attention is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from umed_plugin.errors import UmedError


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
