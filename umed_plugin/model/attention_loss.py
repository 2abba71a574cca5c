"""Attention on the lesion as a loss of stage 1: the differentiable form of vision relevance.

Vision relevance is a reward in stage 2, so it acts through which answers are sampled. Here the gradient reaches the attention
itself. For each token n of the reference answer that names a lesion, s_n in 0..1 is the mean share s(n, l, h) of its attention on
the image that falls on the lesion, over the chosen layers and heads (`umed_plugin.model.attention`). The loss of a record is

    mean_n (1 - s_n)^2

as in A3Tune (arXiv 2505.18503). That of a batch is the sum over its records, divided by their number. Records without boxes, and
those whose answer names no lesion, add 0 but are in that number. So the loss of an optimizer step does not depend on how the
step is split into micro-batches and ranks. Departures from A3Tune: the share is taken in each head and then averaged, not taken
of the heads' mean map. All heads count unless some are chosen.

How the gradient gets there: hooks see q and k of each layer, and compute the layer's shares of the tokens. These cannot simply be
added to the loss, because gradient checkpointing throws them away and makes them anew in the backward pass. So the hook ties the
shares to k, whose value stays as it is. When the backward pass comes to k, it also sends d loss / d share into the shares. By
then the whole forward pass is over, and s_n is known. That works alike with and without checkpointing, and under every attention.

Shapes: B records in a batch, of which C contribute, R watched tokens in them, P image patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from umed_plugin.model.attention import AttentionSettings, hooks
from umed_plugin.model.forward import IMAGE_TOKEN_INDEX
from umed_plugin.model.patch_attention import TokenPlaces, attention_sinks, attention_to_patches


@dataclass(frozen=True)
class LesionTokens:
    """Where the tokens that name a lesion, and the patches, stand in a batch, in the columns that the layers see.

    Attributes:
        rows: [C] row in the batch of each record that contributes.
        patches: [C, P] columns of its patches.
        covers: [C, P] part of each patch that the true boxes cover, 0-1.
        owners: [R] which of the C records each token belongs to, in ascending order.
        columns: [R] of the tokens.
        records: B.
    """

    rows: Tensor
    patches: Tensor
    covers: Tensor
    owners: Tensor
    columns: Tensor
    records: int

    @classmethod
    def of(
        cls, config: Any, input_ids: Tensor, attention_mask: Tensor, tokens: Sequence[Tensor], covers: Tensor
    ) -> LesionTokens:
        """Follow what LLaVA's forward pass does to a batch: it drops padding, puts the patches in, cuts off, and pads anew.

        Args:
            config: of the model.
            input_ids: [B, L] with ``IMAGE_TOKEN_INDEX`` where an image goes.
            attention_mask: [B, L] 1 at tokens.
            tokens: B tensors of indices of the tokens that name a lesion, in the uncut text. Those from L on were cut off.
            covers: [B, P].
        """
        device, added = input_ids.device, covers.shape[1] - 1
        ids, kept = input_ids.cpu(), attention_mask.bool().cpu()
        places, images = kept.cumsum(dim=1) - 1, (ids == IMAGE_TOKEN_INDEX) & kept
        longest = getattr(config, "tokenizer_model_max_length", None) or ids.shape[1] + added
        lengths = (kept.sum(dim=1) + added * images.sum(dim=1)).clamp(max=longest)
        on_left = getattr(config, "tokenizer_padding_side", "right") == "left"
        shifts = lengths.max() - lengths if on_left else torch.zeros_like(lengths)
        rows, starts, columns = [], [], []
        for row, watched in enumerate(tokens):
            found = images[row].nonzero().flatten()
            watched = watched.cpu()[watched.cpu() < ids.shape[1]]  # LLaVA's collator cuts long texts off
            watched = watched[kept[row, watched]]
            if len(found) != 1 or not len(watched) or not covers[row].any():
                continue
            start = places[row, found[0]]
            seen = places[row, watched] + added * (watched > found[0])
            seen = seen[seen < lengths[row]]
            if len(seen) and start + added < lengths[row]:
                rows.append(row)
                starts.append(start + shifts[row])
                columns.append(seen + shifts[row])
        none = torch.zeros(0, dtype=torch.long)
        owners = [torch.full_like(seen, owner) for owner, seen in enumerate(columns)]
        first = torch.stack(starts) if starts else none
        picked = torch.tensor(rows, dtype=torch.long)
        return cls(
            picked.to(device),
            (first[:, None] + torch.arange(added + 1)).to(device),
            covers.cpu()[picked].float().to(device),
            torch.cat([none, *owners]).to(device),
            torch.cat([none, *columns]).to(device),
            len(tokens),
        )

    def places(self) -> TokenPlaces:
        """For `attention_to_patches`; positions are columns, because rotary attention asks for distances alone."""
        counts = self.owners.bincount(minlength=len(self.rows)).cumsum(dim=0).tolist()
        of_record = {owner: slice(first, end) for owner, (first, end) in enumerate(zip([0, *counts], counts))}
        return TokenPlaces(of_record, self.owners, self.columns, self.patches)


@dataclass
class _Batch:
    """One batch between its forward and its backward pass.

    Attributes:
        lesions: where to look.
        shares: layer -> [R] mean share over the chosen heads.
        derivative: [R] of the attention loss by a layer's share, once the forward pass is over.
        gradient: [R] the same with the scale of the backward pass, once that has begun.
    """

    llava: Any
    settings: AttentionSettings
    lesions: LesionTokens
    shares: dict[int, Tensor] = field(default_factory=dict)
    derivative: Tensor | None = None
    gradient: Tensor | None = None
    _queries: dict[int, Tensor] = field(default_factory=dict)
    _sinks: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._places = self.lesions.places()

    def keep_states(self, layer: int, _module: Any, inputs: tuple[Tensor], _output: Tensor) -> None:
        """Find the sinks in what enters the layer's norm. Its weight is not asked for: ZeRO-3 has it elsewhere."""
        states = inputs[0].detach()[self.lesions.rows[:, None], self.lesions.patches].float()
        scaled = states / states.square().mean(dim=-1, keepdim=True).sqrt()
        self._sinks[layer] = attention_sinks(scaled, torch.ones_like(scaled[0, 0]), self.settings.sink_ratio)

    def keep_queries(self, layer: int, states: Tensor, output: Tensor) -> None:
        """Keep q of the tokens. Llama and Mistral call ``q_proj`` before ``k_proj``."""
        self._queries[layer] = output[self.lesions.rows[self.lesions.owners], self.lesions.columns]

    def keep_keys(self, layer: int, states: Tensor, output: Tensor) -> Tensor:
        """Measure the layer, and tie its shares to k. Checkpointing comes here once more, in the backward pass."""
        q, k = self._queries.pop(layer).float(), output[self.lesions.rows[:, None], self.lesions.patches].float()
        attention = attention_to_patches(
            self.llava, q, k, self._sinks.pop(layer, None), self._places, self.settings.heads
        )
        shares = (attention * self.lesions.covers[self.lesions.owners][:, None]).sum(dim=-1).mean(dim=-1)
        self.shares[layer] = shares.detach()
        tied: Tensor = _Tied.apply(output, shares, self)
        return tied


class _Tied(torch.autograd.Function):
    """k as it is; in the backward pass the shares get their gradient when k gets its own."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, shares: Tensor, batch: _Batch) -> Tensor:
        ctx.batch = batch
        return keys

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return gradient, ctx.batch.gradient, None


class _Added(torch.autograd.Function):
    """The sum of both losses. The backward pass begins here, and its scale (accumulation, fp16) is the shares' too."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor, batch: _Batch) -> Tensor:
        ctx.batch = batch
        return loss + value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.batch.gradient = ctx.batch.derivative * gradient
        return gradient, None, None


@dataclass(frozen=True)
class Measured:
    """What a batch had: numbers of records in it and of those that contribute, and sums of loss and share over these."""

    records: int
    contributing: int
    loss: float
    share: float


class AttentionLoss:
    """Adds the attention loss to a model's own.

    Args:
        llava: a LLaVA model with Llama-style attention, without wrapper.
        settings: layers, heads and sinks.
        weight: of the loss.
    """

    def __init__(self, llava: Any, settings: AttentionSettings, weight: float) -> None:
        self._llava, self._settings, self._weight = llava, settings, weight
        self._batch: _Batch | None = None

    @contextmanager
    def watching(self, lesions: LesionTokens) -> Iterator[None]:
        """Watch the forward and the backward pass of one batch, both within this context."""
        self._batch = _Batch(self._llava, self._settings, lesions)
        with ExitStack() as attached:
            if len(lesions.rows):
                attached.enter_context(hooks(self._llava, self._settings.layers, self._batch))
                for layer in self._settings.layers if self._settings.sink_ratio else ():
                    attached.enter_context(self._hook_on_norm(layer, self._batch))
            try:
                yield
            finally:
                self._batch = None

    @contextmanager
    def _hook_on_norm(self, layer: int, batch: _Batch) -> Iterator[None]:
        norm = self._llava.get_model().layers[layer].input_layernorm
        handle = norm.register_forward_hook(lambda *call: batch.keep_states(layer, *call))
        try:
            yield
        finally:
            handle.remove()

    def added_to(self, loss: Tensor) -> tuple[Tensor, Measured]:
        """The loss of the forward pass that was watched, a scalar, plus the weighted attention loss; and what was measured."""
        batch = self._batch
        if batch is None:
            raise RuntimeError("the pass has to be made within `watching`")
        lesions = batch.lesions
        contributing = len(lesions.rows)
        if not contributing:
            return loss, Measured(lesions.records, 0, 0.0, 0.0)
        share = torch.stack([batch.shares[layer] for layer in self._settings.layers]).mean(dim=0)
        tokens = lesions.owners.bincount(minlength=contributing)[lesions.owners]  # of the record of each token
        total = ((1 - share).square() / tokens).sum()
        scale = self._weight / lesions.records
        batch.derivative = -2 * scale * (1 - share) / tokens / len(self._settings.layers)
        added: Tensor = _Added.apply(loss, (scale * total).to(loss), batch)
        return added, Measured(lesions.records, contributing, total.item(), (share / tokens).sum().item())
