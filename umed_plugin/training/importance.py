"""Truncated importance weights: answers that another program sampled, learnt from under this one's probabilities.

A rollout server computes with other kernels, so it samples from a slightly other distribution than the policy that learns. Each
token's advantage is multiplied by ``min(p_own / p_server, C)``. Truncation bounds what a token can weigh where the two disagree
(TRL 1.x does the same with C = 3). The weight has no gradient, and the KL term is not weighted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

METRICS = (
    "importance_ratio",
    "importance_ratio_max",
    "importance_truncated",
    "server_difference",
    "server_difference_without_adapter",
)


def importance_weights(log_probs: Tensor, sampled_log_probs: Tensor, cap: float) -> Tensor:
    """[N, T] ``min(p_own / p_server, cap)`` of each token, without gradient.

    Args:
        log_probs: [N, T] under the old policy, as this process computes it.
        sampled_log_probs: [N, T] under the server's, which sampled.
        cap: C, at least 1.

    Example:
        >>> own, sampled = torch.tensor([[-1.0, -0.5]]), torch.tensor([[-1.0, -4.5]])
        >>> importance_weights(own, sampled, cap=3.0).tolist()
        [[1.0, 3.0]]
    """
    distance = log_probs.detach().float() - sampled_log_probs
    return distance.clamp(max=math.log(cap)).exp().clamp(max=cap)


def importance_metrics(
    log_probs: Tensor, sampled_log_probs: Tensor, mask: Tensor, cap: float, without_adapter: Tensor | None = None
) -> dict[str, float]:
    """Mean and maximum of the ratio before truncation, share of truncated tokens 0-1, and mean distances in nats.

    Args:
        log_probs, sampled_log_probs, cap: as in `importance_weights`.
        mask: [N, T] 1 for a token.
        without_adapter: [N, T] log-probabilities under the policy with its adapter off; None: the last metric is missing.
    """
    of_tokens = mask.bool()
    distance = (log_probs.detach().float() - sampled_log_probs)[of_tokens]
    if not len(distance):
        return {}
    ratio = distance.exp()
    numbers = [ratio.mean(), ratio.max(), (ratio > cap).float().mean(), distance.abs().mean()]
    if without_adapter is not None:
        numbers.append((without_adapter.float() - sampled_log_probs)[of_tokens].abs().mean())
    return dict(zip(METRICS, torch.stack(numbers).tolist()))
