"""Where advantages are computed, as pure functions: `group_advantages` for GRPO, `generalised_advantages` for PPO.

PPO for language models rewards every token (`token_rewards`): ``r_t = -beta (log p - log p_ref)``, plus the sampled reward times
c1 at the answer's last token (Ziegler et al. 2019, arXiv 1909.08593, eq. 2). GRPO has no per-token reward; its KL is a term of
the loss. `KLCoefficient` is the weight beta. Generalised advantage estimation, whitening equal those of TRL 0.9's
PPOTrainer, which the tests use as oracle, and the adaptive coefficient does to first order.

Shapes: Q queries, K candidates, N = Q*K rows, T answer tokens. A mask [N, T] is 1 on tokens and 0 on padding behind them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def centre_groups(rewards: Tensor, counted: Tensor | None = None) -> Tensor:
    """Rewards [Q, K] minus the mean over their query's candidates; those not in bool [Q, K] ``counted`` are 0 and in no mean."""
    filled = rewards if counted is None else _at_the_mean_unless(counted, rewards)
    return filled - (rewards.mean(dim=1, keepdim=True) if counted is None else _mean_of(counted, rewards))


def _mean_of(counted: Tensor, rewards: Tensor) -> Tensor:
    """[Q, 1] mean of the counted candidates of each query; 0 without any."""
    return (rewards * counted).sum(dim=1, keepdim=True) / counted.sum(dim=1, keepdim=True).clamp(min=1)


def _at_the_mean_unless(counted: Tensor, rewards: Tensor) -> Tensor:
    """Rewards [Q, K] in which the other candidates have the mean of the counted ones, so that they change no signal."""
    return torch.where(counted.bool(), rewards, _mean_of(counted, rewards))


def group_advantages(
    rewards: Tensor, reward_coef: float = 1.0, spread: Tensor | float | None = None, counted: Tensor | None = None
) -> Tensor:
    """Advantages of the candidates within their query: ``c1 * (r - mean) / spread`` (GRPO, arXiv 2402.03300).

    Args:
        rewards: [Q, K].
        reward_coef: c1 of the paper.
        spread: a scalar that divides the centred rewards; ``None``: each query's own standard deviation, as in GRPO. With one
            for all queries, a query whose answers are nearly equal does not weigh as much as one whose answers tell right from
            wrong. A float divides as it is: 1.0 is Dr. GRPO (arXiv 2503.20783), which does not divide at all.
        counted: bool [Q, K]; the other candidates get 0 and are in no mean and no standard deviation. None: all count.

    Returns:
        [Q, K]; 0 for a group whose rewards are all equal, because it carries no signal.
    """
    centred = centre_groups(rewards, counted)
    if counted is not None:
        rewards = _at_the_mean_unless(counted, rewards)
    if spread is None:
        number = rewards.shape[1] if counted is None else counted.sum(dim=1, keepdim=True).clamp(min=1)
        spread = (centred.square().sum(dim=1, keepdim=True) / number).sqrt()
    if isinstance(spread, float):
        return reward_coef * torch.where(has_signal(rewards), centred / spread, torch.zeros_like(centred))
    # TRL's 1e-4 suits rewards of about 1. Smaller ones (raw attention, a weight of 0.001) would lose their signal to it.
    size = rewards.abs().amax(dim=1, keepdim=True)
    scaled = centred / (spread + 1e-4 * size.clamp(max=1.0, min=torch.finfo(rewards.dtype).tiny))
    return reward_coef * torch.where(has_signal(rewards), scaled, torch.zeros_like(centred))


def groups_with_signal(rewards: Tensor, counted: Tensor | None = None) -> Tensor:
    """[Q] bool: which queries have an advantage to learn from; ``rewards`` and ``counted`` as in `group_advantages`."""
    return has_signal(rewards if counted is None else _at_the_mean_unless(counted, rewards))[:, 0]


def has_signal(rewards: Tensor) -> Tensor:
    """[Q, 1] bool: whether the rewards [Q, K] of a query differ by more than rounding, relative to their size."""
    spread = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True)
    return spread > 1e-6 * rewards.abs().amax(dim=1, keepdim=True)


def token_rewards(
    scores: Tensor, log_probs: Tensor, reference_log_probs: Tensor | None, mask: Tensor, kl_coef: float
) -> Tensor:
    """Per-token rewards: ``-kl_coef * (log p - log p_ref)``, plus the answer's score at its last token.

    Args:
        scores: [N] sampled rewards, already times c1.
        log_probs: [N, T] under the policy that sampled.
        reference_log_probs: [N, T]; ``None`` leaves the penalty out.
        mask: [N, T], at least one token in each row.
        kl_coef: beta.

    Returns:
        [N, T], 0 at padding.
    """
    mask = mask.to(log_probs.dtype)
    if reference_log_probs is None:
        rewards = torch.zeros_like(log_probs)
    else:
        rewards = -kl_coef * (log_probs - reference_log_probs) * mask
    last = mask.sum(dim=1, keepdim=True).long() - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16): ``A_t = delta_t + gamma * lambda * A_{t+1}``.

    ``delta_t = r_t + gamma * V_{t+1} - V_t``, where V_t is the value of the state before token t, and 0 behind the last token.

    Args:
        rewards: [N, T].
        values: [N, T] at the time of sampling.
        mask: [N, T].
        gamma: discount, 0-1.
        gae_lambda: 0 (one step, low variance) to 1 (the whole return, no bias).

    Returns:
        [N, T] advantages, not whitened, and [N, T] returns ``A_t + V_t``, which the value network learns; both 0 at padding.
    """
    mask = mask.to(values.dtype)
    values, rewards = values * mask, rewards * mask
    after_the_end = torch.zeros_like(values[:, 0])
    next_value, advantage, columns = after_the_end, after_the_end, []
    # Backwards, since A_t needs A_{t+1}. At padding rewards and values are 0, so nothing flows from there into the answer.
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * advantage
        next_value = values[:, t]
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of [N, T] over all tokens in the mask: a scalar. Every token has the same weight. 0 for an empty mask."""
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance of [N, T] over all tokens in the mask; 0 if there is only one."""
    count = mask.sum()
    return masked_mean((values - masked_mean(values, mask)).square(), mask) * count / (count - 1).clamp(min=1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """[N, T] shifted and scaled to mean 0 and variance 1 over all tokens in the mask; 0 at padding."""
    scaled = (values - masked_mean(values, mask)) * torch.rsqrt(masked_variance(values, mask) + 1e-8)
    return scaled * mask.to(values.dtype)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """``1 - Var(R - V) / Var(R)`` over the tokens: 1 for a perfect value network, 0 for a constant, below 0 if it is worse."""
    return 1 - masked_variance(returns - values, mask) / masked_variance(returns, mask).clamp(min=1e-8)


@dataclass
class KLCoefficient:
    """Weight beta of the KL to the reference, fixed or adapted to a target (Ziegler et al. 2019, section 2.2).

    ``e = clip(KL / target - 1, -0.2, 0.2)`` and ``beta <- beta exp(e n / horizon)`` after n answers. The paper and TRL write
    ``1 + e n / horizon``, which is the same for small steps, and 0 or less where n answers are five horizons or more.

    Attributes:
        value: beta now, 0 or more.
        target: KL of an answer in nats, summed over its tokens; ``None`` keeps beta fixed.
        horizon: number of answers over which beta changes by a factor of at most e^0.2.
    """

    value: float
    target: float | None = None
    horizon: float = 10_000.0

    def update(self, kl: float, answers: int) -> None:
        """Adapt beta to the mean KL, in nats per answer, of ``answers`` answers."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= math.exp(error * answers / self.horizon)
