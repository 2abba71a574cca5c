"""The KL from a teacher's answers to a model's: what `--umed_keep` adds to the loss of stage 1.

At each position whose next token is supervised, p is the teacher's distribution over the vocabulary and q the model's, both at
temperature T. The KL of a batch is the mean over these positions of

    KL(p || q) = sum_v p(v) (log p(v) - log q(v)),   in nats, 0 or more

It is the forward KL: the model is penalised where it no longer says what the teacher says. As in ClinKD (arXiv 2502.05928) it
is not multiplied by T^2. ClinKD's published code hands its labels over unshifted; here position t is compared where it predicts
t + 1.

Bounded memory: a pass keeps only the last hidden states of these positions, R of width H. Logits are made from them in parts, and
made anew in the backward pass, so that R x V logits never exist at once.

Shapes: B records, L positions of text and patches, R positions that predict a supervised token, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from umed_plugin.errors import UmedError

IGNORED = -100  # llava.constants.IGNORE_INDEX: the label of a position that is not supervised


@dataclass(frozen=True)
class AnswerStates:
    """What a pass says about the supervised tokens, in the order of the batch.

    Attributes:
        states: [R, H] last hidden states, after the final norm, of the positions before these tokens.
        labels: [R] the tokens.
        records: [R] index in 0..B-1 of the record of each.
    """

    states: Tensor
    labels: Tensor
    records: Tensor


@contextmanager
def answer_states(llava: Any, *, without_logits: bool = False) -> Iterator[list[AnswerStates]]:
    """Keep the states of each pass of a LLaVA model that gets images and labels, and change nothing of it.

    Args:
        llava: the model without wrapper.
        without_logits: compute the logits of one position only, and no loss: for a teacher's pass.

    Yields:
        A list to which each pass appends its states, with their graph.

    Raises:
        UmedError: a pass did not call the output layer.
    """
    found: list[AnswerStates] = []
    merged: list[Tensor] = []
    stock = llava.prepare_inputs_labels_for_multimodal

    def prepare(*inputs: Any, **keywords: Any) -> Any:
        prepared = stock(*inputs, **keywords)
        merged.append(prepared[-1])  # labels [B, L], with the patches and the padding that LLaVA puts in
        return (*prepared[:-1], None) if without_logits else prepared

    def before_output(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden, labels = inputs[0], merged.pop()
        supervised = labels[:, 1:] != IGNORED
        rows = supervised.nonzero()[:, 0]
        found.append(AnswerStates(hidden[:, :-1][supervised], labels[:, 1:][supervised], rows))
        return (hidden[:1, :1], *inputs[1:]) if without_logits else None

    handle = llava.get_output_embeddings().register_forward_pre_hook(before_output)
    llava.prepare_inputs_labels_for_multimodal = prepare
    try:
        yield found
    finally:
        del llava.prepare_inputs_labels_for_multimodal
        handle.remove()
    if not found:
        raise UmedError(
            "the model computed its logits without calling its output layer, so --umed_keep and --umed_replay cannot see its "
            "answers. If config.json has pretraining_tp above 1, set it to 1: the results are the same."
        )


@dataclass(frozen=True)
class Head:
    """An output layer: logits [R, V] = states [R, H] @ weight.T + bias, computed in the dtype of the weight [V, H].

    Attributes:
        weight, bias: of the layer, which may not be its own: those of the start of a training.
        layer: the layer itself, where its weight is packed (4 bits); such a one is never trained.
    """

    weight: Tensor
    bias: Tensor | None = None
    layer: Any = None

    def __call__(self, states: Tensor) -> Tensor:
        """Float32 logits [R, V]."""
        if self.layer is not None:
            return self.layer(states).float()
        return torch.nn.functional.linear(states.to(self.weight.dtype), self.weight, self.bias).float()


def head_of(llava: Any) -> Head:
    """The output layer of a LLaVA model, with its graph."""
    layer = llava.get_output_embeddings()
    packed = tuple(layer.weight.shape) != (layer.out_features, layer.in_features)
    return Head(layer.weight, getattr(layer, "bias", None), layer if packed else None)


def answer_kl(
    now: Tensor, head: Head, teacher: Tensor, teacher_head: Head, *, temperature: float = 1.0, rows: int = 0
) -> Tensor:
    """Mean KL(teacher || now) over R positions, a scalar in nats with its graph to ``now`` and ``head``; 0 if R is 0.

    Args:
        now: [R, H] states of the model that learns.
        head: its output layer.
        teacher: [R, H'] states of the teacher; they get no gradient.
        teacher_head: its output layer, over the same vocabulary.
        temperature: both logits are divided by it.
        rows: positions whose logits exist at once; 0: all.

    Example:
        >>> import torch
        >>> head = Head(torch.eye(3))
        >>> states = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> answer_kl(states, head, states, head).item()
        0.0
        >>> round(answer_kl(states.flip(0), head, states, head).item(), 4)
        0.9137
    """
    if not len(now):
        return now.sum() * 0
    parts = list(zip(now.split(rows or len(now)), teacher.detach().split(rows or len(now))))

    def kl(states: Tensor, reference: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = (teacher_head(reference) / temperature).log_softmax(dim=-1)
        log_q = (head(states) / temperature).log_softmax(dim=-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    if len(parts) == 1 or not torch.is_grad_enabled():
        sums = [kl(*part) for part in parts]
    else:
        sums = [checkpoint(kl, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(sums).sum() / len(now)


@torch.no_grad()
def record_losses(found: AnswerStates, head: Head, records: int, rows: int = 0) -> Tensor:
    """Mean cross-entropy of each record's supervised tokens, float32 [B] in nats; NaN for a record without any."""
    sums, counts = (found.states.new_zeros(records, dtype=torch.float32) for _ in range(2))
    size = rows or max(len(found.states), 1)
    for states, labels, owners in zip(found.states.split(size), found.labels.split(size), found.records.split(size)):
        losses = torch.nn.functional.cross_entropy(head(states.detach()), labels, reduction="none")
        sums.index_add_(0, owners, losses)
        counts.index_add_(0, owners, torch.ones_like(losses))
    return sums / counts
