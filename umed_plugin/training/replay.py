"""``--umed_replay S``: from the second epoch on, the share S of the records with the highest loss comes twice (after ClinKD).

The loss of a record is the mean cross-entropy of its answer tokens in the batch in which it was last seen, before that batch's
step. Which records come twice is decided when an epoch begins, by the losses of the epoch before; ties go to the lower index.
Their order follows from the seed and the epoch. So it depends on nothing that a resumed run, or another number of processes,
lacks: `Replay` is saved with each checkpoint, and losses are gathered over all processes.

An epoch is a whole number of optimizer steps: where it is not, its first records fill the last step, as accelerate fills the last
batch of several processes. transformers is shown one long epoch (`ReplayedLoader`), because all of its own are equally long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from umed_plugin.checkpoints.safe_loading import load_pickle
from umed_plugin.errors import UmedError

RECORDS = "record_indices"
STATE = "replay.pt"


class Replay:
    """Which records come twice, and what decides it.

    Args:
        size: number of records.
        share: of them that comes twice, 0-1.

    Raises:
        UmedError: the share is less than one record.

    Attributes:
        epoch: the epoch that has begun, counted from 0; -1 before the first.
        steps: optimizer steps of it that are done.
        twice: indices of the records that come twice in it, hardest first.
        losses: [size] loss of each record in it, NaN where it was not seen yet.
    """

    def __init__(self, size: int, share: float) -> None:
        self.count = math.floor(share * size + 1e-9)
        if self.count == 0:
            raise UmedError(
                f"--umed_replay {share:g}: is less than one of the {size} training records, so none would come twice. Give at "
                f"least {math.ceil(1e6 / size) / 1e6:g}, or leave the flag out."
            )
        self.epoch, self.steps = -1, 0
        self.twice: list[int] = []
        self.losses = torch.full((size,), math.nan)

    def add(self, records: Tensor, losses: Tensor) -> None:
        """Note the losses [n] of records [n]; of a record that comes twice, the later one counts."""
        for record, loss in zip(records.tolist(), losses.tolist()):
            self.losses[record] = loss

    def begin(self, epoch: int) -> list[int]:
        """Begin an epoch, unless it has begun before a checkpoint; the records that come twice in it."""
        if epoch != self.epoch:
            self.twice = hardest(self.losses, self.count) if epoch > 0 else []
            self.epoch, self.steps = epoch, 0
            self.losses = torch.full_like(self.losses, math.nan)
        return self.twice

    def length(self, epoch: int) -> int:
        """Number of records that an epoch shows, before its last step is filled."""
        return len(self.losses) + (self.count if epoch > 0 else 0)

    def save(self, folder: Path) -> None:
        """Write ``replay.pt``."""
        state = {"epoch": self.epoch, "steps": self.steps, "twice": torch.tensor(self.twice, dtype=torch.long)}
        torch.save({**state, "losses": self.losses}, folder / STATE)

    def load(self, folder: Path) -> None:
        """Read ``replay.pt``.

        Raises:
            UmedError: it is missing, or of other records.
        """
        file = folder / STATE
        if not file.is_file():
            raise UmedError(
                f"{folder}: has no {STATE}, so it is unknown which records --umed_replay brings twice. Resume without the "
                "flag, or choose another --output_dir."
            )
        state = load_pickle(file)
        if len(state["losses"]) != len(self.losses):
            raise UmedError(
                f"{file}: has the losses of {len(state['losses'])} records, but there are {len(self.losses)}. Choose another "
                "--output_dir."
            )
        self.epoch, self.steps, self.twice = state["epoch"], state["steps"], state["twice"].tolist()
        self.losses = state["losses"]


def hardest(losses: Tensor, count: int) -> list[int]:
    """Indices of the ``count`` highest losses, highest first; of equal ones the lower index. NaN is the lowest.

    Example:
        >>> import torch
        >>> hardest(torch.tensor([0.5, 2.0, float("nan"), 2.0]), 3)
        [1, 3, 0]
    """
    values = losses.tolist()
    order = sorted(range(len(values)), key=lambda i: (-(values[i] if values[i] == values[i] else -math.inf), i))
    return order[:count]


class ReplayedEpochs(Sampler):
    """The indices of one epoch after the other, with the records that come twice.

    Args:
        replay: decides which.
        order: (indices, epoch) -> the same in another order, from the seed and the epoch alone.
        step: records of an optimizer step, over all processes.
        fills: whether an epoch's last step is filled; else its last batch may be smaller, as with one process and one batch a
            step.
        numbered: add ``epoch * size`` to each index, for a dataset that shows each epoch otherwise.
    """

    def __init__(
        self,
        replay: Replay,
        order: Callable[[Sequence[int], int], list[int]],
        step: int,
        *,
        fills: bool = False,
        numbered: bool = False,
    ) -> None:
        self.replay, self._order, self._numbered = replay, order, numbered
        self._step, self._fills = step, fills
        self.epochs_begun = 0

    def __len__(self) -> int:
        """Of the epoch that begins next."""
        return self.filled(self.epochs_begun)

    def __iter__(self) -> Iterator[int]:
        # As a generator, so that an epoch begins when its first index is asked for.
        epoch = self.epochs_begun
        self.epochs_begun += 1
        size = len(self.replay.losses)
        order = self._order([*range(size), *self.replay.begin(epoch)], epoch)
        before = epoch * size if self._numbered else 0
        for place in range(self.filled(epoch)):
            yield order[place % len(order)] + before

    def filled(self, epoch: int) -> int:
        """Number of indices of an epoch."""
        return self.steps(epoch) * self._step if self._fills else self.replay.length(epoch)

    def steps(self, epoch: int) -> int:
        """Number of optimizer steps of an epoch."""
        return -(-self.replay.length(epoch) // self._step)

    def steps_of(self, epochs: float) -> int:
        """Number of optimizer steps of so many epochs, the last of which may be a part."""
        whole = math.floor(epochs)
        steps = sum(self.steps(epoch) for epoch in range(whole))
        return max(steps + math.ceil((epochs - whole) * self.steps(whole)), 1)


class ReplayedLoader:
    """A data loader that goes through its epochs in one iteration, without end.

    Args:
        loader: of one epoch after the other, over a `ReplayedEpochs`.
        sampler: that one.
        batches: its length, as transformers sees it: of the whole run, for this process.
        accumulation: batches of an optimizer step.
        begun: called when the first batch is there of an epoch that a resumed run goes on with.
    """

    def __init__(
        self, loader: Any, sampler: ReplayedEpochs, batches: int, accumulation: int, begun: Callable[[], None]
    ) -> None:
        self._loader, self._sampler, self._batches = loader, sampler, batches
        self._accumulation, self._begun = accumulation, begun

    def __len__(self) -> int:
        return self._batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        from accelerate import skip_first_batches

        replay, done = self._sampler.replay, 0
        if replay.epoch >= 0:
            over = replay.steps == self._sampler.steps(replay.epoch)
            done = 0 if over else replay.steps * self._accumulation
            self._sampler.epochs_begun = replay.epoch + over
        if done:
            for number, batch in enumerate(skip_first_batches(self._loader, done)):
                if number == 0:
                    self._begun()
                yield batch
        while True:
            yield from self._loader


class IndexedCollator:
    """A collator that passes on the index of each record: ``record_indices``, int64 [B]."""

    def __init__(self, stock: Any) -> None:
        self._stock = stock

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One batch."""
        batch: dict[str, Any] = self._stock(items)
        return {**batch, RECORDS: torch.tensor([item[RECORDS] for item in items])}
