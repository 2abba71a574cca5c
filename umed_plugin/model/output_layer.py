"""What a forward pass takes from the output layer: logits of some positions alone, or log-probabilities in place of logits.

Logits are as wide as the vocabulary. So a pass computes only those that are needed, and can turn them into log-probabilities part
by part. Shapes as in `umed_plugin.model.forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from umed_plugin.errors import UmedError


@contextmanager
def output_layer_sees(llava: Any, select: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Give the output layer only ``select`` of the last hidden states: the logits of other positions are never computed.

    Yields:
        A list to which each pass appends the selected states, with their graph.

    Raises:
        UmedError: a pass did not call the output layer.
    """
    selected: list[Tensor] = []

    def hook(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        selected.append(select(inputs[0]))
        return (selected[-1], *inputs[1:])

    handle = llava.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield selected
    finally:
        handle.remove()
    if not selected:
        raise UmedError(
            "the model computed its logits without calling its output layer, so their positions could not be selected. If "
            "config.json has pretraining_tp above 1, set it to 1: the results are the same."
        )


@dataclass(frozen=True)
class Scoring:
    """What a pass makes of its logits, part by part, so that the logits of all tokens are never in memory together.

    Attributes:
        temperature: of sampling; the logits are divided by it (0 counts as 1).
        rows: tokens whose logits exist at once, in the backward pass too; 0: all.
        entropy_gradient: keep the graph of the entropy, for an entropy bonus.
        hidden: keep the hidden states, for a value head.
    """

    temperature: float = 1.0
    rows: int = 0
    entropy_gradient: bool = False
    hidden: bool = False


@contextmanager
def output_layer_scores(llava: Any, token_ids: Tensor, scoring: Scoring | None) -> Iterator[None]:
    """Let the output layer return [N, T, 2] log-probabilities of ``token_ids`` [N, T] and entropies, in place of logits.

    This happens inside the layer, because DDP and ZeRO-3 expect one call of it in each pass, on all ranks.
    """
    if scoring is None:
        yield
        return
    layer = llava.get_output_embeddings()
    stock, own = layer.forward, vars(layer).get("forward")

    def forward(hidden: Tensor) -> Tensor:
        states, targets = hidden.flatten(0, 1), token_ids.flatten()
        rows = scoring.rows or len(states)
        parts = list(zip(states.split(rows), targets.split(rows)))
        # A part's logits are made anew in the backward pass, unless it is the only one.
        again = len(parts) > 1 and torch.is_grad_enabled()
        found = [
            _recomputed(stock, *part, scoring) if again else scored(stock(part[0]), part[1], scoring) for part in parts
        ]
        return torch.cat(found).unflatten(0, token_ids.shape)

    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def _recomputed(layer: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, scoring: Scoring) -> Tensor:
    def part(states: Tensor) -> Tensor:
        return scored(layer(states), targets, scoring)

    return checkpoint(part, states, use_reentrant=False, preserve_rng_state=False)


def scored(logits: Tensor, token_ids: Tensor, scoring: Scoring) -> Tensor:
    """[..., 2] float32 log-probabilities of the tokens [...] and entropies of the distributions, from logits [..., V]."""
    logits = logits.float()
    if scoring.temperature not in (0, 1):
        logits = logits / scoring.temperature
    log_probs = logits.log_softmax(dim=-1)
    chosen = log_probs.gather(-1, token_ids[..., None]).squeeze(-1)
    with torch.set_grad_enabled(scoring.entropy_gradient and torch.is_grad_enabled()):
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    return torch.stack([chosen, entropy], dim=-1)
