"""What stage 2 logs: means over all that was sampled, and how often candidates are written."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from umed_plugin.flags.definition import UmedFlags
from umed_plugin.model.forward import Candidates
from umed_plugin.training.schedule_check import ScheduleCheck
from umed_plugin.training.step_metrics import ScoredCandidates, StepMetrics, takes_metrics

NAMES = ["reward/iou", "reward/total", "groups_without_signal", "answer_tokens", "answers_cut_off", "kl", "own/calls"]


RECORD = {
    "id": "1",
    "image": "1.png",
    "objects": {"ref": [], "bbox": []},
    "provenance": {"image_aspect_ratio": "pad"},
    "conversations": [{"value": "Where?"}],
}


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


def logging_metrics(folder, every, **flags):
    """Metrics of a first rank that writes candidates into a folder."""
    metrics = metrics_of(umed_log_candidates=every, umed_num_candidates=2, **flags)
    trainer = metrics._trainer
    trainer.is_world_process_zero = lambda: True
    trainer.callback_handler = SimpleNamespace(callbacks=[])
    trainer.train_dataset = SimpleNamespace(data_args=SimpleNamespace(image_folder=str(folder)))
    trainer.args.output_dir = str(folder)
    return metrics


def log_steps(folder, rollouts, steps_per_rollout=1, minibatches=1, every=10):
    """The steps whose candidates a run writes that samples at these steps."""
    flags = {"umed_updates_per_rollout": steps_per_rollout // minibatches, "umed_minibatches_per_rollout": minibatches}
    metrics = logging_metrics(folder, every, **flags)
    scored = ScoredCandidates(["a", "b"], {"iou": [0.0, 1.0]}, {}, {}, torch.tensor([[0.0, 1.0]]))
    for step in rollouts:
        metrics._trainer.state = SimpleNamespace(global_step=step)
        metrics.hold_candidates(scored, [RECORD] * 2, [1])
        metrics.write_candidates()
    file = folder / "candidates.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def test_extra_samplings_and_what_is_thrown_away_are_marked(tmp_path):
    metrics = logging_metrics(tmp_path, 1)
    metrics._trainer.state = SimpleNamespace(global_step=3)
    scored = ScoredCandidates(["a", "b"] * 2, {"iou": [0.0, 1.0] * 2}, {}, {}, torch.tensor([[0.0, 1.0]] * 2))
    for _ in range(3):
        metrics.hold_candidates(scored, [RECORD] * 4, [1, 1])
    assert not (tmp_path / "candidates.jsonl").exists(), "it is not known yet which are learnt from"
    metrics.write_candidates([(1, 1), (0, 1), (2, 0)])
    lines = [json.loads(line) for line in (tmp_path / "candidates.jsonl").read_text().splitlines()]
    found = [(line.get("extra_sampling", 0), line.get("learnt_from", True)) for line in lines]
    assert found == [(0, False), (0, True), (1, False), (1, True), (2, True), (2, False)]
    metrics.write_candidates()
    assert len((tmp_path / "candidates.jsonl").read_text().splitlines()) == 6


def test_candidates_are_written_every_so_many_steps(tmp_path):
    assert log_steps(tmp_path, range(41)) == [0, 10, 20, 30, 40]


def test_candidates_of_rollouts_that_feed_several_steps_are_written_as_often(tmp_path):
    assert log_steps(tmp_path, range(0, 49, 4), 4, minibatches=2) == [0, 12, 20, 32, 40]


def test_rollouts_longer_than_the_interval_are_all_written(tmp_path):
    assert log_steps(tmp_path, range(0, 81, 16), 16) == [0, 16, 32, 48, 64, 80]


def test_a_resumed_run_writes_the_candidates_that_the_whole_run_writes(tmp_path):
    assert log_steps(tmp_path, range(24, 49, 4), 4) == [32, 40]


def test_no_candidates_are_written_by_default(tmp_path):
    assert log_steps(tmp_path, range(0, 9, 4), 4, every=0) == []


@pytest.mark.parametrize(
    ("per_rollout", "max_steps", "starts", "expected"),
    [
        (1, 5, range(5), [0, 0.25, 0.5, 0.75, 1]),
        (2, 6, range(0, 6, 2), [0, 0.5, 1]),
        (2, 5, range(0, 5, 2), [0, 0.5, 1]),
        (2, 6, [1, 3, 5], [0, 0.5, 1]),
        (4, 4, [0], [0]),
        (1, 1, [0], [0]),
    ],
    ids=["each step", "two steps", "a last rollout cut short", "lost and sampled anew", "one rollout", "one step"],
)
def test_the_first_rollout_begins_the_run_and_the_last_one_ends_it(per_rollout, max_steps, starts, expected):
    metrics = metrics_of(umed_updates_per_rollout=per_rollout)
    metrics._trainer.state = state = SimpleNamespace(max_steps=max_steps)
    found = []
    for state.global_step in starts:
        found.append(metrics.progress())
    assert found == expected


@pytest.mark.parametrize(("max_steps", "weights", "said"), [(2, "0..1", True), (3, "0..1", False), (2, "2", False)])
def test_a_run_of_one_rollout_says_that_its_weights_stay(max_steps, weights, said, capsys):
    flags = UmedFlags(umed_rewards="localization", umed_reward_weights=weights, umed_updates_per_rollout=2)
    ScheduleCheck(flags).on_train_begin(SimpleNamespace(process_index=0), SimpleNamespace(max_steps=max_steps), None)
    assert ("each weight keeps its first value" in capsys.readouterr().err) == said


def test_the_last_line_of_a_run_takes_what_no_line_of_a_step_has():
    state = SimpleNamespace(log_history=[{"loss": 1.0, "step": 4}, {"val/iou": 0.5, "step": 5}], global_step=5)
    assert takes_metrics({"loss": 1.0}, state) and takes_metrics({"train_loss": 1.0}, state)
    assert not takes_metrics({"val/iou": 0.5}, state)
    state.log_history.append({"loss": 1.0, "step": 5})
    assert not takes_metrics({"train_loss": 1.0}, state)
