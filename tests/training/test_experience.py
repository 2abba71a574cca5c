"""Rollouts: batches joined, minibatches taken out again, saved and loaded, without a number changing."""

from __future__ import annotations

import torch

from umed_plugin.training.advantages import masked_mean, masked_variance
from umed_plugin.training.experience import (
    Experience,
    Samples,
    grpo_experience,
    kl_per_answer,
    minibatch_order,
    ppo_experience,
    stacked,
)

K = 3


def samples(questions, tokens, seed, values=True):
    """Random answers of 1 to ``tokens`` tokens, one of them of full length."""
    shuffle = torch.Generator().manual_seed(seed)
    rows = questions * K
    lengths = torch.randint(1, tokens + 1, (rows,), generator=shuffle)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths[:, None]).long()

    def noise():
        return torch.randn(rows, tokens, generator=shuffle) * mask

    return Samples(
        [torch.full((2 + q,), 100 * seed + q) for q in range(questions)],
        torch.randn(questions, 4, 5, generator=shuffle),
        torch.randint(0, 50, (rows, tokens), generator=shuffle),
        mask,
        noise(),
        noise(),
        noise() if values else None,
        torch.randn(questions, K, generator=shuffle),
    )


def join(parts):
    """Samples of several batches as one rollout."""
    by_token = ("token_ids", "mask", "log_probs", "reference_log_probs", "values")
    return Samples(
        [ids for part in parts for ids in part.prompt_ids],
        torch.cat([part.image_features for part in parts]),
        **{name: stacked([getattr(part, name) for part in parts]) for name in by_token},
        rewards=torch.cat([part.rewards for part in parts]),
    )


def same(ours, theirs):
    """Whether two samples hold the same, padding apart."""
    kept = theirs.mask.bool()
    assert torch.equal(ours.mask, theirs.mask)
    assert all(torch.equal(a, b) for a, b in zip(ours.prompt_ids, theirs.prompt_ids))
    assert torch.equal(ours.image_features, theirs.image_features) and torch.equal(ours.rewards, theirs.rewards)
    for name in ("token_ids", "log_probs", "reference_log_probs", "values"):
        assert torch.equal(getattr(ours, name)[kept], getattr(theirs, name)[kept]), name


def test_a_joined_rollout_gives_back_its_batches():
    first, second = samples(2, 7, 1), samples(3, 4, 2)
    experience = grpo_experience(join([first, second]), 0.04, 1.0)
    same(experience.minibatch([0, 1]).samples, first)
    same(experience.minibatch([2, 3, 4]).samples, second)
    alone = grpo_experience(second, 0.04, 1.0)
    part = experience.minibatch([2, 3, 4])
    assert torch.equal(part.advantages, alone.advantages)
    (picked,) = experience.minibatch([3]).samples.prompt_ids
    assert torch.equal(picked, second.prompt_ids[1])


def test_shuffled_minibatches_hold_every_question_once_and_answers_stay_with_theirs():
    joined = join([samples(2, 7, 1), samples(2, 4, 2)])
    experience, _ = ppo_experience(joined, 0.1, 1.0, 1.0, 0.95)
    order = minibatch_order(4, 2, (42, 0, 1, 0))
    assert sorted(order) == [0, 1, 2, 3]
    assert order == minibatch_order(4, 2, (42, 0, 1, 0))
    orders = {tuple(minibatch_order(4, 2, (42, 0, update, 0))) for update in range(20)}
    assert len(orders) > 10, "each pass is shuffled anew"
    assert minibatch_order(4, 1, (42, 0, 1, 0)) == [0, 1, 2, 3]
    for q in order:
        part, rows = experience.minibatch([q]), slice(q * K, (q + 1) * K)
        tokens = part.samples.mask.shape[1]
        assert tokens == joined.mask[rows].sum(dim=1).max()
        for whole, got in [
            (joined.token_ids, part.samples.token_ids),
            (joined.values, part.samples.values),
            (experience.advantages, part.advantages),
            (experience.returns, part.returns),
        ]:
            assert torch.equal(got, whole[rows, :tokens])


def test_advantages_are_whitened_over_the_rollout_and_the_reward_moves_them():
    joined = join([samples(2, 7, 1), samples(2, 4, 2)])
    experience, figures = ppo_experience(joined, 0.1, 1.0, 1.0, 0.95)
    assert abs(masked_mean(experience.advantages, joined.mask)) < 1e-5
    assert abs(masked_variance(experience.advantages, joined.mask) - 1) < 1e-4
    more, more_figures = ppo_experience(joined, 0.1, 2.0, 1.0, 0.95)
    assert not torch.allclose(more.returns, experience.returns)
    assert figures.keys() == more_figures.keys() == {"returns_mean", "advantage_std", "explained_variance"}


def test_kl_is_summed_over_an_answers_tokens():
    s = samples(2, 7, 1)
    expected = [
        sum((s.log_probs[n, t] - s.reference_log_probs[n, t]).item() for t in range(int(s.mask[n].sum())))
        for n in range(2 * K)
    ]
    assert abs(kl_per_answer(s.log_probs, s.reference_log_probs, s.mask) - torch.tensor(expected)).max() < 1e-5


def test_a_saved_rollout_is_loaded_as_it_was(tmp_path):
    for name, experience in {
        "ppo": ppo_experience(samples(2, 5, 3), 0.1, 1.0, 1.0, 0.95)[0],
        "grpo": grpo_experience(samples(2, 5, 3, values=False), 0.04, 1.0),
    }.items():
        experience.save(tmp_path / name)
        loaded = Experience.load(tmp_path / name, "cpu")
        assert torch.equal(loaded.advantages, experience.advantages) and loaded.kl_coef == experience.kl_coef
        assert (loaded.returns is None) == (experience.returns is None) == (name == "grpo")
        for field in ("image_features", "token_ids", "mask", "log_probs", "reference_log_probs", "rewards"):
            assert torch.equal(getattr(loaded.samples, field), getattr(experience.samples, field)), field
        assert [ids.tolist() for ids in loaded.samples.prompt_ids] == [
            ids.tolist() for ids in experience.samples.prompt_ids
        ]
