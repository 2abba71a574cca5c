"""GRPO's advantages, losses and KL against values worked by hand and against autograd; PPO's are in test_ppo_oracle.py."""

from __future__ import annotations

import math

import pytest
import torch

from umed_plugin.training.advantages import group_advantages, has_signal
from umed_plugin.training.objective import (
    ObjectiveSettings,
    PolicyTensors,
    clipped_policy_loss,
    grpo_objective,
    kl_to_reference,
    mean_over_answers,
)


def test_advantages_are_standardised_within_the_query():
    rewards = torch.tensor([[0.0, 2.0], [5.0, 5.0]])
    torch.testing.assert_close(group_advantages(rewards), torch.tensor([[-1.0, 1.0], [0.0, 0.0]]), atol=2e-4, rtol=0)
    torch.testing.assert_close(group_advantages(rewards, 3.0), 3 * group_advantages(rewards))


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-9])
def test_advantages_do_not_depend_on_the_size_of_the_rewards(size):
    rewards = torch.tensor([[0.2, 0.8], [0.5, 0.5]]) * size
    torch.testing.assert_close(group_advantages(rewards), torch.tensor([[-1.0, 1.0], [0.0, 0.0]]), atol=5e-4, rtol=0)
    assert has_signal(rewards).tolist() == [[True], [False]]
    assert not has_signal(torch.zeros(1, 4)).any()


def test_one_spread_for_all_queries_keeps_their_proportion():
    rewards = torch.tensor([[0.0, 2.0], [1.0, 1.2], [5.0, 5.0]])
    advantages = group_advantages(rewards, 1.0, torch.tensor(0.5))
    torch.testing.assert_close(advantages, torch.tensor([[-2.0, 2.0], [-0.2, 0.2], [0, 0]]), atol=1e-3, rtol=0)
    assert group_advantages(rewards[2:], 1.0, torch.tensor(0.0)).tolist() == [[0, 0]]


def test_ratio_is_clipped_on_the_side_that_the_advantage_pushes_to():
    new = torch.tensor([[math.log(1.5)], [math.log(0.5)], [math.log(1.5)], [math.log(0.5)]])
    advantages = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    loss = clipped_policy_loss(new, torch.zeros_like(new), advantages, 0.2)
    torch.testing.assert_close(loss[:, 0], torch.tensor([-1.2, -0.5, 1.5, 0.8]))


def test_kl_is_zero_for_equal_policies_and_its_mean_is_the_true_kl():
    assert kl_to_reference(torch.tensor([[-1.0]]), torch.tensor([[-1.0]])).item() == 0
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    expected = (policy * (policy / reference).log()).sum()
    estimate = (policy * kl_to_reference(policy.log(), reference.log())).sum()  # expectation under the policy
    torch.testing.assert_close(estimate, expected)


def test_every_answer_weighs_the_same():
    values, mask = torch.tensor([[1.0, 1.0, 1.0], [4.0, 9.0, 9.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert mean_over_answers(values, mask.float()).item() == pytest.approx(2.5)


def objective(log_probs, **changes):
    others = {
        "old_log_probs": torch.full((2, 2), -1.0),
        "reference_log_probs": torch.full((2, 2), -1.2),
        "entropy": torch.full((2, 2), 0.5),
    }
    return grpo_objective(
        PolicyTensors(log_probs, **{**others, **changes}),
        advantages=torch.tensor([[1.0, 1.0], [-1.0, -1.0]]),
        mask=torch.tensor([[1, 1], [1, 0]]),
        settings=ObjectiveSettings(clip_range=0.2, entropy_coef=0.01),
        kl_coef=0.1,
    )


def test_loss_is_the_sum_of_its_terms():
    loss, terms = objective(torch.full((2, 2), -1.0))
    k3 = math.exp(-0.2) + 0.2 - 1
    assert terms["policy_loss"].item() == pytest.approx(0.0)
    assert terms["kl"].item() == pytest.approx(k3, rel=1e-4)
    assert loss.item() == pytest.approx(0.1 * k3 - 0.01 * 0.5, rel=1e-3)


def test_gradient_raises_good_answers_lowers_bad_ones_and_spares_padding():
    log_probs = torch.full((2, 2), -1.0, requires_grad=True)
    objective(log_probs, reference_log_probs=None)[0].backward()
    assert log_probs.grad[0, 0] < 0 < log_probs.grad[1, 0]
    assert log_probs.grad[1, 1] == 0


def test_clip_fraction_counts_tokens_outside_the_range():
    _, terms = objective(torch.tensor([[-1.0, -0.5], [-1.0, 9.0]]))
    assert terms["clip_fraction"].item() == pytest.approx(0.25)  # one of two tokens, and none of one
