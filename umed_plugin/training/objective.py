"""The objective of Abnormal-Aware Rewarding as pure functions: ``E[L_CLIP + c1 r - c2 L_VF + c3 entropy]`` and KL.

PPO (arXiv 1707.06347) has all of these terms. Its KL is part of the token rewards (see `umed_plugin.training.advantages`).
GRPO (arXiv 2402.03300) has no value network, and its KL is a term of the loss. PPO averages over tokens, as TRL 0.9 and
LLaVA-RLHF do. GRPO averages over the tokens of an answer, then over answers.

Departures from the paper: a sampled reward has no gradient of its own, so ``c1`` acts through the advantage. GRPO is not in the
paper.

Shapes: N answers, T tokens; masks are 1 on tokens and 0 on padding behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from umed_plugin.training.advantages import masked_mean

LossTerms = dict[str, Tensor]


@dataclass(frozen=True)
class ObjectiveSettings:
    """Coefficients of the objective; the flags of the same names describe them. GRPO does not use the two of the value loss."""

    clip_range: float
    entropy_coef: float = 0.0
    value_coef: float = 0.0
    value_clip_range: float = 0.0


@dataclass(frozen=True)
class PolicyTensors:
    """What the policy's terms compare, [N, T] each.

    Attributes:
        log_probs: under the policy, with gradient.
        old_log_probs: under the policy that sampled.
        reference_log_probs: under the reference policy; None leaves the KL out.
        entropy: of the policy; with gradient if there is an entropy bonus.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    reference_log_probs: Tensor | None
    entropy: Tensor


@dataclass(frozen=True)
class ValueTensors:
    """What the value loss compares, [N, T] each.

    Attributes:
        values: of the value network, with gradient.
        old_values: of the value network when the answers were sampled.
        returns: what it learns to predict.
    """

    values: Tensor
    old_values: Tensor
    returns: Tensor


def clipped_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Per-token PPO loss ``-min(ratio * A, clip(ratio, 1 - e, 1 + e) * A)`` (arXiv 1707.06347, eq. 7).

    Args:
        log_probs: [N, T] under the policy, with gradient.
        old_log_probs: [N, T] under the policy that sampled.
        advantages: [N, T].
        clip_range: e.

    Returns:
        [N, T] losses, not masked.
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.min(ratio * advantages, clipped * advantages)


def clipped_value_loss(value: ValueTensors, clip_range: float) -> Tensor:
    """Per-token value loss ``max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2) / 2``.

    Args:
        value: V, V_old and R.
        clip_range: e, in the unit of the rewards.

    Returns:
        [N, T] losses >= 0, not masked.
    """
    clipped = torch.max(torch.min(value.values, value.old_values + clip_range), value.old_values - clip_range)
    return torch.max((value.values - value.returns).square(), (clipped - value.returns).square()) / 2


def kl_to_reference(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """[N, T] per-token estimate >= 0 of KL(policy || reference), ``exp(d) - d - 1`` with d = log p_ref - log p (k3)."""
    difference = reference_log_probs - log_probs
    return difference.exp() - difference - 1


def mean_over_answers(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each answer, then over the answers: a scalar. Every answer has the same weight."""
    return ((values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def grpo_objective(
    policy: PolicyTensors, advantages: Tensor, mask: Tensor, settings: ObjectiveSettings, kl_coef: float
) -> tuple[Tensor, LossTerms]:
    """GRPO's loss to minimise, ``L_policy - c3 entropy + kl_coef KL``, and its terms for the log.

    Args:
        policy: log-probabilities and entropy.
        advantages: [N, T], an answer's advantage at each of its tokens.
        mask: [N, T].
        settings: coefficients.
        kl_coef: weight of the KL term.

    Returns:
        A scalar loss, and detached scalars ``policy_loss``, ``entropy``, ``clip_fraction`` and, with a reference, ``kl`` (k3).
    """
    mask = mask.to(policy.log_probs.dtype)
    policy_loss = mean_over_answers(
        clipped_policy_loss(policy.log_probs, policy.old_log_probs, advantages, settings.clip_range), mask
    )
    entropy = mean_over_answers(policy.entropy, mask)
    loss = policy_loss - settings.entropy_coef * entropy
    outside = ((policy.log_probs - policy.old_log_probs).exp() - 1).abs() > settings.clip_range
    clip_fraction = mean_over_answers(outside.to(mask.dtype), mask)
    terms = {"policy_loss": policy_loss, "entropy": entropy, "clip_fraction": clip_fraction}
    if policy.reference_log_probs is not None:
        terms["kl"] = mean_over_answers(kl_to_reference(policy.log_probs, policy.reference_log_probs), mask)
        loss = loss + kl_coef * terms["kl"]
    return loss, {name: term.detach() for name, term in terms.items()}


def ppo_objective(
    policy: PolicyTensors, value: ValueTensors, advantages: Tensor, mask: Tensor, settings: ObjectiveSettings
) -> tuple[Tensor, LossTerms]:
    """PPO's loss to minimise, ``L_policy + c2 L_value - c3 entropy``, and its terms for the log.

    Args:
        policy: log-probabilities and entropy. The reference is for the log only: PPO's KL is in the advantages.
        value: values and returns.
        advantages: [N, T], whitened.
        mask: [N, T].
        settings: coefficients.

    Returns:
        A scalar loss, and detached scalars ``policy_loss``, ``value_loss``, ``entropy``, ``clip_fraction`` (tokens where the
        clipped loss is the larger one), ``value_clip_fraction`` and, with a reference, ``kl`` (k3).
    """
    unclipped = -(policy.log_probs - policy.old_log_probs).exp() * advantages
    policy_losses = clipped_policy_loss(policy.log_probs, policy.old_log_probs, advantages, settings.clip_range)
    value_losses = clipped_value_loss(value, settings.value_clip_range)
    unclipped_value = (value.values - value.returns).square() / 2
    terms = {
        "policy_loss": masked_mean(policy_losses, mask),
        "value_loss": masked_mean(value_losses, mask),
        "entropy": masked_mean(policy.entropy, mask),
        "clip_fraction": masked_mean((policy_losses > unclipped).float(), mask),
        "value_clip_fraction": masked_mean((value_losses > unclipped_value).float(), mask),
    }
    loss = terms["policy_loss"] + settings.value_coef * terms["value_loss"] - settings.entropy_coef * terms["entropy"]
    if policy.reference_log_probs is not None:
        terms["kl"] = masked_mean(kl_to_reference(policy.log_probs, policy.reference_log_probs), mask)
    return loss, {name: term.detach() for name, term in terms.items()}
