"""The objective of Abnormal-Aware Rewarding as pure functions: ``E[L_CLIP + c1 r - c2 L_VF + c3 entropy]`` and KL.

PPO (arXiv 1707.06347) has all of these terms. Its KL is part of the token rewards (see `umed_plugin.training.advantages`).
GRPO (arXiv 2402.03300) has no value network, and its KL is a term of the loss. PPO averages over tokens, as TRL 0.9 and
LLaVA-RLHF do. GRPO averages over the tokens of an answer, then over answers. Both averages run over all micro-batches and
processes of an optimizer step. TRL 0.9 averages within a micro-batch: a token then weighs more in a short one.

Departures from the paper: a sampled reward has no gradient of its own, so ``c1`` acts through the advantage. GRPO is not in the
paper.

Shapes: N answers, T tokens; masks are 1 on tokens and 0 on padding behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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


def loss_weights(mask: Tensor, *, by_answer: bool) -> Tensor:
    """[N, T] what each token weighs in the loss, before `grpo_objective` or `ppo_objective` divides it by the ``step_weight``.

    Args:
        mask: [N, T] 1 at tokens that are learnt from.
        by_answer: every answer weighs 1, shared equally by its tokens (grpo). Otherwise every token weighs 1 (ppo).

    Example:
        >>> loss_weights(torch.tensor([[1, 1, 0], [1, 0, 0]]), by_answer=True).tolist()
        [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]
    """
    weights = mask.to(torch.float32)
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=1) if by_answer else weights


def _mean_by(mask: Tensor, step_weight: float | None, by_answer: bool) -> Callable[[Tensor], Tensor]:
    """A function that takes the weighted sum of [N, T] values: over a whole optimizer step, its mean is the weighted mean."""
    weights = loss_weights(mask, by_answer=by_answer)
    total = weights.sum().clamp(min=1) if step_weight is None else max(step_weight, 1e-6)
    return lambda values: (values * (weights / total)).sum()


def mean_over_answers(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each answer, then over the answers that have any: a scalar. Every answer has the same weight."""
    return _mean_by(mask, None, by_answer=True)(values)


def grpo_objective(
    policy: PolicyTensors,
    advantages: Tensor,
    mask: Tensor,
    settings: ObjectiveSettings,
    kl_coef: float,
    step_weight: float | None = None,
) -> tuple[Tensor, LossTerms]:
    """GRPO's loss to minimise, ``L_policy - c3 entropy + kl_coef KL``, and its terms for the log.

    Args:
        policy: log-probabilities and entropy.
        advantages: [N, T], an answer's advantage at each of its tokens.
        mask: [N, T] 1 at tokens that are learnt from.
        settings: coefficients.
        kl_coef: weight of the KL term.
        step_weight: number of answers that are learnt from in an average micro-batch of this optimizer step, over all ranks. The
            mean loss of all micro-batches and ranks is then the mean over all answers of the step. None: this batch alone.

    Returns:
        A scalar loss, and detached scalars ``policy_loss``, ``entropy``, ``clip_fraction`` and, with a reference, ``kl`` (k3).
    """
    mean = _mean_by(mask, step_weight, by_answer=True)
    policy_loss = mean(clipped_policy_loss(policy.log_probs, policy.old_log_probs, advantages, settings.clip_range))
    entropy = mean(policy.entropy)
    loss = policy_loss - settings.entropy_coef * entropy
    outside = ((policy.log_probs - policy.old_log_probs).exp() - 1).abs() > settings.clip_range
    clip_fraction = mean(outside.float())
    terms = {"policy_loss": policy_loss, "entropy": entropy, "clip_fraction": clip_fraction}
    if policy.reference_log_probs is not None:
        terms["kl"] = mean(kl_to_reference(policy.log_probs, policy.reference_log_probs))
        loss = loss + kl_coef * terms["kl"]
    return loss, {name: term.detach() for name, term in terms.items()}


def ppo_objective(
    policy: PolicyTensors,
    value: ValueTensors,
    advantages: Tensor,
    mask: Tensor,
    settings: ObjectiveSettings,
    step_weight: float | None = None,
) -> tuple[Tensor, LossTerms]:
    """PPO's loss to minimise, ``L_policy + c2 L_value - c3 entropy``, and its terms for the log.

    Args:
        policy: log-probabilities and entropy. The reference is for the log only: PPO's KL is in the advantages.
        value: values and returns.
        advantages: [N, T], whitened.
        mask: [N, T] 1 at tokens that are learnt from.
        settings: coefficients.
        step_weight: as in `grpo_objective`, in tokens.

    Returns:
        A scalar loss, and detached scalars ``policy_loss``, ``value_loss``, ``entropy``, ``clip_fraction`` (tokens where the
        clipped loss is the larger one), ``value_clip_fraction`` and, with a reference, ``kl`` (k3).
    """
    mean = _mean_by(mask, step_weight, by_answer=False)
    unclipped = -(policy.log_probs - policy.old_log_probs).exp() * advantages
    policy_losses = clipped_policy_loss(policy.log_probs, policy.old_log_probs, advantages, settings.clip_range)
    value_losses = clipped_value_loss(value, settings.value_clip_range)
    unclipped_value = (value.values - value.returns).square() / 2
    terms = {
        "policy_loss": mean(policy_losses),
        "value_loss": mean(value_losses),
        "entropy": mean(policy.entropy),
        "clip_fraction": mean((policy_losses > unclipped).float()),
        "value_clip_fraction": mean((value_losses > unclipped_value).float()),
    }
    loss = terms["policy_loss"] + settings.value_coef * terms["value_loss"] - settings.entropy_coef * terms["entropy"]
    if policy.reference_log_probs is not None:
        terms["kl"] = mean(kl_to_reference(policy.log_probs, policy.reference_log_probs))
    return loss, {name: term.detach() for name, term in terms.items()}
