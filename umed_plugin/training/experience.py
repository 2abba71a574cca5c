"""What the updates of a rollout learn from: sampled answers with their rewards (`Samples`), then advantages (`Experience`).

A rollout is sampled whole and split into minibatches of queries. If a checkpoint is written between its updates, the checkpoint
contains the rollout, so that a resumed run learns from the same answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umed_plugin.checkpoints.safe_loading import load_pickle
from umed_plugin.model.forward import Candidates
from umed_plugin.training.advantages import (
    explained_variance,
    generalised_advantages,
    group_advantages,
    masked_mean,
    masked_variance,
    token_rewards,
    whiten,
)


@dataclass(frozen=True)
class Samples:
    """Sampled answers to Q queries, K each; N = Q*K rows, T tokens, masks as in `umed_plugin.model.forward`.

    Attributes:
        prompt_ids: Q tensors of token ids.
        image_features: [Q, P, D] of the vision tower.
        token_ids: [N, T]; any id at padding.
        mask: [N, T].
        log_probs: [N, T] under the policy that sampled (the old policy). None if only the update needs them and its own pass
            gives them, because nothing is learned between the two.
        reference_log_probs: [N, T] under the reference policy, or None without a KL.
        values: [N, T] of the states before each token, or None without a value network.
        rewards: [Q, K].
        counted: bool [N] answers that are learnt from; None for all.
        sampled_log_probs: [N, T] under the rollout server that sampled, or None if this process did.
        log_probs_without_adapter: [N, T] under the policy that sampled with its adapter off, or None where it made no such pass.
    """

    prompt_ids: list[Tensor]
    image_features: Tensor
    token_ids: Tensor
    mask: Tensor
    log_probs: Tensor | None
    reference_log_probs: Tensor | None
    values: Tensor | None
    rewards: Tensor
    counted: Tensor | None = None
    sampled_log_probs: Tensor | None = None
    log_probs_without_adapter: Tensor | None = None

    @property
    def candidates(self) -> Candidates:
        """The answers without the rest."""
        return Candidates(self.token_ids, self.mask)

    @property
    def counted_by_query(self) -> Tensor | None:
        """bool [Q, K] answers that are learnt from, where the rewards are; None for all."""
        return None if self.counted is None else self.counted.view(self.rewards.shape).to(self.rewards.device)

    def part(self, queries: Sequence[int]) -> Samples:
        """The samples of some queries, in that order, without columns that contain only padding."""
        picked = torch.as_tensor(queries, device=self.mask.device)
        rows = self.rows_of(queries)
        tokens = int(self.mask[rows].sum(dim=1).max())
        return Samples(
            [self.prompt_ids[q] for q in picked.tolist()],
            self.image_features[picked],
            **{name: None if t is None else t[rows, :tokens] for name, t in _by_token(self).items()},
            rewards=self.rewards[picked.to(self.rewards.device)],
            counted=None if self.counted is None else self.counted[rows],
        )

    def rows_of(self, queries: Sequence[int]) -> Tensor:
        """The rows of the K answers to each of some queries."""
        picked, k = torch.as_tensor(queries, device=self.mask.device), self.rewards.shape[1]
        return (picked[:, None] * k + torch.arange(k, device=picked.device)).flatten()

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """Several samples as one; they have the same tensors."""
        counted = [part.counted for part in parts if part.counted is not None]
        return cls(
            [ids for part in parts for ids in part.prompt_ids],
            torch.cat([part.image_features for part in parts]),
            **{name: stacked([_by_token(part)[name] for part in parts]) for name in _by_token(parts[0])},
            rewards=torch.cat([part.rewards for part in parts]),
            counted=torch.cat(counted) if counted else None,
        )

    @property
    def loss_mask(self) -> Tensor:
        """[N, T] 1 at tokens that are learnt from: ``mask`` without the answers that are not counted."""
        return self.mask if self.counted is None else self.mask * self.counted[:, None]


@dataclass(frozen=True)
class Experience:
    """Samples with their advantages.

    Attributes:
        samples: the answers.
        advantages: [N, T].
        returns: [N, T] for PPO, or None.
        kl_coef: weight of the KL at the time of sampling.
    """

    samples: Samples
    advantages: Tensor
    returns: Tensor | None
    kl_coef: float

    def minibatch(self, queries: Sequence[int]) -> Experience:
        """The part for some queries, in that order, without columns that contain only padding."""
        part, rows = self.samples.part(queries), self.samples.rows_of(queries)
        tokens = part.mask.shape[1]
        returns = None if self.returns is None else self.returns[rows, :tokens]
        return Experience(part, self.advantages[rows, :tokens], returns, self.kl_coef)

    def save(self, file: Path) -> None:
        """Write it as plain tensors."""
        rest = {"advantages": self.advantages, "returns": self.returns, "kl_coef": self.kl_coef}
        torch.save({**_as_dict(self.samples), **rest}, file)

    @classmethod
    def load(cls, file: Path, device: Any) -> Experience:
        """Read what `save` wrote; rewards stay on the CPU."""
        content = load_pickle(file)
        moved = {
            name: value.to(device) if isinstance(value, Tensor) and name != "rewards" else value
            for name, value in content.items()
        }
        # A rollout of an earlier release lacks what was added since; that has a default.
        samples = Samples(**{field.name: moved[field.name] for field in fields(Samples) if field.name in moved})
        return cls(samples, moved["advantages"], moved["returns"], moved["kl_coef"])


def stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """[N_i, T_i] tensors as one [N, T], padded with 0 to the longest; None if they are None."""
    tensors = [part for part in parts if part is not None]
    if not tensors:
        return None
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([_padded(tensor, longest) for tensor in tensors])


def grpo_experience(
    samples: Samples, kl_coef: float, reward_coef: float, spread: Tensor | float | None = None
) -> Experience:
    """Samples with advantages within each query's candidates; ``spread`` as in `group_advantages`."""
    advantages = group_advantages(samples.rewards, reward_coef, spread, samples.counted_by_query)
    advantages = advantages.flatten().to(samples.mask.device, torch.float32)
    return Experience(samples, advantages[:, None].expand(samples.mask.shape), None, kl_coef)


def ppo_experience(
    samples: Samples, kl_coef: float, reward_coef: float, gamma: float, gae_lambda: float
) -> tuple[Experience, dict[str, float]]:
    """Samples with advantages from the value network, whitened over all that are learnt from; and metrics for the log."""
    if samples.values is None or (samples.log_probs is None and samples.reference_log_probs is not None):
        raise ValueError("PPO needs the values of the samples and, with a reference, their log-probabilities")
    # Without a reference, the rewards of tokens need no log-probabilities.
    log_probs = torch.zeros_like(samples.values) if samples.log_probs is None else samples.log_probs
    mask, loss_mask = samples.mask, samples.loss_mask
    scores = reward_coef * samples.rewards.flatten().to(log_probs)
    rewards = token_rewards(scores, log_probs, samples.reference_log_probs, mask, kl_coef)
    advantages, returns = generalised_advantages(rewards, samples.values, mask, gamma, gae_lambda)
    metrics = {
        "returns_mean": masked_mean(returns, loss_mask).item(),
        "advantage_std": masked_variance(advantages, loss_mask).sqrt().item(),
        "explained_variance": explained_variance(samples.values, returns, loss_mask).item(),
    }
    return Experience(samples, whiten(advantages, loss_mask), returns, kl_coef), metrics


def kl_per_answer(log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor) -> Tensor:
    """[N] ``sum_t log p - log p_ref`` of each answer, in nats, from [N, T] of the policy that sampled."""
    return ((log_probs - reference_log_probs) * mask).sum(dim=1)


def minibatch_order(queries: int, minibatches: int, seed: Sequence[int]) -> list[int]:
    """Order of the queries in one epoch over a rollout; shuffled if there is more than one minibatch.

    Args:
        queries: number of queries in this rank's rollout.
        minibatches: optimizer steps per epoch.
        seed: integers that identify run, rollout, epoch and rank.
    """
    if minibatches == 1:
        return list(range(queries))
    return np.random.default_rng(list(seed)).permutation(queries).tolist()


def _by_token(samples: Samples) -> dict[str, Tensor | None]:
    """The tensors of shape [N, T]."""
    names = ("token_ids", "mask", "log_probs", "reference_log_probs", "values", "sampled_log_probs")
    return {name: getattr(samples, name) for name in (*names, "log_probs_without_adapter")}


def _as_dict(samples: Samples) -> Mapping[str, Any]:
    return {field.name: getattr(samples, field.name) for field in fields(samples)}


def _padded(tensor: Tensor, length: int) -> Tensor:
    """[N, T] padded with zeros to [N, length]."""
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]))
