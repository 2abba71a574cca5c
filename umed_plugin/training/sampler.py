"""The order of the data, the same in a run that was interrupted and resumed as in one that was not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler):
    """Shuffled indices whose order depends on the seed and the number of epochs begun, and on nothing else.

    A sampler that draws from the global random state gives a resumed run other batches, as dropout and the sampling of
    candidates have moved that state.

    Args:
        size: number of samples.
        seed: of the shuffling.
        chunk: samples of one rollout over all processes; what does not fill one is left out of the epoch. ``None``: no rollouts
            that go over several steps, and nothing is left out.
        repeats: passes over each chunk, in a row.
    """

    def __init__(self, size: int, seed: int, chunk: int | None = None, repeats: int = 1) -> None:
        self.size, self.seed, self.chunk, self.repeats = size, seed, chunk, repeats
        self.epochs_begun = 0

    def __len__(self) -> int:
        return self.size if self.chunk is None else self.size // self.chunk * self.chunk * self.repeats

    def __iter__(self) -> Iterator[int]:
        self.epochs_begun += 1
        return iter(self.order(self.epochs_begun - 1))

    def order(self, epoch: int) -> list[int]:
        """The indices of an epoch, counted from 0."""
        shuffle = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(self.size, generator=shuffle).tolist()
        if self.chunk is None:
            return order
        chunks = [order[i : i + self.chunk] for i in range(0, self.size - self.chunk + 1, self.chunk)]
        return [index for part in chunks for _ in range(self.repeats) for index in part]

    def rollout(self, number: int) -> list[int]:
        """The indices of a rollout, counted from 0 over all epochs."""
        if self.chunk is None:
            raise ValueError("this order has no rollouts")
        epoch, place = divmod(number, self.size // self.chunk)
        start = place * self.chunk * self.repeats
        return self.order(epoch)[start : start + self.chunk]
