"""What stage 2 logs: means over all that was sampled, and how often candidates are written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from umed_plugin.flags.definition import UmedFlags
from umed_plugin.model.forward import Candidates
from umed_plugin.training.step_metrics import StepMetrics

NAMES = ["reward/iou", "reward/total", "groups_without_signal", "answer_tokens", "answers_cut_off", "kl", "own/calls"]


def metrics_of(names=NAMES, others=None, **flags):
    """Metrics of a rank alone; ``others`` are the numbers that further ranks give to `means`."""

    def gather(own):
        return own if others is None else torch.cat([own, others])

    args = SimpleNamespace(device="cpu", world_size=1)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(gather=gather), args=args)
    return StepMetrics(trainer, UmedFlags(umed_stage="rewarding", **flags), names)


def add_rollout(metrics, rewards, tokens, ended, iou):
    """A sampling of as many questions as there are rows of rewards; ``iou`` are the values of a reward that can be scored."""
    rewards = torch.tensor(rewards)
    count = rewards.numel()
    answers = Candidates(torch.zeros(count, tokens), torch.ones(count, tokens))
    values = [*iou, *[None] * (count - len(iou))]
    metrics.add_rewards({"iou": values}, rewards, answers, torch.full((count,), ended))


def test_an_extra_sampling_of_one_question_counts_as_one_question():
    metrics = metrics_of()
    add_rollout(metrics, [[0.5, 0.5]] + [[0.0, 1.0]] * 15, tokens=4, ended=True, iou=[0.25] * 32)
    add_rollout(metrics, [[3.0, 3.0]], tokens=21, ended=False, iou=[0.75])
    metrics.add({"kl": 0.1, "own/calls": 3.0})
    metrics.add({"kl": 0.3})
    assert metrics.means() == pytest.approx(
        {
            "reward/iou": (32 * 0.25 + 0.75) / 33,
            "reward/total": (16 * 0.5 + 3) / 17,
            "groups_without_signal": 2 / 17,
            "answer_tokens": (16 * 4 + 21) / 17,
            "answers_cut_off": 1 / 17,
            "kl": 0.2,
            "own/calls": 3.0,
        }
    )
    assert metrics.means() == {}


def test_ranks_count_by_what_they_measured_and_one_that_measured_nothing_or_nan_counts_nothing():
    others = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0], [0.5, 1.0]]])
    metrics = metrics_of(["reward/iou", "kl", "own/calls"], others)
    metrics.add({"reward/iou": 0.5}, 12)
    metrics.add({"own/calls": float("nan")})
    assert metrics.means() == pytest.approx({"reward/iou": (3 + 6) / 16, "own/calls": 0.5})
