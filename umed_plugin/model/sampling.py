"""Sampling K answers to each of Q prompts, with the prompt computed once.

It is written out here instead of calling ``model.generate`` for a second reason: with ``inputs_embeds``, ``generate`` of
transformers 4.36 returns an artificial BOS as first token, which shifts every log-probability by one. Shapes and masks are those
of :mod:`umed_plugin.model.forward`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from umed_plugin.model.forward import Candidates, PromptBatch, prefill, unwrapped
from umed_plugin.model.kv_cache import RoomyCache
from umed_plugin.model.packing import PADDING, Columns, block_mask, sliding_window

_LOOK_EVERY = 16


@contextmanager
def merged_adapter(model: Any) -> Iterator[None]:
    """Add the LoRA adapter to the weights below it, and put the very same weights back at the end.

    A token costs one matrix product a layer instead of three. Weights of fewer than 32 bits stay as they are: rounded to them, an
    update of a few steps would be lost, and the answers would be another policy's than the one that learns from them. While it
    lasts, what is merged is in memory twice.

    Args:
        model: with an adapter or without; what wraps it does not matter.
    """
    # Whoever has put an adapter into a model has imported it; to others it need not be installed.
    lora: Any = sys.modules.get("peft.tuners.lora")
    kept: list[tuple[Any, Tensor]] = []
    try:
        for layer in model.modules() if lora else ():
            adapted = isinstance(layer, lora.LoraLayer) and not layer.disable_adapters
            if adapted and layer.weight.dtype == torch.float32:
                kept.append((layer, layer.weight.data))
                layer.weight.data = layer.weight.data.clone()
                layer.merge()
        yield
    finally:
        for layer, weight in kept:
            layer.unmerge()
            layer.weight.data = weight


@torch.no_grad()
def generate(
    model: Any,
    prompts: PromptBatch,
    *,
    num_candidates: int = 1,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    eos_token_id: int,
    packed: bool = False,
    look_every: int | None = None,
) -> Candidates:
    """Sample ``num_candidates`` answers to each prompt.

    Args:
        model: a LLaVA model in evaluation mode (no dropout, no gradient checkpointing).
        prompts: Q prompts, each computed once.
        num_candidates: K.
        max_new_tokens: T at most; an answer that reaches it has no EOS.
        temperature: 0 is greedy; 1 samples from the model's own distribution.
        top_p: nucleus; 1 keeps the whole distribution.
        eos_token_id: ends an answer.
        packed: the K answers of a query grow side by side in one row and read one cache of its prompt, for a model without
            :func:`umed_plugin.model.packing.packing_fault`; otherwise each has a copy.
        look_every: tokens from one look at which answers have ended to the next; until then they are computed on in vain. None:
            every token on a CPU, and every 16 elsewhere, as a look makes the processor wait for the accelerator.

    Returns:
        Candidates for N = Q*K rows: row q*K + k is candidate k of query q.
    """
    cache = RoomyCache((num_candidates if packed else 1) * max_new_tokens)
    with merged_adapter(model):
        first = prefill(model, prompts, cache)
        return continue_prompts(
            model,
            cache,
            first.logits[:, -1],
            prompts.mask,
            num_candidates=num_candidates,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            eos_token_id=eos_token_id,
            packed=packed,
            look_every=look_every,
        )


@torch.no_grad()
def continue_prompts(
    model: Any,
    cache: RoomyCache,
    logits: Tensor,
    prompt_mask: Tensor,
    *,
    num_candidates: int = 1,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    eos_token_id: int,
    packed: bool = False,
    look_every: int | None = None,
) -> Candidates:
    """Sample answers to Q prompts that are in a cache already; what `generate` does behind its first pass.

    Args:
        model: see `generate`, also for what is not named here.
        cache: with the prompts' keys and values, and room for what is sampled; it is used up.
        logits: [Q, V] from which each prompt's first answer token is drawn.
        prompt_mask: [Q, L] of the columns in the cache, 1 for a token; its last column must be 1. Padding may stand anywhere
            before it.
    """
    llava = unwrapped(model)
    device = prompt_mask.device
    look_every = look_every or (1 if device.type == "cpu" else _LOOK_EVERY)
    in_a_row = num_candidates if packed else 1
    answer_rows = torch.arange(len(prompt_mask), device=device).repeat_interleave(num_candidates)
    if not packed:
        cache.take_rows(answer_rows)
    logits = logits[answer_rows]
    token_ids = torch.full((len(answer_rows), max_new_tokens), eos_token_id, device=device)
    answered = torch.zeros_like(token_ids)
    ended = torch.zeros(len(answer_rows), dtype=torch.bool, device=device)
    writing = torch.arange(len(answer_rows), device=device).view(-1, in_a_row)  # the answers of each row; -1: none
    going = writing.flatten()  # the answers that go on
    places = torch.arange(writing.numel(), device=device)  # where each of them stands in the rows
    prompt_length = prompt_mask.sum(dim=1)[answer_rows]
    columns = Columns.of_prompts(prompt_mask).take_rows(answer_rows[::in_a_row])
    for step in range(max_new_tokens):
        tokens = _next_token(logits, temperature, top_p).masked_fill(ended[going], eos_token_id)
        token_ids[going, step], answered[going, step] = tokens, (~ended[going]).long()
        ended[going] |= tokens == eos_token_id
        if step + 1 == max_new_tokens:
            break
        if (step + 1) % look_every == 0:
            writing = torch.where((writing >= 0) & ~ended[writing], writing, -1)
            kept, writing = _close_gaps(writing)
            if len(kept) == 0:
                break
            if len(kept) < len(columns.segments):
                cache.take_rows(kept)
                columns = columns.take_rows(kept)
            places = (writing >= 0).flatten().nonzero().flatten()
            going = writing.flatten()[places]
        there, written = writing >= 0, writing.clamp(min=0)
        new = Columns(
            torch.where(there, written % in_a_row + 1, PADDING), torch.where(there, prompt_length[written] + step, 0)
        )
        columns = columns.then(new)
        embeds = llava.get_input_embeddings()(token_ids[written, step])
        mask = (
            block_mask(new, columns, sliding_window(llava), embeds.dtype)
            if packed
            else (columns.segments != PADDING).long()
        )
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": new.positions}
        logits = model(**inputs, past_key_values=cache, use_cache=True, return_dict=True).logits.flatten(0, 1)[places]
    longest = int(answered.sum(dim=1).max())
    return Candidates(token_ids[:, :longest], answered[:, :longest])


def _close_gaps(writing: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the rows that still hold an answer, and those rows with their answers moved to the front."""
    there = writing >= 0
    kept = there.any(dim=1).nonzero().flatten()
    if len(kept) == 0:
        return kept, writing[kept]
    to_front = (~there[kept]).long().sort(dim=1, stable=True).indices
    return kept, writing[kept].gather(1, to_front)[:, : int(there.sum(dim=1).max())]


def _next_token(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw one token a row from [N, V] logits."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(outside, 0.0))
    return torch.multinomial(probs, num_samples=1).squeeze(-1)
