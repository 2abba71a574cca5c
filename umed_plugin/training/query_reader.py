"""Reads the queries of a rollout ahead of the updates that learn from them.

The Trainer's data loader hands out one batch at a time, but answers to all batches of an optimizer step are sampled together. So
that loader only yields indices, and `QueryReader` reads the images. It follows the same order, and its worker processes live for
an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from umed_plugin.errors import UmedError


def as_indices(indices: list[int]) -> dict[str, Tensor]:
    """A batch that only says which records it has: a collate function for a data loader over ``range(n)``."""
    return {"indices": torch.tensor(indices)}


def rank_batches(order: Sequence[int], batch_size: int, processes: int, rank: int, drop_last: bool) -> list[list[int]]:
    """The batches that one rank gets of an epoch, as accelerate deals them out.

    Args:
        order: indices of all records of the epoch.
        batch_size: of one rank.
        processes: number of ranks.
        rank: 0 to ``processes - 1``.
        drop_last: leave out what does not fill a batch on every rank. Otherwise accelerate fills up from the epoch's beginning.

    Example:
        >>> rank_batches([5, 3, 4, 0, 2, 1], 2, 2, 1, False)
        [[4, 0], [5, 3]]
    """
    batches = BatchSampler(order, batch_size, drop_last)
    return list(BatchSamplerShard(batches, processes, rank) if processes > 1 else batches)


class QueryReader:
    """Reads batches of queries in the order of an epoch; what follows is read ahead by worker processes.

    Args:
        dataset: of queries.
        collate: makes a batch of them.
        workers: number of worker processes; 0 reads in this one, when asked.
        plan: an epoch, counted from 0, -> all batches of indices that this rank reads in it.
        numbered: whether the dataset shows each epoch otherwise, and takes ``index + epoch * len(dataset)``.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], Any],
        workers: int,
        plan: Callable[[int], list[list[int]]],
        numbered: bool = False,
    ) -> None:
        self._dataset, self._collate, self._workers, self._make_plan = dataset, collate, workers, plan
        self._numbered = numbered
        self._planned: tuple[int, list[list[int]]] | None = None
        self._batches: Iterator[Any] = iter(())
        self._at: tuple[int, int] | None = None

    def plan(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._make_plan(epoch)
        return self._planned[1]

    def position(self, epoch: int, indices: list[int]) -> int:
        """Number of a batch in its epoch: the one that is read next if it fits, else the first with these indices.

        Raises:
            UmedError: the epoch has no such batch, because accelerate was told to deal out batches in another way.
        """
        plan = self.plan(epoch)
        if self._at is not None and self._at[0] == epoch and plan[self._at[1] : self._at[1] + 1] == [indices]:
            return self._at[1]
        if indices not in plan:
            raise UmedError(
                f"the data loader yields the records {indices}, which are not a batch of epoch {epoch}. Stage 2 does not support "
                "split_batches, dispatch_batches or even_batches of accelerate: leave them at their defaults."
            )
        return plan.index(indices)

    def read(self, epoch: int, start: int, count: int) -> list[Any]:
        """``count`` batches of an epoch from number ``start`` on; fewer at its end."""
        if (epoch, start) != self._at:
            self._batches = iter(self._loader(self._to_read(epoch, start)))
        batches = list(islice(self._batches, count))
        self._at = epoch, start + len(batches)
        return batches

    def close(self) -> None:
        """End the worker processes."""
        self._batches, self._at = iter(()), None

    def _to_read(self, epoch: int, start: int) -> list[list[int]]:
        """What the dataset is asked for."""
        batches = self.plan(epoch)[start:]
        before = epoch * len(self._dataset) if self._numbered else 0
        return [[index + before for index in batch] for batch in batches]

    def _loader(self, batches: list[list[int]]) -> DataLoader[Any]:
        return DataLoader(
            self._dataset,
            batch_sampler=batches,
            collate_fn=self._collate,
            num_workers=self._workers,
            generator=torch.Generator(),  # without one, it would draw from the state that answers are sampled with
        )
