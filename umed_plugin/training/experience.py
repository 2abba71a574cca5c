"""What the updates of a rollout learn from: sampled answers with their rewards (`Samples`), then advantages (`Experience`).

A rollout is sampled batch by batch, joined, and split again into minibatches of queries. If a checkpoint is written between its
updates, the checkpoint contains the rollout, so that a resumed run learns from the same answers.
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
        log_probs: [N, T] under the policy that sampled (the old policy). None if the update's own pass gives them, because
            nothing is learned between the two.
        reference_log_probs: [N, T] under the reference policy, or None without a KL.
        values: [N, T] of the states before each token, or None without a value network.
        rewards: [Q, K].
    """

    prompt_ids: list[Tensor]
    image_features: Tensor
    token_ids: Tensor
    mask: Tensor
    log_probs: Tensor | None
    reference_log_probs: Tensor | None
    values: Tensor | None
    rewards: Tensor

    @property
    def candidates(self) -> Candidates:
        """The answers without the rest."""
        return Candidates(self.token_ids, self.mask)


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
        s = self.samples
        picked = torch.as_tensor(queries, device=s.mask.device)
        k = s.rewards.shape[1]
        rows = (picked[:, None] * k + torch.arange(k, device=picked.device)).flatten()
        tokens = int(s.mask[rows].sum(dim=1).max())
        part = Samples(
            [s.prompt_ids[q] for q in picked.tolist()],
            s.image_features[picked],
            **{name: None if t is None else t[rows, :tokens] for name, t in _by_token(s).items()},
            rewards=s.rewards[picked.to(s.rewards.device)],
        )
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
        samples = Samples(**{field.name: moved[field.name] for field in fields(Samples)})
        return cls(samples, moved["advantages"], moved["returns"], moved["kl_coef"])


def join(parts: Sequence[Samples]) -> Samples:
    """Samples of several batches as one; answers are padded with 0 to the longest."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.mask.shape[1] for part in parts)
    columns: dict[str, Tensor | None] = {}
    for name, first in _by_token(parts[0]).items():
        tensors = [_by_token(part)[name] for part in parts]
        columns[name] = None if first is None else torch.cat([_padded(t, longest) for t in tensors if t is not None])
    return Samples(
        [ids for part in parts for ids in part.prompt_ids],
        torch.cat([part.image_features for part in parts]),
        **columns,
        rewards=torch.cat([part.rewards for part in parts]),
    )


def grpo_experience(samples: Samples, kl_coef: float, reward_coef: float, spread: Tensor | None = None) -> Experience:
    """Samples with advantages within each query's candidates; ``spread`` as in `group_advantages`."""
    advantages = group_advantages(samples.rewards, reward_coef, spread).flatten().to(samples.mask.device, torch.float32)
    return Experience(samples, advantages[:, None].expand(samples.mask.shape), None, kl_coef)


def ppo_experience(
    samples: Samples, kl_coef: float, reward_coef: float, gamma: float, gae_lambda: float
) -> tuple[Experience, dict[str, float]]:
    """Samples with advantages from the value network, whitened over all of them; and metrics for the log."""
    if samples.values is None or samples.log_probs is None:
        raise ValueError("PPO needs the values and log-probabilities of the samples")
    mask = samples.mask
    scores = reward_coef * samples.rewards.flatten().to(samples.log_probs)
    rewards = token_rewards(scores, samples.log_probs, samples.reference_log_probs, mask, kl_coef)
    advantages, returns = generalised_advantages(rewards, samples.values, mask, gamma, gae_lambda)
    metrics = {
        "returns_mean": masked_mean(returns, mask).item(),
        "advantage_std": masked_variance(advantages, mask).sqrt().item(),
        "explained_variance": explained_variance(samples.values, returns, mask).item(),
    }
    return Experience(samples, whiten(advantages, mask), returns, kl_coef), metrics


def kl_per_answer(log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor) -> float:
    """Mean over the answers of ``sum_t log p - log p_ref``, in nats, from [N, T] of the policy that sampled."""
    return ((log_probs - reference_log_probs) * mask).sum(dim=1).mean().item()


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
    names = ("token_ids", "mask", "log_probs", "reference_log_probs", "values")
    return {name: getattr(samples, name) for name in names}


def _as_dict(samples: Samples) -> Mapping[str, Any]:
    return {field.name: getattr(samples, field.name) for field in fields(samples)}


def _padded(tensor: Tensor, length: int) -> Tensor:
    """[N, T] padded with zeros to [N, length]."""
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]))
