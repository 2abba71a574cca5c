"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups without signal are replaced by groups of further queries.

If all K answers to a question have the same reward, their advantages are 0 in GRPO. A step with many such groups learns from few.
So up to ``--umed_dynamic_sampling`` times per rollout, further queries are sampled, and their groups with signal take the places
of those without. What is still without signal then stays. Departure from DAPO: it samples until the batch is full.

- **Ranks** sample together or not at all, each as many queries as the rank that needs most. Rewards and rollout servers may then
  gather, and under ZeRO-3 all ranks meet at the same collectives.
- **Order**: further queries come from an order of their own, so that epochs, and the batches of the data loader, stay as they
  are. It depends on the seed alone. How far it was read is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from umed_plugin.training.advantages import groups_with_signal
from umed_plugin.training.experience import Samples
from umed_plugin.training.sampler import EpochSampler

METRICS = ("groups_replaced", "extra_samplings")
# The sampling of a rollout from which a query comes, 0 for the first, and its number there.
Source = tuple[int, int]
_OWN_ORDER = 2**20  # far from the seeds of the epochs


def replace_without_signal(
    samples: Samples, sample: Callable[[int], Samples], most_of_ranks: Callable[[int], int], rounds: int
) -> tuple[Samples, list[Source], int]:
    """Replace groups without signal.

    Args:
        samples: of Q queries.
        sample: samples that many further queries of this rank.
        most_of_ranks: the largest of the ranks' numbers.
        rounds: most calls of ``sample``.

    Returns:
        Samples of Q queries, the source of each, and the number of calls of ``sample``, which is the same on all ranks.
    """
    sources = [(0, query) for query in range(len(samples.rewards))]
    for done in range(rounds):
        without = _queries(samples, signal=False)
        count = most_of_ranks(len(without))
        if count == 0:
            return samples, sources, done
        more = sample(count)
        chosen = _queries(more, signal=True)[: len(without)]
        samples = _replaced(samples, without, more, chosen)
        for place, query in zip(without, chosen):
            sources[place] = (done + 1, query)
    return samples, sources, rounds


def _queries(samples: Samples, *, signal: bool) -> list[int]:
    """The queries with signal, or those without."""
    found = groups_with_signal(samples.rewards, samples.counted_by_query)
    queries: list[int] = (found == signal).nonzero().flatten().tolist()
    return queries


def _replaced(samples: Samples, places: Sequence[int], more: Samples, chosen: Sequence[int]) -> Samples:
    """The samples with the chosen queries of ``more`` in the first of these places."""
    if not chosen:
        return samples
    order = list(range(len(samples.rewards)))
    for place, query in zip(places, chosen):
        order[place] = len(samples.rewards) + query
    return Samples.joined([samples, more]).part(order)


@dataclass(frozen=True)
class Dealing:
    """How further queries are dealt out: by this seed, to this rank of so many."""

    seed: int
    rank: int
    ranks: int


class FurtherQueries:
    """Queries in an order of their own, dealt out to the ranks.

    Args:
        dataset: of queries.
        collate: makes a batch of them.
        dealing: seed and ranks.
        numbered: as in `umed_plugin.training.query_reader.QueryReader`.

    Attributes:
        taken: number of queries that all ranks together have taken; belongs into a checkpoint.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any], dealing: Dealing, *, numbered: bool = False
    ) -> None:
        self._dataset, self._collate, self._dealing, self._numbered = dataset, collate, dealing, numbered
        self._epochs = EpochSampler(len(dataset), dealing.seed + _OWN_ORDER)
        self._known: tuple[int, list[int]] = (-1, [])
        self.taken = 0

    def take(self, count: int, batch_size: int) -> list[Any]:
        """The next ``count`` queries of this rank, in batches. Every rank takes as many."""
        first = self.taken + self._dealing.rank * count
        self.taken += count * self._dealing.ranks
        queries = [self._dataset[self._index(place)] for place in range(first, first + count)]
        return [self._collate(queries[start : start + batch_size]) for start in range(0, count, batch_size)]

    def _index(self, place: int) -> int:
        """What the dataset is asked for at a place of the endless order."""
        size = len(self._dataset)
        epoch, within = divmod(place, size)
        if self._known[0] != epoch:
            self._known = epoch, self._epochs.order(epoch)
        return self._known[1][within] + (epoch * size if self._numbered else 0)
