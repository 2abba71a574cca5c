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
        chunk: samples of one optimizer step over all processes.
        repeats: optimizer steps that each chunk serves in a row. Above 1, what does not fill a chunk is left out of the epoch.
    """

    def __init__(self, size: int, seed: int, chunk: int = 1, repeats: int = 1) -> None:
        self.size, self.seed, self.chunk, self.repeats = size, seed, chunk, repeats
        self.epochs_begun = 0

    def __len__(self) -> int:
        return self.size if self.repeats == 1 else self.size // self.chunk * self.chunk * self.repeats

    def __iter__(self) -> Iterator[int]:
        shuffle = torch.Generator().manual_seed(self.seed + self.epochs_begun)
        self.epochs_begun += 1
        order = torch.randperm(self.size, generator=shuffle).tolist()
        if self.repeats == 1:
            return iter(order)
        chunks = [order[i : i + self.chunk] for i in range(0, self.size - self.chunk + 1, self.chunk)]
        return iter([index for part in chunks for _ in range(self.repeats) for index in part])
