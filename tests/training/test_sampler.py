"""The order of queries: a permutation, its own in each epoch, epochs over a rollout one after the other."""

import torch

from umed_plugin.training.sampler import EpochSampler


def test_each_epoch_is_another_permutation_and_the_same_in_another_run():
    first, second = EpochSampler(20, seed=3), EpochSampler(20, seed=3)
    epochs = [list(first), list(first)]
    torch.manual_seed(99)  # the global random state has no say
    assert sorted(epochs[0]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert [list(second), list(second)] == epochs
    assert list(EpochSampler(20, seed=4)) != epochs[0]


def test_epochs_over_a_rollout_follow_each_other_and_the_rest_is_left_out():
    sampler = EpochSampler(10, seed=0, rollout_size=4, rollout_epochs=3)
    order = list(sampler)
    assert len(order) == len(sampler) == 24
    assert order[:4] == order[4:8] == order[8:12]
    assert order[12:16] == order[16:20] == order[20:24]
    assert len({*order[:4], *order[12:16]}) == 8
    assert sampler.reading_order(0) == [*order[:4], *order[12:16]], "a rollout is read once"
    assert [sampler.rollout(n) for n in (0, 1, 2)] == [(0, 0), (0, 1), (1, 0)]
    assert sampler.reading_order(1)[:4] == sampler.order(1)[:4]
    assert sampler.order(1) != order
    assert len(list(EpochSampler(10, seed=0, rollout_size=4))) == 8, (
        "rollouts are whole also when they are passed over once"
    )
