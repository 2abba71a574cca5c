"""Answers that never end: kept, left out of loss and statistics, or penalised."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from umed_plugin.model.forward import Candidates
from umed_plugin.rewards import combine_rewards
from umed_plugin.training.advantages import group_advantages
from umed_plugin.training.cut_off import CutOff, ended
from umed_plugin.training.experience import Samples, grpo_experience, ppo_experience
from umed_plugin.training.experience_maker import ExperienceMaker
from umed_plugin.training.objective import (
    ObjectiveSettings,
    PolicyTensors,
    StepSize,
    ValueTensors,
    grpo_objective,
    ppo_objective,
)
from umed_plugin.training.value_head import ValueHead

EOS, Q, K, T = 2, 6, 4, 5


def rollout(seed: int) -> tuple[Samples, torch.Tensor]:
    """Random answers, about a third of them cut off at T tokens; those that end."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (Q * K,), generator=draw)
    cut = torch.rand(Q * K, generator=draw) < 0.35
    lengths[cut] = T
    mask = (torch.arange(T) < lengths[:, None]).long()
    token_ids = torch.randint(5, 50, (Q * K, T), generator=draw)
    token_ids[torch.arange(Q * K)[~cut], lengths[~cut] - 1] = EOS

    def noise() -> torch.Tensor:
        return torch.randn(Q * K, T, generator=draw) * mask

    rewards = torch.rand(Q, K, generator=draw)
    features = torch.zeros(Q, 1, 1)
    return Samples([torch.zeros(1)] * Q, features, token_ids, mask, noise(), noise(), noise(), rewards), ~cut


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_ends_with_its_eos_and_padding_is_not_one(seed):
    samples, expected = rollout(seed)
    padded = samples.token_ids.masked_fill(samples.mask == 0, EOS)
    assert torch.equal(ended(Candidates(padded, samples.mask), EOS), expected)


@pytest.mark.parametrize("seed", range(5))
def test_a_penalised_answer_never_gets_more_than_one_that_ends_and_ended_ones_keep_their_reward(seed):
    samples, has_ended = rollout(seed)
    rewards = CutOff("penalise", 1.0).rewards(samples.rewards, has_ended)
    of_ended = has_ended.view(Q, K)
    assert torch.equal(rewards[of_ended], samples.rewards[of_ended])
    torch.testing.assert_close(rewards[~of_ended], samples.rewards[~of_ended] - 1)
    assert rewards[~of_ended].max() <= rewards[of_ended].min()
    same = CutOff("penalise", 1.0).rewards(samples.rewards, torch.zeros(Q * K, dtype=torch.bool))
    torch.testing.assert_close(group_advantages(same), group_advantages(samples.rewards), rtol=1e-3, atol=1e-3)
    assert torch.equal(CutOff("keep", 1.0).rewards(samples.rewards, has_ended), samples.rewards)
    assert CutOff("keep", 1.0).counted(has_ended) is CutOff("penalise", 1.0).counted(has_ended) is None


@pytest.mark.parametrize("seed", range(5))
def test_whatever_a_masked_answer_got_changes_no_advantage_of_the_others(seed):
    samples, has_ended = rollout(seed)
    counted = CutOff("mask", 1.0).counted(has_ended).view(Q, K)
    other = torch.where(counted, samples.rewards, 9.0)
    advantages = group_advantages(samples.rewards, counted=counted)
    torch.testing.assert_close(advantages, group_advantages(other, counted=counted))
    assert (advantages[~counted] == 0).all()
    for row, keep, rewards in zip(advantages, counted, samples.rewards):
        if keep.sum() > 1:  # as if the question had had only these answers
            torch.testing.assert_close(row[keep], group_advantages(rewards[keep][None])[0], rtol=1e-4, atol=1e-5)
        else:
            assert (row == 0).all()
    # None leaves a term out of the maximum too.
    values = {"localization": [r if keep else None for r, keep in zip(other.flatten().tolist(), has_ended.tolist())]}
    combined = combine_rewards(values, K, weights={"localization": 1.0})
    assert combined.max() <= 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_masked_answer_gets_no_gradient_and_the_loss_is_that_of_the_others(algorithm, seed):
    samples, has_ended = rollout(seed)
    samples = dataclasses.replace(samples, counted=has_ended)
    log_probs = samples.log_probs.clone().requires_grad_(True)
    values = samples.values.clone().requires_grad_(True)
    settings = ObjectiveSettings(0.2, entropy_coef=0.1, value_coef=0.1, value_clip_range=0.2)

    def loss_of(part: Samples, log_probs, values, advantages, returns):
        policy = PolicyTensors(log_probs, part.log_probs, part.reference_log_probs, log_probs.square())
        if algorithm == "grpo":
            return grpo_objective(policy, advantages, part.loss_mask, settings, 0.04)[0]
        value = ValueTensors(values, part.values, returns)
        return ppo_objective(policy, value, advantages, part.loss_mask, settings)[0]

    if algorithm == "grpo":
        whole, rows = grpo_experience(samples, 0.04, 1.0), has_ended
        returns = torch.zeros(Q * K, T)
    else:
        whole, rows = ppo_experience(samples, 0.1, 1.0, 1.0, 0.95)[0], has_ended
        returns = whole.returns
        kept = whole.advantages[rows][samples.mask[rows].bool()]
        assert abs(kept.mean()) < 1e-5 and abs(kept.var() - 1) < 1e-3, "whitened over what is learnt from"
    loss = loss_of(samples, log_probs, values, whole.advantages, returns)
    loss.backward()
    assert (log_probs.grad[~rows] == 0).all() and log_probs.grad[rows].abs().sum() > 0
    assert values.grad is None or (values.grad[~rows] == 0).all()
    others = dataclasses.replace(
        samples,
        counted=None,
        **{n: getattr(samples, n)[rows] for n in ("mask", "log_probs", "reference_log_probs", "values")},
    )
    alone = loss_of(others, log_probs[rows], values[rows], whole.advantages[rows], returns[rows])
    torch.testing.assert_close(loss, alone)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "ppo"])
def test_micro_batches_and_ranks_add_up_to_the_mean_over_the_whole_step(kind):
    """Two ranks with two unequal micro-batches each; one answer in each is left out."""
    draw = torch.Generator().manual_seed(0)
    mask = (torch.arange(T) < torch.randint(1, T + 1, (16, 1), generator=draw)).long()
    mask[::5] = 0
    values = torch.randn(16, T, generator=draw)
    parts = [slice(0, 5), slice(5, 8), slice(8, 12), slice(12, 16)]

    def terms(part: slice, step: StepSize | None) -> torch.Tensor:
        """Loss, and all that is logged of it."""
        policy = PolicyTensors(values[part], values[part] * 0.9, values[part] * 0.8, values[part].square())
        advantages = values[part].roll(1, dims=1)
        settings = ObjectiveSettings(0.2, 0.3, 0.1, 0.2, aggregation=kind, max_tokens=T)
        if kind != "ppo":
            loss, logged = grpo_objective(policy, advantages, mask[part], settings, 0.04, step)
        else:
            value = ValueTensors(values[part], values[part] * 0.5, advantages)
            loss, logged = ppo_objective(policy, value, advantages, mask[part], settings, step)
        return torch.stack([loss, *logged.values()])

    size = StepSize.of(mask)
    assert (size.answers, size.tokens) == (12, mask.sum())
    each = StepSize(size.answers / len(parts), size.tokens / len(parts))
    step = torch.stack([terms(part, each) for part in parts]).mean(dim=0)
    torch.testing.assert_close(step, terms(slice(0, 16), None))
    alone = torch.stack([terms(part, None) for part in parts]).mean(dim=0)
    assert (alone - step).abs().max() > 1e-2, "a mean of means is another one"
    empty = grpo_objective(
        PolicyTensors(*[values] * 2, None, values), values, mask * 0, ObjectiveSettings(0.2), 0.0, StepSize(0, 0)
    )[0]
    assert empty == 0, "all answers of a step are left out"


def test_a_new_value_network_begins_at_the_mean_of_the_answers_that_count_on_all_ranks():
    samples, counted = rollout(0)
    flags = SimpleNamespace(umed_reward_coef=2.0)
    ranks = SimpleNamespace(means_over_ranks=lambda total, answers: [(total + 3.0) / 2, (answers + 1) / 2])
    head = ValueHead(4)
    left = dataclasses.replace(samples, counted=counted)
    values = ExperienceMaker._begin_values(SimpleNamespace(flags=flags, metrics=ranks), left, head).values
    known = samples.rewards.flatten()[counted]
    torch.testing.assert_close(values, torch.full_like(values, 2 * (known.sum().item() + 3) / (len(known) + 1)))
