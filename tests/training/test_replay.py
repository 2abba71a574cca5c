"""Which records come twice, against a plain loop; and where a resumed epoch goes on."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from umed_plugin.errors import UmedError
from umed_plugin.training.replay import Replay, ReplayedEpochs, ReplayedLoader, hardest

SIZE, SHARE, SEED = 11, 0.3, 5


def shuffled(indices, epoch):
    shuffle = torch.Generator().manual_seed(SEED + epoch)
    return [indices[place] for place in torch.randperm(len(indices), generator=shuffle).tolist()]


def loss_of(record, seen):
    """A loss that falls each time the record is seen, from a start that depends on the record."""
    return (record * 7 % SIZE) / (1 + seen)


def loader_of(replay, batch, accumulation, batches, begun=lambda: None):
    split = accumulation > 1
    sampler = ReplayedEpochs(replay, shuffled, batch * accumulation, fills=split)
    loader = DataLoader(range(SIZE), batch_sampler=BatchSampler(sampler, batch, drop_last=False))
    return ReplayedLoader(loader, sampler, batches, accumulation, begun), sampler


def trained(replay, loader, accumulation, steps, seen):
    """What a trainer does with the loader: the ids in the order in which they are trained."""
    ids, batches = [], iter(loader)
    for _ in range(steps):
        for _ in range(accumulation):
            batch = next(batches)
            ids += batch.tolist()
            replay.add(batch, torch.tensor([loss_of(i, seen[i]) for i in batch.tolist()]))
            seen.update(batch.tolist())
        replay.steps += 1
    return ids


def plain_loop(batch, accumulation, epochs):
    """The same without any of the classes."""
    ids, seen, losses = [], Counter(), {}
    step = batch * accumulation
    for epoch in range(epochs):
        twice = []
        if epoch:
            twice = sorted(losses, key=lambda i: (-losses[i], i))[: math.floor(SHARE * SIZE)]
        order = shuffled([*range(SIZE), *twice], epoch)
        while accumulation > 1 and len(order) % step:
            order.append(order[len(order) % len([*range(SIZE), *twice])])
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            losses |= {i: torch.tensor(loss_of(i, seen[i])).item() for i in part}
            seen.update(part)
            ids += part
    return ids


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 1), (2, 3), (4, 2)])
def test_the_trained_ids_are_those_of_a_plain_loop(batch, accumulation):
    replay, seen = Replay(SIZE, SHARE), Counter()
    loader, sampler = loader_of(replay, batch, accumulation, 100)
    steps = sampler.steps_of(4)
    found = trained(replay, loader, accumulation, steps, seen)
    assert found == plain_loop(batch, accumulation, 4)
    assert replay.epoch == 3 and replay.steps == sampler.steps(3) and len(replay.twice) == 3
    assert len(loader) == 100 and sampler.steps_of(2.5) == sum(map(sampler.steps, range(2))) + -(-sampler.steps(2) // 2)


@pytest.mark.parametrize("stop", [1, 2, 5, 6, 7, 13])
def test_a_resumed_run_goes_on_with_the_same_ids(stop, tmp_path):
    whole = plain_loop(2, 1, 4)
    replay, seen = Replay(SIZE, SHARE), Counter()
    loader, _ = loader_of(replay, 2, 1, 100)
    before = trained(replay, loader, 1, stop, seen)
    replay.save(tmp_path)

    again, loaded = Replay(SIZE, SHARE), []
    again.load(tmp_path)
    loader, sampler = loader_of(again, 2, 1, 100, lambda: loaded.append(True))
    rest = trained(again, loader, 1, sampler.steps_of(4) - stop, seen)
    assert before + rest == whole
    # Where an epoch begins anew, the random state is loaded by transformers, before the loader draws from it.
    assert loaded == ([] if stop in (6, 13) else [True])


def test_states_of_other_runs_are_refused(tmp_path):
    with pytest.raises(UmedError, match="has no replay.pt"):
        Replay(SIZE, SHARE).load(tmp_path)
    Replay(SIZE + 1, SHARE).save(tmp_path)
    with pytest.raises(UmedError, match="losses of 12 records, but there are 11"):
        Replay(SIZE, SHARE).load(tmp_path)


def test_the_hardest_are_the_highest_and_ties_go_to_the_lower_index():
    nan = math.nan
    assert hardest(torch.tensor([1.0, nan, 3.0, 3.0, 0.5]), 4) == [2, 3, 0, 4]
    with pytest.raises(UmedError, match=r"--umed_replay 0.09: is less than one of the 10 .* at least 0.1, or leave"):
        Replay(10, 0.09)
    with pytest.raises(UmedError, match=r"at least 0.142858, or"):
        Replay(7, 0.1)
    assert Replay(7, 0.142858).count == 1
    assert Replay(10, 0.3).count == 3 and Replay(10, 0.29).count == 2 and Replay(10, 1.0).count == 10
