"""The order of the data: a run that is interrupted and resumed sees the same batches as one that is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class NumberedEpochs(Sampler):
    """The indices of a sampler with their epoch: ``index + epoch * size``, for a dataset that shows each epoch otherwise.

    Args:
        sampler: with ``epochs_begun``, which counts when an iteration begins.
        size: number of records.
    """

    def __init__(self, sampler: Any, size: int) -> None:
        self.sampler, self.size = sampler, size

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        indices = iter(self.sampler)
        before = (self.epochs_begun - 1) * self.size
        return (index + before for index in indices)

    @property
    def epochs_begun(self) -> int:
        """Number of iterations that have begun."""
        return int(self.sampler.epochs_begun)

    @epochs_begun.setter
    def epochs_begun(self, count: int) -> None:
        self.sampler.epochs_begun = count


class EpochSampler(Sampler):
    """Shuffled indices whose order depends on the seed and the number of epochs begun, and on nothing else.

    A sampler that draws from the global random state would give a resumed run other batches, because dropout and the sampling of
    candidates move that state.

    Args:
        size: number of records.
        seed: of the shuffling.
        rollout_size: queries of one rollout over all ranks. Records that do not fill a rollout are left out of the epoch.
            ``None``: no rollout spans several steps, and nothing is left out.
        rollout_epochs: epochs over each rollout, one after the other.
    """

    def __init__(self, size: int, seed: int, rollout_size: int | None = None, rollout_epochs: int = 1) -> None:
        self.size, self.seed = size, seed
        self.rollout_size, self.rollout_epochs = rollout_size, rollout_epochs
        self.epochs_begun = 0

    def __len__(self) -> int:
        if self.rollout_size is None:
            return self.size
        return self.size // self.rollout_size * self.rollout_size * self.rollout_epochs

    def __iter__(self) -> Iterator[int]:
        self.epochs_begun += 1
        return iter(self.order(self.epochs_begun - 1))

    def order(self, epoch: int) -> list[int]:
        """The indices of an epoch, counted from 0."""
        order = self.reading_order(epoch)
        if self.rollout_size is None:
            return order
        rollouts = [order[start : start + self.rollout_size] for start in range(0, len(order), self.rollout_size)]
        return [index for rollout in rollouts for _ in range(self.rollout_epochs) for index in rollout]

    def reading_order(self, epoch: int) -> list[int]:
        """The indices of an epoch, each record once: a rollout is read once for all epochs over it."""
        shuffle = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(self.size, generator=shuffle).tolist()
        return order if self.rollout_size is None else order[: self.size // self.rollout_size * self.rollout_size]

    def rollout(self, number: int) -> tuple[int, int]:
        """Epoch, and number within it, of a rollout; all are counted from 0."""
        if self.rollout_size is None:
            raise ValueError("this order has no rollouts")
        return divmod(number, self.size // self.rollout_size)


def sampler_in(loader: Any) -> Any:
    """The sampler inside the batch samplers that accelerate nests."""
    while hasattr(loader, "batch_sampler"):
        loader = loader.batch_sampler
    return loader.sampler
