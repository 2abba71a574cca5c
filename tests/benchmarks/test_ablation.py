"""The ablation benchmark on a tiny demo: what is trained from what, and what its table says."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import ablation
import pytest
from support import forked

from umed_plugin.commands import processes
from umed_plugin.commands.demo.pipeline import DemoSettings
from umed_plugin.evaluation.metrics.metric import Row

pytestmark = pytest.mark.one_stack
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


def test_rows_go_on_from_their_start_and_stage_1_continued_gets_the_same_wall_time(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=forked.popen, STDOUT=subprocess.STDOUT))
    rows = [
        ablation.Row(
            "without ALR", flags=("--umed_rewards", "relevance", "--umed_reward_weights", "1", "--logging_steps", 1)
        ),
        ablation.Row("stage 1 continued", flags=None),
        ablation.Row("once more", start="stage 1 continued", flags=None),
    ]
    run = ablation.SeedRun(tmp_path, 0, SETTINGS)
    ablation.run_all([run], rows, jobs=2)
    state = {name: trainer_state(tmp_path, name) for name in ("early", "without-ALR", "stage-1-continued", "once-more")}
    logged = {name for entry in state["without-ALR"]["log_history"] for name in entry}
    assert "reward/relevance" in logged and "reward/localization" not in logged
    assert started_from(tmp_path, "without-ALR") == started_from(tmp_path, "stage-1-continued") == "early-llava-mistral"
    assert started_from(tmp_path, "once-more") == "stage-1-continued-llava-mistral"
    tuned, rewarded = state["early"], state["without-ALR"]
    seconds_a_step = tuned["log_history"][-1]["train_runtime"] / tuned["global_step"]
    steps = max(round(rewarded["log_history"][-1]["train_runtime"] / seconds_a_step), 1)
    assert state["stage-1-continued"]["global_step"] == state["once-more"]["global_step"] == steps

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    ablation.run_all([run], rows, jobs=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == written

    entries = ablation.results([run], rows)
    assert [entry["name"] for entry in entries] == ["base", "stage 1", *(row.name for row in rows)]
    assert ablation.markdown(entries).count("\n") == 6


def trainer_state(folder, name) -> dict:
    return json.loads((folder / "runs" / f"{name}-llava-mistral" / "trainer_state.json").read_text())


def started_from(folder, name) -> str:
    """The folder of the checkpoint that a run was given, from the command at the head of its log."""
    words = shlex.split((folder / "logs" / f"{name}.log").read_text().splitlines()[0])
    return Path(words[words.index("--model_name_or_path") + 1]).name


def test_differences_are_paired_with_the_start_and_pooled_over_seeds(tmp_path):
    class Seed:
        def __init__(self, before, after):
            self.answers = {"early": before, "row": after, "base": before}

        def cases(self, name):
            grounded = ("mean_iou", "vision_relevance")  # a study without a lesion has none of the two
            return [
                Row(str(n), str(n), {"accuracy": value, **(dict.fromkeys(grounded, value) if boxes else {})})
                for n, (value, boxes) in enumerate(self.answers[name])
            ]

    box, none = [[0, 0, 1, 1]], []
    runs = [Seed([(0.0, box), (1.0, none)], [(0.5, box), (0.0, none)]), Seed([(0.2, box)] * 2, [(0.4, box)] * 2)]
    entry = ablation.results(runs, [ablation.Row("row")])[-1]
    assert entry["accuracy_difference"] == pytest.approx((0.5 - 1 + 0.2 + 0.2) / 4)
    assert entry["mean IoU_difference"] == pytest.approx((0.5 + 0.2 + 0.2) / 3)
    assert [seed[0] for seed in entry["mean IoU_by_seed"]] == pytest.approx([0.5, 0.2])


def test_some_rows_are_chosen_by_name_and_need_what_they_go_on_from():
    chosen = ablation.chosen_rows("full, GRPO on raw rewards; full, GRPO")
    assert [row.name for row in chosen] == ["full, GRPO", "full, GRPO on raw rewards"]
    for names, told in (
        ("full", "no row is named full"),
        ("full, GRPO;stage 1 continued, then once more", "goes on from 'stage 1 continued': name that row too"),
        ("stage 1 continued", "takes the time of a row of stage 2"),
    ):
        with pytest.raises(SystemExit) as refused:
            ablation.chosen_rows(names)
        assert told in str(refused.value)
