"""Attention of packed rows without a mask over the whole row: the prompt once, and each answer over [prompt, itself].

A packed row (`umed_plugin.model.packing`) is a prompt and its K answers. A dense mask over it computes (L + K*T)^2 scores, and
flash attention takes no such mask. Here a layer's attention is split in two calls:

1. the prompts' tokens among themselves, causally, once per query;
2. the answers' tokens over the keys of their prompt and of their own answer.

That is the split of PrefixGrouper (arXiv 2506.05433). Flash attention makes both calls with variable lengths. SDPA and eager
attention pad them. The first call is then plain causal, and only the second has a mask.

`describe_rows` describes the rows in an integer tensor, which takes the place of the attention mask. So it reaches the layers on
every version of transformers, also when gradient checkpointing recomputes them. `umed_plugin.patches.split_attention` lets the
layers of Llama and Mistral read it; `attends_split` asks whether they do.

Shapes: R rows, K answers each, N = R*K, S columns, P longest prompt, T longest answer, h query heads, g key heads, d head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from umed_plugin.errors import UmedError

MARK = "reads_row_descriptions"  # an attribute of a forward method that does


def attends_split(llava: Any) -> bool:
    """Whether the model's layers read `describe_rows`. Another library may have replaced their forward method since."""
    first = next(iter(getattr(llava.get_model(), "layers", ())), None)
    return hasattr(getattr(type(getattr(first, "self_attn", None)), "forward", None), MARK)


@dataclass(frozen=True)
class Spans:
    """Where the tokens of packed rows stand, as indices into the R*S columns of all rows; padding repeats the last token.

    Attributes:
        prompts: [R, P] and how many of them are tokens, [R].
        answers: [N, T] and how many of them are tokens, [N].
    """

    prompts: Tensor
    prompt_lengths: Tensor
    answers: Tensor
    answer_lengths: Tensor

    @classmethod
    def of(cls, description: Tensor) -> Spans:
        """Read a description. Every row has a prompt and the same number of answers, each without gaps."""
        segments = description[:, 0, 0]
        rows, columns = segments.shape
        each = int(segments.max())
        numbers = torch.arange(each + 1, device=segments.device)
        held = segments[:, :, None] == numbers  # [R, S, K + 1]
        lengths, first = held.sum(dim=1), held.int().argmax(dim=1)
        first = first + columns * torch.arange(rows, device=segments.device)[:, None]
        answers = lengths[:, 1:].flatten()
        return cls(
            _indices(first[:, 0], lengths[:, 0]),
            lengths[:, 0],
            _indices(first[:, 1:].flatten(), answers),
            answers,
        )

    @cached_property
    def prompt_kept(self) -> Tensor:
        """Bool [R, P]: a token, not padding."""
        return _kept(self.prompts, self.prompt_lengths)

    @cached_property
    def answer_kept(self) -> Tensor:
        """Bool [N, T]: a token, not padding."""
        return _kept(self.answers, self.answer_lengths)

    @cached_property
    def key_kept(self) -> Tensor:
        """Bool [N, P+T]: which keys behind `keys_of_answers` are tokens."""
        each = len(self.answers) // len(self.prompts)
        return torch.cat([self.prompt_kept.repeat_interleave(each, dim=0), self.answer_kept], dim=1)

    @cached_property
    def outputs(self) -> Tensor:
        """Where the outputs of both calls belong, prompts first, without padding."""
        return torch.cat([self.prompts[self.prompt_kept], self.answers[self.answer_kept]])

    @cached_property
    def flat_prompts(self) -> Tensor:
        """The prompts' columns without padding."""
        return self.prompts[self.prompt_kept]

    @cached_property
    def flat_answers(self) -> Tensor:
        """The answers' columns without padding."""
        return self.answers[self.answer_kept]

    @cached_property
    def flat_keys(self) -> Tensor:
        """Indices into the flattened `keys_of_answers`, without padding."""
        return self.key_kept.flatten().nonzero().flatten()

    @cached_property
    def starts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Running sums of lengths (int32, from 0) of the prompts, of the answers, and of the answers' keys."""
        return _starts(self.prompt_lengths), _starts(self.answer_lengths), _starts(self.key_kept.sum(dim=1))

    def prompt_mask(self, window: int | None) -> Tensor | None:
        """Bool [P, P] of what prompt tokens see; None: causal."""
        if window is None:
            return None
        steps = torch.arange(self.prompts.shape[1], device=self.prompts.device)
        distance = steps[:, None] - steps
        return (distance >= 0) & (distance < window)

    def answer_mask(self, window: int | None) -> Tensor:
        """Bool [N, 1, T, P+T] of what answer tokens see: their prompt, and their own answer up to themselves."""
        steps = torch.arange(self.answers.shape[1], device=self.answers.device)
        before = torch.arange(self.prompts.shape[1], device=self.answers.device)
        each = len(self.answers) // len(self.prompts)
        lengths = self.prompt_lengths.repeat_interleave(each)[:, None, None]
        distance = torch.cat(
            [
                lengths + steps[:, None] - before,  # [N, T, P]
                (steps[:, None] - steps).expand(len(self.answers), -1, -1),
            ],
            dim=2,
        )
        # Padding repeats an answer's last token, so it must see what that one sees, or a window would leave it nothing.
        visible = self.key_kept[:, None] & (distance >= 0)
        if window is not None:
            visible &= distance < window
            visible |= ~self.answer_kept[:, :, None]
        return visible[:, None]


def _indices(first: Tensor, lengths: Tensor) -> Tensor:
    steps = torch.arange(int(lengths.max()), device=first.device)
    return first[:, None] + torch.minimum(steps, lengths[:, None] - 1)


def _kept(indices: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(indices.shape[1], device=indices.device) < lengths[:, None]


def _starts(lengths: Tensor) -> Tensor:
    return functional.pad(lengths.cumsum(dim=0), (1, 0)).to(torch.int32)


# Spans of the descriptions in use. They are computed once per pass, because each time makes the CPU wait for the accelerator. The
# address survives the detached copies of reentrant checkpointing. While the first tensor lives, no other one has its address.
_SPANS: dict[int, tuple[weakref.ref[Tensor], Spans]] = {}


def describe_rows(segments: Tensor, positions: Tensor) -> Tensor:
    """[R, 1, 2, S] int64: segments and positions [R, S] of packed rows, in the shape of a 4-D attention mask."""
    description = torch.stack([segments, positions], dim=1)[:, None].contiguous()
    address = description.data_ptr()
    _SPANS[address] = weakref.ref(description, lambda _: _SPANS.pop(address, None)), Spans.of(description)
    return description


def is_description(mask: Any) -> bool:
    """Whether an attention mask is a `describe_rows`; real masks are of ones and zeros in two dimensions, or not integers."""
    return mask is not None and mask.dim() == 4 and mask.dtype == torch.int64


def spans_of(description: Tensor) -> Spans:
    """The spans of a description, also of a copy."""
    alive, spans = _SPANS.get(description.data_ptr(), (lambda: None, None))
    first = alive()
    if spans is not None and first is not None and first.shape == description.shape:
        return spans
    return Spans.of(description)


@dataclass(frozen=True)
class Kernel:
    """Which attention computes the calls.

    Attributes:
        name: ``eager``, ``sdpa`` or ``flash``.
        window: number of positions that a token reaches back, including its own; None: all.
        half: dtype for flash attention, which takes no float32.
    """

    name: str
    window: int | None = None
    half: torch.dtype | None = None


def attend_rows(q: Tensor, k: Tensor, v: Tensor, description: Tensor, kernel: Kernel) -> Tensor:
    """Attention of packed rows.

    Args:
        q: [R, h, S, d] rotated queries.
        k: [R, g, S, d] rotated keys.
        v: [R, g, S, d] values.
        description: from `describe_rows`.
        kernel: how to compute it.

    Returns:
        [R, S, h, d]; 0 at padding.
    """
    rows, heads, columns, size = q.shape
    spans = spans_of(description)
    q, k, v = (x.transpose(1, 2).reshape(rows * columns, -1, size) for x in (q, k, v))
    found = (_by_lengths if kernel.name == "flash" else _padded)(q, k, v, spans, kernel)
    output = found.new_zeros(rows * columns, heads, size).index_copy(0, spans.outputs, found)
    return output.view(rows, columns, heads, size)


def keys_of_answers(x: Tensor, spans: Spans) -> Tensor:
    """[N, P+T, g, d]: keys or values of the answers' prompts, and behind them their own, from [R*S, g, d].

    The prompt's are expanded, not indexed, so that the K gradients are summed in a fixed order.
    """
    each = len(spans.answers) // len(spans.prompts)
    prompts = x[spans.prompts][:, None].expand(-1, each, -1, -1, -1).flatten(0, 1)
    return torch.cat([prompts, x[spans.answers]], dim=1)


def _padded(q: Tensor, k: Tensor, v: Tensor, spans: Spans, kernel: Kernel) -> Tensor:
    """The tokens' outputs [tokens, h, d] from two padded calls."""

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    def prompts(x: Tensor) -> Tensor:
        return heads_first(x[spans.prompts])

    # Prompts are moved to the left: then padding stands behind all that a token may see, and a causal mask is enough.
    first = attend(prompts(q), prompts(k), prompts(v), spans.prompt_mask(kernel.window), kernel.name)
    keys, values = (heads_first(keys_of_answers(x, spans)) for x in (k, v))
    second = attend(heads_first(q[spans.answers]), keys, values, spans.answer_mask(kernel.window), kernel.name)
    return torch.cat([heads_first(first)[spans.prompt_kept], heads_first(second)[spans.answer_kept]])


def _by_lengths(q: Tensor, k: Tensor, v: Tensor, spans: Spans, kernel: Kernel) -> Tensor:
    """The tokens' outputs [tokens, h, d] from two calls of variable length."""
    dtype, half = q.dtype, kernel.half or q.dtype
    q, k, v = (x.to(half) for x in (q, k, v))
    prompt_starts, answer_starts, key_starts = spans.starts
    longest, longest_answer = spans.prompts.shape[1], spans.answers.shape[1]
    call = flash_function()
    # Flash attention aligns a causal mask to the end of the keys: an answer's last token sees its last key.
    causal: dict[str, Any] = {"causal": True}
    if kernel.window is not None:
        causal["window_size"] = (kernel.window - 1, 0)
    first = call(*(x[spans.flat_prompts] for x in (q, k, v)), prompt_starts, prompt_starts, longest, longest, **causal)
    keys, values = (keys_of_answers(x, spans).flatten(0, 1)[spans.flat_keys] for x in (k, v))
    second = call(
        q[spans.flat_answers],
        keys,
        values,
        answer_starts,
        key_starts,
        longest_answer,
        longest + longest_answer,
        **causal,
    )
    return torch.cat([first, second]).to(dtype)


def flash_function() -> Callable[..., Tensor]:
    """``flash_attn_varlen_func`` of flash-attn 2.1 or later; before, a causal mask was aligned to the first key."""
    from flash_attn import __version__, flash_attn_varlen_func

    if tuple(int(part) for part in __version__.split(".")[:2]) < (2, 1):
        raise UmedError(f"flash-attn {__version__} aligns causal masks in another way: install 2.1 or later")
    return flash_attn_varlen_func


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """Attention of a batch, without copies of keys and values for the query heads that share them.

    Args:
        q: [B, h, n, d].
        k: [B, g, m, d]; h is a multiple of g, and adjacent query heads share a key head.
        v: [B, g, m, d].
        mask: what is seen, bool or added to the scores; [B, 1, n, m], or fewer dimensions. None: causal, with n = m.
        name: ``eager``, or another for torch's SDPA.

    Returns:
        [B, h, n, d].
    """
    batch, heads, steps, size = q.shape
    shared = heads // k.shape[1]
    if mask is None and name != "eager":
        # Heads of a causal call cannot be folded into rows. A prompt has its keys copied once, not for each answer.
        k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v)) if shared > 1 else (k, v)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    if mask is None:
        mask = torch.ones(steps, steps, dtype=torch.bool, device=q.device).tril()
    elif mask.is_floating_point() and mask.dtype != q.dtype:
        # The mask has the dtype of the embeddings. Queries are in another under autocast, and over a base of 4 bits. Clamped in
        # float32, which has both dtypes' lowest numbers: rounded, the mask's would be -inf.
        mask = mask.float().clamp(min=torch.finfo(q.dtype).min).to(q.dtype)
    if shared > 1:
        q = q.reshape(batch, k.shape[1], shared * steps, size)
        mask = mask.expand(*mask.shape[:-2], steps, mask.shape[-1])
        mask = mask.repeat(*[1] * (mask.dim() - 2), shared, 1)
    if name == "eager":
        output = _eager(q, k, v, mask)
    else:
        # The memory-efficient kernel of torch 2.1 is wrong for a mask and queries that are not contiguous.
        output = functional.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous(), mask)
    return output.reshape(batch, heads, steps, size)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As in transformers: scores in the weights' precision, their softmax in float32."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v
