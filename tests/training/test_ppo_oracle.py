"""PPO's rewards, advantages, losses and KL coefficient against TRL 0.9's own PPOTrainer, on random answers with padding."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from umed_plugin.training.advantages import (
    KLCoefficient,
    explained_variance,
    generalised_advantages,
    masked_variance,
    token_rewards,
    whiten,
)
from umed_plugin.training.objective import ObjectiveSettings, PolicyTensors, ValueTensors, ppo_objective

core = pytest.importorskip(
    "trl.core", reason="TRL's classic PPO, the oracle, is in TRL below 0.10: in the pinned stack alone"
)
from trl import PPOConfig, PPOTrainer  # noqa: E402
from trl.core import masked_var, masked_whiten  # noqa: E402
from trl.trainer.utils import AdaptiveKLController  # noqa: E402

ROWS, TOKENS, VOCABULARY = 6, 9, 13
SETTINGS = ObjectiveSettings(clip_range=0.2, value_coef=0.1, value_clip_range=0.2)


def trl_trainer(**config):
    """TRL's trainer without a model: what the methods below need is its configuration."""
    trainer = PPOTrainer.__new__(PPOTrainer)
    trainer.config = PPOConfig(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, **{"gamma": 0.97, "lam": 0.9, **config})
    trainer.kl_ctl = SimpleNamespace(value=0.3)
    return trainer


@pytest.fixture(params=[0, 1, 2])
def answers(request):
    """Random answers of 1 to 9 tokens; what lies behind them is noise where a pass gives noise, and 0 where ours gives 0."""
    shuffle = torch.Generator().manual_seed(request.param)
    lengths = torch.tensor([TOKENS, 1, *torch.randint(2, TOKENS, (ROWS - 2,), generator=shuffle).tolist()])
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()

    def noise(*shape):
        return torch.randn(*shape, generator=shuffle)

    old = -noise(ROWS, TOKENS).abs() * mask
    return SimpleNamespace(
        mask=mask,
        old=old,
        reference=(old + 0.3 * noise(ROWS, TOKENS)) * mask,
        new=(old + 0.3 * noise(ROWS, TOKENS)) * mask,
        values=noise(ROWS, TOKENS),
        new_values=noise(ROWS, TOKENS),
        scores=noise(ROWS),
        logits=noise(ROWS, TOKENS, VOCABULARY),
    )


def close(ours, theirs, mask=None):
    keep = ... if mask is None else mask.bool()
    torch.testing.assert_close(ours[keep], theirs[keep], atol=1e-5, rtol=1e-5)


def advantages_of(a, gamma=0.97, gae_lambda=0.9):
    rewards = token_rewards(a.scores, a.old, a.reference, a.mask, 0.3)
    advantages, returns = generalised_advantages(rewards, a.values, a.mask, gamma, gae_lambda)
    return rewards, whiten(advantages, a.mask), returns


@pytest.mark.parametrize("horizon", [(0.97, 0.9), (1.0, 0.95), (1.0, 1.0), (0.5, 0.0)])
def test_rewards_advantages_and_returns_are_those_of_trl(answers, horizon):
    a, (gamma, gae_lambda) = answers, horizon
    trl = trl_trainer(gamma=gamma, lam=gae_lambda)
    their_rewards, *_ = trl.compute_rewards(a.scores, a.old, a.reference, a.mask)
    _, their_advantages, their_returns = trl.compute_advantages(a.values, their_rewards, a.mask)
    rewards, advantages, returns = advantages_of(a, gamma, gae_lambda)
    close(rewards, their_rewards, a.mask)
    close(advantages, their_advantages, a.mask)
    close(returns, their_returns)
    assert (advantages * (1 - a.mask)).eq(0).all() and (returns * (1 - a.mask)).eq(0).all()


def test_values_behind_an_answer_move_nothing(answers):
    a = answers
    before = advantages_of(a)
    a.values = torch.where(a.mask.bool(), a.values, 1e3)
    for ours, changed in zip(before, advantages_of(a)):
        assert torch.equal(ours, changed)


def test_losses_and_gradients_are_those_of_trl(answers):
    """Clipping is at work on either side for policy and value, or a loss without it would pass too."""
    a = answers
    _, advantages, returns = advantages_of(a)
    inputs = [[a.new.clone().requires_grad_(), a.new_values.clone().requires_grad_()] for _ in range(2)]
    (ours_new, ours_values), (their_new, their_values) = inputs

    policy = PolicyTensors(ours_new, a.old, None, torch.zeros_like(a.old))
    value = ValueTensors(ours_values, a.values, returns)
    loss, terms = ppo_objective(policy, value, advantages, a.mask, SETTINGS)
    policy_loss, value_loss, stats = trl_trainer().loss(
        a.old, a.values, a.logits, their_values, their_new, a.mask, advantages, returns
    )
    close(loss, policy_loss + value_loss)
    for ours, theirs in {
        "policy_loss": "loss/policy",
        "value_loss": "loss/value",
        "clip_fraction": "policy/clipfrac",
        "value_clip_fraction": "val/clipfrac",
    }.items():
        close(terms[ours], stats[theirs])
    assert 0.1 < terms["clip_fraction"] < 0.9 and 0.1 < terms["value_clip_fraction"] < 0.9

    loss.backward()
    (policy_loss + value_loss).backward()
    close(ours_new.grad, their_new.grad)
    close(ours_values.grad, their_values.grad)
    assert (ours_new.grad * (1 - a.mask)).eq(0).all() and (ours_values.grad * (1 - a.mask)).eq(0).all()


def test_entropy_bonus_lowers_the_loss_by_its_mean_over_tokens(answers):
    a = answers
    entropy = torch.randn_like(a.old).abs().requires_grad_()
    zeros = torch.zeros_like(a.old)
    settings = ObjectiveSettings(clip_range=0.2, entropy_coef=0.5)
    loss, terms = ppo_objective(
        PolicyTensors(zeros, zeros, a.reference, entropy), ValueTensors(zeros, zeros, zeros), zeros, a.mask, settings
    )
    close(loss, -0.5 * entropy[a.mask.bool()].mean())
    close(terms["kl"], (a.reference.exp() - a.reference - 1)[a.mask.bool()].mean())
    loss.backward()
    close(entropy.grad, -0.5 * a.mask / a.mask.sum())


def test_whitening_and_variance_are_those_of_trl(answers):
    a = answers
    close(whiten(a.values, a.mask), masked_whiten(a.values, a.mask), a.mask)
    close(masked_variance(a.values, a.mask), masked_var(a.values, a.mask))
    alone = torch.zeros_like(a.mask)
    alone[0, 0] = 1
    assert whiten(a.values, alone).isfinite().all()  # TRL divides by zero here


def test_explained_variance_is_one_for_the_truth_and_zero_for_a_constant(answers):
    a = answers
    assert explained_variance(a.values, a.values, a.mask).item() == pytest.approx(1)
    assert explained_variance(torch.full_like(a.values, 3.0), a.values, a.mask).item() == pytest.approx(0, abs=1e-5)
    assert explained_variance(-a.values, a.values, a.mask).item() == pytest.approx(-3, abs=1e-4)


def test_adaptive_kl_coefficient_is_that_of_trl_for_small_steps():
    ours, theirs = KLCoefficient(0.1, target=6.0, horizon=1e6), AdaptiveKLController(0.1, 6.0, 1e6)
    for kl, answers in [(0.0, 64), (6.5, 128), (40.0, 64), (5.9, 16), (-3.0, 8)]:
        ours.update(kl, answers)
        theirs.update(kl, answers)
        assert ours.value == pytest.approx(theirs.value, rel=1e-9)
    assert ours.value != 0.1


@pytest.mark.parametrize(("kl", "factor"), [(0.0, math.exp(-0.2)), (40.0, math.exp(0.2))])
def test_the_kl_coefficient_stays_positive_and_changes_by_a_fifth_within_a_horizon(kl, factor):
    for answers, updates in ((512, 1), (10, 10), (100, 1)):
        coefficient = KLCoefficient(0.1, target=6.0, horizon=100)
        for _ in range(updates):
            coefficient.update(kl, answers)
        assert coefficient.value == pytest.approx(0.1 * factor ** (answers * updates / 100))


def test_the_kl_coefficient_is_fixed_without_a_target():
    fixed = KLCoefficient(0.1)
    fixed.update(100.0, 64)
    assert fixed.value == 0.1
