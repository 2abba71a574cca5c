"""The ablation benchmark on a tiny demo: what is trained from what, and what its table says."""

from __future__ import annotations

import json

import ablation
import pytest

from umed_plugin.demo.pipeline import DemoSettings

SETTINGS = DemoSettings(
    tuning=16,
    rewarding=8,
    val=0,
    test=4,
    prior_epochs=1,
    tuning_epochs=2,
    rewarding_steps=2,
    queries=2,
    candidates=2,
    max_new_tokens=8,
    processes=1,
)


def test_rows_go_on_from_their_start_and_stage_1_continued_gets_the_same_wall_time(tmp_path):
    rows = [
        ablation.Row(
            "without ALR", flags=("--umed_rewards", "relevance", "--umed_reward_weights", "1", "--logging_steps", 1)
        ),
        ablation.Row("stage 1 continued", flags=None, like="without ALR"),
    ]
    run = ablation.SeedRun(tmp_path, 0, SETTINGS, early_epochs=1)
    ablation.run_all([run], rows, jobs=2)
    runs = tmp_path / "runs"
    state = json.loads((runs / "without-ALR-llava-mistral" / "trainer_state.json").read_text())
    assert any("reward/relevance" in entry for entry in state["log_history"])
    assert not any("reward/localization" in entry for entry in state["log_history"])
    config = json.loads((runs / "stage-1-continued-llava-mistral" / "config.json").read_text())
    assert config["_name_or_path"] == str(runs / "converged-llava-mistral")
    tuned, rewarded = (
        json.loads((runs / f"{name}-llava-mistral" / "trainer_state.json").read_text())
        for name in ("converged", "without-ALR")
    )
    seconds_a_step = tuned["log_history"][-1]["train_runtime"] / tuned["global_step"]
    continued = ablation.steps_taken(runs / "stage-1-continued-llava-mistral")
    assert continued == max(round(rewarded["log_history"][-1]["train_runtime"] / seconds_a_step), 1)

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    ablation.run_all([run], rows, jobs=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == written

    entries = ablation.results([run], rows)
    assert [entry["name"] for entry in entries] == ["base", "stage 1, converged", "without ALR", "stage 1 continued"]
    assert ablation.markdown(entries).count("\n") == 5


def test_differences_are_paired_with_the_start_and_pooled_over_seeds(tmp_path):
    class Seed:
        def __init__(self, before, after):
            self.answers = {"converged": before, "row": after, "base": before}

        def cases(self, name):
            return [
                {"accuracy": value, "set_iou": value, "vision_relevance": value, "true_boxes": boxes}
                for value, boxes in self.answers[name]
            ]

    box, none = [[0, 0, 1, 1]], []
    runs = [Seed([(0.0, box), (1.0, none)], [(0.5, box), (0.0, none)]), Seed([(0.2, box)] * 2, [(0.4, box)] * 2)]
    entry = ablation.results(runs, [ablation.Row("row")])[-1]
    assert entry["accuracy_difference"] == pytest.approx((0.5 - 1 + 0.2 + 0.2) / 4)
    assert entry["mean IoU_difference"] == pytest.approx((0.5 + 0.2 + 0.2) / 3)
    assert [seed[0] for seed in entry["mean IoU_by_seed"]] == pytest.approx([0.5, 0.2])
