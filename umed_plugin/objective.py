"""The objective of Abnormal-Aware Rewarding as pure functions: ``E[L_CLIP + c1 r - c2 L_VF + c3 entropy]`` and KL.

Here with group-relative advantages (GRPO, arXiv 2402.03300) in place of a value network. A sampled reward has no gradient of
its own, so ``c1`` scales the advantage. Shapes: Q queries, K candidates, N = Q*K rows, T answer tokens; masks are 1 on tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ObjectiveSettings:
    """Coefficients of the objective; the flags of the same names say what they do."""

    clip_range: float
    kl_coef: float
    entropy_coef: float


def group_advantages(rewards: Tensor, reward_coef: float = 1.0) -> Tensor:
    """Advantages of the candidates within their query: ``c1 * (r - mean) / std``.

    Args:
        rewards: [Q, K].
        reward_coef: c1 of the paper.

    Returns:
        [Q, K]; 0 for a group whose rewards are all equal: it carries no signal.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    spread = centred.square().mean(dim=1, keepdim=True).sqrt()
    return reward_coef * torch.where(spread > 1e-6, centred / (spread + 1e-4), torch.zeros_like(centred))


def clipped_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Per-token PPO loss ``-min(ratio * A, clip(ratio, 1 - e, 1 + e) * A)`` (arXiv 1707.06347, eq. 7).

    Args:
        log_probs: [N, T] under the policy, with gradient.
        old_log_probs: [N, T] under the policy that sampled.
        advantages: [N].
        clip_range: e.

    Returns:
        [N, T] losses, not masked.
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.min(ratio * advantages[:, None], clipped * advantages[:, None])


def kl_to_reference(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """[N, T] per-token estimate >= 0 of KL(policy || reference), ``exp(d) - d - 1`` with d = log p_ref - log p (k3)."""
    difference = reference_log_probs - log_probs
    return difference.exp() - difference - 1


def mean_over_answers(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each answer, then over the answers: a scalar. Every answer weighs the same."""
    return ((values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def policy_objective(
    log_probs: Tensor,
    old_log_probs: Tensor,
    reference_log_probs: Tensor | None,
    entropy: Tensor,
    advantages: Tensor,
    mask: Tensor,
    settings: ObjectiveSettings,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise, and its terms for the log.

    Args:
        log_probs: [N, T] under the policy, with gradient.
        old_log_probs: [N, T] at sampling.
        reference_log_probs: [N, T] under the reference policy; ``None`` leaves the KL term out.
        entropy: [N, T]; with gradient when an entropy bonus is asked for.
        advantages: [N].
        mask: [N, T].
        settings: coefficients.

    Returns:
        A scalar loss, and detached scalars ``policy_loss``, ``entropy``, ``clip_fraction`` and, with a reference, ``kl``.
    """
    mask = mask.to(log_probs.dtype)
    policy_loss = mean_over_answers(
        clipped_policy_loss(log_probs, old_log_probs, advantages, settings.clip_range), mask
    )
    entropy = mean_over_answers(entropy, mask)
    loss = policy_loss - settings.entropy_coef * entropy
    outside = ((log_probs - old_log_probs).exp() - 1).abs() > settings.clip_range
    clip_fraction = mean_over_answers(outside.to(mask.dtype), mask)
    terms = {"policy_loss": policy_loss, "entropy": entropy, "clip_fraction": clip_fraction}
    if reference_log_probs is not None:
        terms["kl"] = mean_over_answers(kl_to_reference(log_probs, reference_log_probs), mask)
        loss = loss + settings.kl_coef * terms["kl"]
    return loss, {name: value.detach() for name, value in terms.items()}
