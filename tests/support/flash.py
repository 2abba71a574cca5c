"""Flash attention on a CPU: plain functions with the signature and the semantics of flash-attn's.

`flash_attn_varlen_func` refuses float32, as flash-attn does. The ``exact`` ones take it, to compare numbers closely.
"""

from __future__ import annotations

from typing import Any

import torch


def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths: Any, **keywords: Any
) -> torch.Tensor:
    """`exact_flash_attn_varlen_func` for the dtypes that flash-attn has."""
    if {x.dtype for x in (q, k, v)} not in ({torch.float16}, {torch.bfloat16}):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return exact_flash_attn_varlen_func(q, k, v, *lengths, **keywords)


def exact_flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    **unused: Any,
) -> torch.Tensor:
    """Attention of sequences behind one another, [tokens, heads, d], as flash-attn 2.1 and later define it.

    A causal mask is aligned to the last key. The window (left, right) is measured on the same diagonal. Heads are grouped.
    """
    assert dropout_p == 0.0 and not unused
    for lengths, tokens, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
        assert lengths.dtype == torch.int32 and int(lengths[0]) == 0 and int(lengths[-1]) == len(tokens)
        assert int(lengths.diff().max()) <= longest and tokens.dim() == 3
    group = q.shape[1] // k.shape[1]
    outputs = []
    for start, end, key_start, key_end in zip(
        cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist(), cu_seqlens_k.tolist()[1:]
    ):
        queries = q[start:end].transpose(0, 1)
        keys, values = (x[key_start:key_end].repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
        scores = queries @ keys.transpose(1, 2) * (softmax_scale or q.shape[-1] ** -0.5)
        n, m = scores.shape[1:]
        distance = torch.arange(n)[:, None] + (m - n) - torch.arange(m)
        hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
        left, right = window_size
        if left >= 0:
            hidden |= distance > left
        if right >= 0:
            hidden |= -distance > right
        outputs.append((scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


def exact_flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, **keywords: Any
) -> torch.Tensor:
    """The same for a batch without padding, [rows, tokens, heads, d]."""
    (rows, queries), keys = q.shape[:2], k.shape[1]
    starts = [torch.arange(rows + 1, dtype=torch.int32) * length for length in (queries, keys)]
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return exact_flash_attn_varlen_func(*flat, *starts, queries, keys, dropout_p, **keywords).unflatten(
        0, (rows, queries)
    )
