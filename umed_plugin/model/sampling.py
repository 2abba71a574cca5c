"""Sample K answers to each of Q prompts; each prompt is computed once.

`generate` is what stage 2, held-out validation and evaluation call. `continue_prompts` is the token loop behind it. The KV cache
of the K candidates is a `umed_plugin.model.kv_cache.PreallocatedCache`:

- packed: one row for each query. Its K answers grow side by side behind one copy of the prompt.
- not packed: one row for each answer. The prompt's keys and values are copied K times.

The loop is written out instead of calling ``model.generate``: with ``inputs_embeds``, ``generate`` of transformers 4.36 returns
an artificial BOS as first token, which shifts every log-probability by one. Shapes and masks are those of
`umed_plugin.model.forward`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from umed_plugin.errors import UmedError
from umed_plugin.model.forward import Candidates, PromptBatch, prefill, unwrapped
from umed_plugin.model.kv_cache import FinishedCache, PreallocatedCache
from umed_plugin.model.packing import PADDING, Columns, block_mask, sliding_window

_CHECK_EVERY = 16
NOT_FINITE = "the logits of an answer's first token are NaN or infinite"


class NotFiniteError(UmedError):
    """The model computes no finite numbers, so that nothing can be drawn, and the likeliest token would be any."""


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are drawn.

    Attributes:
        max_new_tokens: T at most; an answer that reaches it has no EOS.
        eos_token_id: ends an answer.
        temperature: 0 is greedy; 1 samples from the model's own distribution.
        top_p: nucleus sampling; 1 keeps the whole distribution.
        num_candidates: K, answers to each prompt.
        packed: let the K answers of a query share one row and one copy of its prompt. Only for a model without
            `umed_plugin.model.packing.packing_fault`.
        check_every: tokens between two checks for answers that have ended. Until the next check they are computed in vain.
            None: every token on a CPU, every 16 elsewhere, because a check makes the CPU wait for the accelerator.
    """

    max_new_tokens: int
    eos_token_id: int
    temperature: float
    top_p: float = 1.0
    num_candidates: int = 1
    packed: bool = False
    check_every: int | None = None


@dataclass(frozen=True)
class FinishedRows:
    """R packed rows whose answers have all ended.

    Attributes:
        queries: [R] index of the query of each row.
        columns: [R, S] what the KV cache holds. An answer's last token may be missing: nothing was drawn after it.
        cache: their keys and values.
    """

    queries: Tensor
    columns: Columns
    cache: FinishedCache


@contextmanager
def adapter_for_decoding(model: Any) -> Iterator[None]:
    """Make the LoRA adapter cheap for one token at a time; the weights are the very same at the end.

    - **float32 weights**: the adapter is added to them. A token then costs one matrix product per layer instead of three. Inside
      the block, these weights are in memory twice.
    - **bf16 and fp16 weights** stay as they are: rounded to them, an update of a few steps would be lost, and the answers would
      come from another policy than the one that learns. Instead, the adapter is cast to their precision once, not for each token,
      and added within its second product. That takes two bytes for each of its parameters.
    - All others (4 bits, DoRA, several adapters) compute as PEFT does.

    Args:
        model: with or without an adapter, wrapped or not.
    """
    # PEFT is imported if the model has an adapter. Without one, it need not be installed.
    lora: Any = sys.modules.get("peft.tuners.lora")
    undo: list[Callable[[], None]] = []
    try:
        for layer in model.modules() if lora else ():
            if not isinstance(layer, lora.LoraLayer) or layer.disable_adapters:
                continue
            if layer.weight.dtype == torch.float32:
                _merge(layer, undo)
            elif layer.weight.dtype in (torch.bfloat16, torch.float16) and _is_plain_linear(layer):
                _cast_once(layer, undo)
        yield
    finally:
        for restore in undo:
            restore()


def _merge(layer: Any, undo: list[Callable[[], None]]) -> None:
    original = layer.weight.data

    def restore() -> None:
        # Subtracting the adapter leaves rounding errors; the saved tensor does not.
        layer.unmerge()
        layer.weight.data = original

    layer.weight.data = original.clone()
    undo.append(restore)
    layer.merge()


def _is_plain_linear(layer: Any) -> bool:
    """Whether the layer is ``W x + scaling * B A x`` of a single adapter. In PEFT 0.4 it is itself the linear layer."""
    names = _active_adapters(layer)
    special = (getattr(layer, name, {}) for name in ("lora_variant", "use_dora", "lora_bias"))
    return (
        isinstance(getattr(layer, "base_layer", layer), torch.nn.Linear)
        and len(names) == 1
        and not (layer.merged or getattr(layer, "fan_in_fan_out", False))
        and not any(found.get(names[0]) for found in special)
    )


def _active_adapters(layer: Any) -> list[str]:
    active = getattr(layer, "active_adapters", None) or [layer.active_adapter]
    return [name for name in active if name in layer.lora_A]


def _cast_once(layer: Any, undo: list[Callable[[], None]]) -> None:
    (name,), dtype = _active_adapters(layer), layer.weight.dtype
    down = layer.lora_A[name].weight.detach().to(dtype).t()
    up = (layer.lora_B[name].weight.detach() * layer.scaling[name]).to(dtype).t()
    base = getattr(layer, "base_layer", None)

    def forward(x: Tensor) -> Tensor:
        output = torch.nn.functional.linear(x, layer.weight, layer.bias) if base is None else base(x)
        added = torch.addmm(output.flatten(0, -2), x.flatten(0, -2) @ down, up).view_as(output)
        return added.to(x.dtype if base is None else output.dtype)

    own = vars(layer).get("forward")

    def restore() -> None:
        if own is None:
            del layer.forward
        else:
            layer.forward = own

    layer.forward = forward
    undo.append(restore)


@torch.no_grad()
def generate(model: Any, prompts: PromptBatch, settings: SamplingSettings) -> Candidates:
    """Sample K answers to each of Q prompts.

    Args:
        model: a LLaVA model in evaluation mode (no dropout, no gradient checkpointing).
        prompts: Q prompts; each is computed once.
        settings: K among them.

    Returns:
        Candidates for N = Q*K rows: row q*K + k is candidate k of query q.
    """
    cache = empty_cache(settings)
    with adapter_for_decoding(model):
        first = prefill(model, prompts, cache)
        return continue_prompts(model, cache, first.logits[:, -1], prompts.mask, settings)


def empty_cache(settings: SamplingSettings) -> PreallocatedCache:
    """A KV cache with room for the answers in a row."""
    answers_in_a_row = settings.num_candidates if settings.packed else 1
    return PreallocatedCache(answers_in_a_row * settings.max_new_tokens)


@torch.no_grad()
def continue_prompts(
    model: Any,
    cache: PreallocatedCache,
    logits: Tensor,
    prompt_mask: Tensor,
    settings: SamplingSettings,
    finished: list[FinishedRows] | None = None,
) -> Candidates:
    """Sample answers to Q prompts whose keys and values are in the cache already.

    Args:
        model: as in `generate`.
        cache: holds the prompts' keys and values and has room for the answers. It is used up.
        logits: [Q, V] from which each prompt's first answer token is drawn.
        prompt_mask: [Q, L] of the columns in the cache, 1 for a token. The last column must be 1; padding may stand anywhere
            before it.
        settings: K among them.
        finished: if given, all packed rows are appended to it once they have ended, instead of being dropped.

    Returns:
        Candidates as in `generate`.

    Raises:
        NotFiniteError: a logit is NaN or infinite.
    """
    check_finite(logits)
    llava, packed = unwrapped(model), settings.packed
    device = prompt_mask.device
    check_every = settings.check_every or (1 if device.type == "cpu" else _CHECK_EVERY)

    # One row in the cache per query if packed, else one per answer: then each answer gets a copy of its prompt here.
    answers_per_row = settings.num_candidates if packed else 1
    query_of_answer = torch.arange(len(prompt_mask), device=device).repeat_interleave(settings.num_candidates)
    if not packed:
        cache.take_rows(query_of_answer)
    logits = logits[query_of_answer]

    n_answers = len(query_of_answer)
    token_ids = torch.full((n_answers, settings.max_new_tokens), settings.eos_token_id, device=device)
    mask = torch.zeros_like(token_ids)
    ended = torch.zeros(n_answers, dtype=torch.bool, device=device)
    prompt_length = prompt_mask.sum(dim=1)[query_of_answer]
    prompt_columns = Columns.of_prompts(prompt_mask).take_rows(query_of_answer[::answers_per_row])
    slots = _Slots(torch.arange(n_answers, device=device).view(-1, answers_per_row), prompt_columns, finished)
    for step in range(settings.max_new_tokens):
        # Answers that ended since the last check are still in the batch: they draw EOS, and their mask stays 0.
        active = slots.active
        tokens = _next_token(logits, settings).masked_fill(ended[active], settings.eos_token_id)
        token_ids[active, step], mask[active, step] = tokens, (~ended[active]).long()
        ended[active] |= tokens == settings.eos_token_id
        if step + 1 == settings.max_new_tokens:
            break
        if (step + 1) % check_every == 0 and not slots.drop_ended(ended, cache):
            break

        # The model reads the new tokens, one column per slot, and gives the logits of the next ones.
        answers = slots.answers.clamp(min=0)
        new = slots.add_columns(answers % answers_per_row + 1, prompt_length[answers] + step)
        embeds = llava.get_input_embeddings()(token_ids[answers, step])
        attention_mask = (
            block_mask(new, slots.columns, sliding_window(llava), embeds.dtype)
            if packed
            else (slots.columns.segments != PADDING).long()
        )
        inputs = {"inputs_embeds": embeds, "attention_mask": attention_mask, "position_ids": new.positions}
        # The cache is written all the same. With `use_cache`, Mistral on transformers 4 takes a flash model's mask as a 2-D one.
        outputs = model(**inputs, past_key_values=cache, use_cache=not packed, return_dict=True)
        logits = outputs.logits.flatten(0, 1)[slots.active_slots]
    slots.finish(cache)
    longest = int(mask.sum(dim=1).max())
    return Candidates(token_ids[:, :longest], mask[:, :longest])


def check_finite(logits: Tensor) -> None:
    """Refuse the logits of an answer's first token if one is NaN or infinite; minus infinity forbids a token.

    Raises:
        NotFiniteError: one is.
    """
    if not (logits < math.inf).all():
        raise NotFiniteError(NOT_FINITE)


class _Slots:
    """The rows that are still computed. Each row has A slots, and each slot writes one answer.

    Attributes:
        answers: [R, A] index 0..N-1 of the answer that each slot writes; -1 once it has ended.
        columns: [R, S] what the rows hold in the KV cache.
        rows: [R] the numbers that the rows had at first.
        active: indices of the answers that go on.
        active_slots: where each of them stands in the flattened slots.
    """

    def __init__(self, answers: Tensor, columns: Columns, finished: list[FinishedRows] | None) -> None:
        self.answers, self.columns, self._finished = answers, columns, finished
        self.rows = torch.arange(len(answers), device=answers.device)
        self._index_active()

    def _index_active(self) -> None:
        self.active_slots = (self.answers >= 0).flatten().nonzero().flatten()
        self.active = self.answers.flatten()[self.active_slots]

    def drop_ended(self, ended: Tensor, cache: PreallocatedCache) -> bool:
        """Free the slots of ended answers, and drop rows without any other from the KV cache; returns whether any is left."""
        going_on = torch.where((self.answers >= 0) & ~ended[self.answers], self.answers, -1)
        kept_rows, self.answers = _close_gaps(going_on)
        if len(kept_rows) == 0:
            return False
        if len(kept_rows) < len(self.rows):
            self.finish(cache, (going_on < 0).all(dim=1).nonzero().flatten())
            cache.take_rows(kept_rows)
            self.columns, self.rows = self.columns.take_rows(kept_rows), self.rows[kept_rows]
        self._index_active()
        return True

    def finish(self, cache: PreallocatedCache, rows: Tensor | None = None) -> None:
        """Set the rows of an index aside with their keys and values, if they are asked for; None: all rows."""
        if self._finished is not None:
            taken = slice(None) if rows is None else rows
            columns = self.columns.take_rows(taken)
            self._finished.append(FinishedRows(self.rows[taken], columns, cache.finished(rows)))

    def add_columns(self, segments: Tensor, positions: Tensor) -> Columns:
        """Add one column per slot, with segments and positions [R, A], and return the new columns.

        The answers of a row share positions, and their segments keep them apart. A free slot is padding, which no token sees.
        """
        in_use = self.answers >= 0
        new = Columns(torch.where(in_use, segments, PADDING), torch.where(in_use, positions, 0))
        self.columns = self.columns.then(new)
        return new


def _close_gaps(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the rows that still write an answer, and the slots [R, A] of these rows, moved to the front."""
    in_use = slots >= 0
    kept_rows = in_use.any(dim=1).nonzero().flatten()
    if len(kept_rows) == 0:
        return kept_rows, slots[kept_rows]
    to_front = (~in_use[kept_rows]).long().sort(dim=1, stable=True).indices
    return kept_rows, slots[kept_rows].gather(1, to_front)[:, : int(in_use.sum(dim=1).max())]


def _next_token(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Draw one token for each row of [N, V] logits."""
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits.float() / settings.temperature, dim=-1)
    if settings.top_p < 1.0:
        # Keep a token if those before it in the order have not reached top_p yet: the most likely one always stays.
        ordered, order = probs.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= settings.top_p
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(outside, 0.0))
    return torch.multinomial(probs, num_samples=1).squeeze(-1)
