"""The objective of Abnormal-Aware Rewarding as pure functions: ``E[L_CLIP + c1 r - c2 L_VF + c3 entropy]`` and KL.

PPO (arXiv 1707.06347) has all of these terms. Its KL is part of the token rewards (see `umed_plugin.training.advantages`).
GRPO (arXiv 2402.03300) has no value network, and its KL is a term of the loss. PPO averages over tokens, as TRL 0.9 and
LLaVA-RLHF do. GRPO has three ways to add its tokens up (`token_weights`): over the tokens of an answer, then over answers (GRPO's
own); over all tokens (DAPO); divided by a constant length (Dr. GRPO). All of them run over all micro-batches and processes of an
optimizer step. TRL 0.9 averages within a micro-batch: a token then weighs more in a short one.

Departures from the paper: a sampled reward has no gradient of its own, so ``c1`` acts through the advantage. GRPO is not in the
paper.

Shapes: N answers, T tokens; masks are 1 on tokens and 0 on padding behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LossTerms = dict[str, Tensor]


GRPO, DAPO, DR_GRPO = AGGREGATIONS = ("grpo", "dapo", "dr_grpo")


@dataclass(frozen=True)
class ObjectiveSettings:
    """Coefficients of the objective; the flags of the same names describe them. GRPO does not use the two of the value loss.

    Attributes:
        clip_range: how far the probability ratio may fall below 1.
        clip_range_high: how far it may rise above 1; None: as far as it may fall.
        entropy_coef, value_coef, value_clip_range: as the flags.
        aggregation: how GRPO adds up its tokens, one of `AGGREGATIONS`.
        max_tokens: the constant length that ``dr_grpo`` divides by: the longest answer that may be sampled.
    """

    clip_range: float
    entropy_coef: float = 0.0
    value_coef: float = 0.0
    value_clip_range: float = 0.0
    clip_range_high: float | None = None
    aggregation: str = GRPO
    max_tokens: int = 1

    @property
    def upper(self) -> float:
        """How far the ratio may rise above 1."""
        return self.clip_range if self.clip_range_high is None else self.clip_range_high


@dataclass(frozen=True)
class StepSize:
    """What is learnt from in an average micro-batch of an optimizer step, over all ranks.

    A loss that is divided by it has, as its mean over all micro-batches and ranks, the mean over the whole step. However the step
    is split, the gradient is the same.

    Attributes:
        answers: with at least one token that is learnt from.
        tokens: that are learnt from.
    """

    answers: float
    tokens: float

    @classmethod
    def of(cls, mask: Tensor) -> StepSize:
        """The size of one batch with the mask [N, T], 1 at tokens that are learnt from."""
        lengths = mask.sum(dim=1)
        return cls(float((lengths > 0).sum()), float(lengths.sum()))


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


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
) -> Tensor:
    """Per-token PPO loss ``-min(ratio * A, clip(ratio, 1 - e_low, 1 + e_high) * A)``.

    PPO has one e for both sides (arXiv 1707.06347, eq. 7). DAPO's "clip-higher" has a larger e_high (arXiv 2503.14476, section
    3.1). A token of probability p can rise to (1 + e_high) p before its gradient stops, so unlikely tokens of good answers may
    grow.

    Args:
        log_probs: [N, T] under the policy, with gradient.
        old_log_probs: [N, T] under the policy that sampled.
        advantages: [N, T].
        clip_range: e_low, 0-1.
        clip_range_high: e_high, above 0; None: the same as e_low.

    Returns:
        [N, T] losses, not masked.
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high))
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


def token_weights(mask: Tensor, step: StepSize | None, aggregation: str, max_tokens: int = 1) -> Tensor:
    """[N, T] what each token weighs in the loss: the loss is the sum of weight times value over a batch.

    With n answers of lengths L_i, l_it the loss of a token, and M a constant:

    - ``grpo``: ``1/n sum_i 1/L_i sum_t l_it`` (DeepSeekMath, arXiv 2402.03300). Every answer weighs the same, so a
      token weighs less in a long answer.
    - ``dapo``: ``1/(sum_i L_i) sum_i sum_t l_it`` (arXiv 2503.14476, section 3.3). Every token of the step weighs the same,
      as in PPO.
    - ``dr_grpo``: ``1/(n M) sum_i sum_t l_it`` (arXiv 2503.20783). Every token weighs the same, in every step.

    Answers that are left out of the loss count neither in n nor in the lengths.

    Args:
        mask: [N, T] 1 at tokens that are learnt from.
        step: n and the sum of L_i in an average micro-batch of this optimizer step. None: this batch is the step.
        aggregation: one of the three.
        max_tokens: M, for ``dr_grpo``.

    Example:
        >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> token_weights(mask, None, "dapo").tolist()
        [[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]
        >>> token_weights(mask, None, "dr_grpo", max_tokens=4).tolist()
        [[0.125, 0.125, 0.125], [0.125, 0.0, 0.0]]
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown loss aggregation {aggregation!r}. Allowed: {', '.join(AGGREGATIONS)}.")
    size = StepSize.of(mask) if step is None else step
    weights = mask.to(torch.float32)
    if aggregation == DAPO:
        return weights / max(size.tokens, 1e-6)
    lengths = weights.sum(dim=1, keepdim=True).clamp(min=1) if aggregation == GRPO else max_tokens
    return weights / lengths / max(size.answers, 1e-6)


def mean_over_answers(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each answer, then over the answers that have any: a scalar. Every answer has the same weight."""
    return (values * token_weights(mask, None, GRPO)).sum()


def grpo_objective(
    policy: PolicyTensors,
    advantages: Tensor,
    mask: Tensor,
    settings: ObjectiveSettings,
    kl_coef: float,
    step: StepSize | None = None,
) -> tuple[Tensor, LossTerms]:
    """GRPO's loss to minimise, ``L_policy - c3 entropy + kl_coef KL``, and its terms for the log.

    Args:
        policy: log-probabilities and entropy.
        advantages: [N, T], an answer's advantage at each of its tokens.
        mask: [N, T] 1 at tokens that are learnt from.
        settings: coefficients, and how tokens are added up.
        kl_coef: weight of the KL term.
        step: size of an average micro-batch of this optimizer step. The mean loss of all micro-batches and ranks is then the loss
            of the whole step as one batch. None: this batch is the step.

    Returns:
        A scalar loss, and detached scalars ``policy_loss``, ``entropy``, ``clip_fraction`` (tokens whose ratio is outside the
        range) and, with a reference, ``kl`` (k3). ``policy_loss`` is a part of the loss. The others are means: over answers for
        ``grpo``, else over tokens.
    """
    weights = token_weights(mask, step, settings.aggregation, settings.max_tokens)
    shown = weights if settings.aggregation != DR_GRPO else token_weights(mask, step, DAPO)
    ratio = (policy.log_probs - policy.old_log_probs).exp()
    losses = clipped_policy_loss(
        policy.log_probs, policy.old_log_probs, advantages, settings.clip_range, settings.upper
    )
    terms = {
        "policy_loss": (losses * weights).sum(),
        "entropy": (policy.entropy * shown).sum(),
        "clip_fraction": (((ratio < 1 - settings.clip_range) | (ratio > 1 + settings.upper)) * shown).sum(),
    }
    loss = terms["policy_loss"] - settings.entropy_coef * (policy.entropy * weights).sum()
    if policy.reference_log_probs is not None:
        kl = kl_to_reference(policy.log_probs, policy.reference_log_probs)
        terms["kl"] = (kl * shown).sum()
        loss = loss + kl_coef * (kl * weights).sum()
    return loss, {name: term.detach() for name, term in terms.items()}


def ppo_objective(
    policy: PolicyTensors,
    value: ValueTensors,
    advantages: Tensor,
    mask: Tensor,
    settings: ObjectiveSettings,
    step: StepSize | None = None,
) -> tuple[Tensor, LossTerms]:
    """PPO's loss to minimise, ``L_policy + c2 L_value - c3 entropy``, and its terms for the log.

    Args:
        policy: log-probabilities and entropy. The reference is for the log only: PPO's KL is in the advantages.
        value: values and returns.
        advantages: [N, T], whitened.
        mask: [N, T] 1 at tokens that are learnt from.
        settings: coefficients. PPO averages over tokens, whatever the aggregation.
        step: as in `grpo_objective`.

    Returns:
        A scalar loss, and detached scalars ``policy_loss``, ``value_loss``, ``entropy``, ``clip_fraction`` (tokens where the
        clipped loss is the larger one), ``value_clip_fraction`` and, with a reference, ``kl`` (k3).
    """
    weights = token_weights(mask, step, DAPO)

    def mean(values: Tensor) -> Tensor:
        return (values * weights).sum()

    unclipped = -(policy.log_probs - policy.old_log_probs).exp() * advantages
    policy_losses = clipped_policy_loss(
        policy.log_probs, policy.old_log_probs, advantages, settings.clip_range, settings.upper
    )
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
