"""GRPO's advantages, losses and KL against values worked by hand and against autograd; PPO's are in test_ppo_oracle.py."""

from __future__ import annotations

import math

import pytest
import torch

from umed_plugin.training.advantages import group_advantages, has_signal
from umed_plugin.training.objective import (
    ObjectiveSettings,
    PolicyTensors,
    ValueTensors,
    clipped_policy_loss,
    grpo_objective,
    kl_to_reference,
    mean_over_answers,
    ppo_objective,
    token_weights,
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
    undivided = group_advantages(rewards, 3.0, 1.0)
    torch.testing.assert_close(undivided, torch.tensor([[-3.0, 3.0], [-0.3, 0.3], [0, 0]]), atol=1e-6, rtol=0)


def test_ratio_is_clipped_on_the_side_that_the_advantage_pushes_to():
    new = torch.tensor([[math.log(1.5)], [math.log(0.5)], [math.log(1.5)], [math.log(0.5)]])
    advantages = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    loss = clipped_policy_loss(new, torch.zeros_like(new), advantages, 0.2)
    torch.testing.assert_close(loss[:, 0], torch.tensor([-1.2, -0.5, 1.5, 0.8]))


def test_dapo_lets_the_ratio_rise_further_than_it_may_fall():
    new = torch.tensor([[1.5], [1.25], [0.7], [0.75], [1.5], [0.5]]).log().requires_grad_(True)
    advantages = torch.tensor([[1.0], [1.0], [-1.0], [-1.0], [-1.0], [1.0]])
    loss = clipped_policy_loss(new, torch.zeros_like(new), advantages, 0.2, 0.28)
    torch.testing.assert_close(loss[:, 0], torch.tensor([-1.28, -1.25, 0.8, 0.8, 1.5, -0.5]))
    loss.sum().backward()
    assert [bool(gradient) for gradient in new.grad[:, 0]] == [False, True, False, False, True, True]


def test_kl_is_zero_for_equal_policies_and_its_mean_is_the_true_kl():
    assert kl_to_reference(torch.tensor([[-1.0]]), torch.tensor([[-1.0]])).item() == 0
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    expected = (policy * (policy / reference).log()).sum()
    estimate = (policy * kl_to_reference(policy.log(), reference.log())).sum()  # expectation under the policy
    torch.testing.assert_close(estimate, expected)


def test_every_answer_weighs_the_same():
    values, mask = torch.tensor([[1.0, 1.0, 1.0], [4.0, 9.0, 9.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert mean_over_answers(values, mask.float()).item() == pytest.approx(2.5)


def test_tokens_weigh_as_the_papers_add_them_up():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])  # the last one is left out
    expected = {"grpo": (1 / 8, 1 / 2), "dapo": (1 / 5, 1 / 5), "dr_grpo": (1 / 20, 1 / 20)}
    for name, (of_long, of_short) in expected.items():
        rows = torch.tensor([[of_long] * 4, [of_short, 0, 0, 0], [0.0] * 4])
        torch.testing.assert_close(token_weights(mask, None, name, max_tokens=10), rows)
    with pytest.raises(ValueError, match="Allowed: grpo, dapo, dr_grpo"):
        token_weights(mask, None, "bnpo")


def test_the_kl_and_the_entropy_are_added_up_as_the_policy_is_and_logged_as_means():
    values = torch.tensor([[-1.0, -2.0, -1.5], [-0.5, 0.0, 0.0]])
    policy = PolicyTensors(values, values, values - 0.3, values.abs())
    mask, k3 = torch.tensor([[1, 1, 1], [1, 0, 0]]), math.exp(-0.3) + 0.3 - 1
    for name, kl, entropy in (("grpo", k3, 1.0), ("dapo", k3, 1.25), ("dr_grpo", 4 * k3 / 12, 5 / 12)):
        settings = ObjectiveSettings(0.2, entropy_coef=0.01, aggregation=name, max_tokens=6)
        loss, terms = grpo_objective(policy, torch.ones(2, 3), mask, settings, kl_coef=0.1)
        advantage = -4 / 12 if name == "dr_grpo" else -1.0
        assert loss.item() == pytest.approx(advantage + 0.1 * kl - 0.01 * entropy, rel=1e-4)
        assert terms["policy_loss"].item() == pytest.approx(advantage)
        assert terms["kl"].item() == pytest.approx(k3, rel=1e-4)
        assert terms["entropy"].item() == pytest.approx(1.0 if name == "grpo" else 1.25)


SETTINGS = ObjectiveSettings(clip_range=0.2, entropy_coef=0.01)


def objective(log_probs, settings=SETTINGS, **changes):
    others = {
        "old_log_probs": torch.full((2, 2), -1.0),
        "reference_log_probs": torch.full((2, 2), -1.2),
        "entropy": torch.full((2, 2), 0.5),
    }
    return grpo_objective(
        PolicyTensors(log_probs, **{**others, **changes}),
        advantages=torch.tensor([[1.0, 1.0], [-1.0, -1.0]]),
        mask=torch.tensor([[1, 1], [1, 0]]),
        settings=settings,
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
    _, terms = objective(torch.tensor([[-1.0, -0.5], [-1.0, 9.0]]), ObjectiveSettings(0.2, clip_range_high=0.7))
    assert terms["clip_fraction"].item() == 0, "a ratio of 1.65"
    _, terms = objective(torch.tensor([[-1.0, -1.5], [-1.0, 9.0]]), ObjectiveSettings(0.2, clip_range_high=0.7))
    assert terms["clip_fraction"].item() == pytest.approx(0.25), "a ratio of 0.61"


def test_ppo_clips_as_far_up_as_asked():
    ratio = torch.tensor([[1.25, 1.5, 0.7, 0.9]])
    policy = PolicyTensors(ratio.log(), torch.zeros(1, 4), None, torch.zeros(1, 4))
    zero, advantages = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    _, terms = ppo_objective(
        policy, ValueTensors(zero, zero, zero), advantages, zero + 1, ObjectiveSettings(0.2, clip_range_high=0.28)
    )
    assert terms["clip_fraction"].item() == pytest.approx(0.5)
    assert terms["policy_loss"].item() == pytest.approx((-1.25 - 1.28 + 0.8 + 0.9) / 4)
