"""What a user's own reward may do in a run: be a class, start early, log metrics, stop the run."""

from __future__ import annotations

import json
import shlex

import pytest
from support.records import grounded_records
from support.umed_runs import TWO_PROCESSES, train_flags, umed_run

OWN = '''
class Slow:
    """Counts the teacher-forced passes between its start and its call, in which a judge would answer.

    It names its metrics as rewards did before `metric_names` and `metrics()`.
    """

    measures = ("own/passes_meanwhile", "own/started")
    stop = None

    def __init__(self):
        self.passes, self.calls, self.started = 0, 0, []

    def start(self, prompts, completions, **columns):
        assert "attention_on_lesion" not in columns and len(columns["record"]) == len(completions)
        if not self.started:
            import umed_plugin.training.answer_passes as passes
            for name in ("answer_pass", "attention_on_lesion"):  # the second makes its pass by itself
                setattr(passes, name, self.counting(getattr(passes, name)))
        self.started.append((list(prompts), list(completions)))
        self.passes = 0

    def counting(self, run_pass):
        def count(*positional, **keywords):
            self.passes += 1
            return run_pass(*positional, **keywords)

        return count

    def __call__(self, prompts, completions, *, attention_on_lesion, **columns):
        assert self.started[-1] == (list(prompts), list(completions))
        self.calls += 1
        if self.calls == 2:
            self.stop = "two calls are enough."
        return [None] * len(completions)

    def measured(self):
        return {"own/passes_meanwhile": self.passes, "own/started": len(self.started)}
'''
FLAGS = shlex.split(
    "--umed_stage rewarding --umed_num_candidates 2 --umed_max_new_tokens 8 --max_steps 4 --lora_enable True --lora_r 4"
    " --umed_rewards localization,vision_relevance,own:Slow"
)


@pytest.mark.parametrize(("packed", "passes"), [("True", 1), ("False", 2)])
def test_a_reward_starts_before_the_passes_logs_its_figures_and_can_stop_the_run(
    packed, passes, tiny_mistral, tmp_path
):
    records = grounded_records(tmp_path / "data")
    (tmp_path / "own.py").write_text(OWN)
    flags = train_flags(tiny_mistral, records, tmp_path / "out", *FLAGS, "--umed_packed", packed)
    run = umed_run(["python", "-m", "llava.train.train_mem", *flags], pythonpath=tmp_path)
    assert run.returncode == 1, run.stderr[-3000:]
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert f"umed: error: training stopped after step 2: two calls are enough. Saved: {checkpoint}" in run.stderr
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert [line["own/started"] for line in history] == [1, 2]
    # The reference's pass. The policy's own is for vision relevance alone: if packed, sampling's KV cache has what it needs.
    assert [line["own/passes_meanwhile"] for line in history] == [passes, passes]


OF_NUMPY = """
import os
import numpy as np

class Measures:
    metric_names = ("own/rank",)

    def __call__(self, prompts, completions, **columns):
        return [1.0] * len(completions)

    def metrics(self):
        rank = int(os.environ["RANK"])
        return {"own/rank": rank if rank else np.float64(0)}
"""


STEPS = """
steps: {finding: {nodule: [nodule], area: [abnormal area]}}
cases: [{finding: nodule}]
"""


def test_processes_of_which_one_measures_with_numpy_gather_the_same_kind_of_number(tiny_llama, tmp_path):
    records = grounded_records(tmp_path / "data")
    (tmp_path / "of_numpy.py").write_text(OF_NUMPY)
    (tmp_path / "steps.yaml").write_text(STEPS)
    stage = shlex.split(
        "--umed_stage rewarding --umed_num_candidates 2 --umed_max_new_tokens 4 --max_steps 1 --save_steps 1"
        " --per_device_train_batch_size 1 --umed_rewards of_numpy:Measures,consistency,localization_curriculum"
        f",symbolic:{tmp_path}/steps.yaml"
    )
    flags = train_flags(tiny_llama, records, tmp_path / "out", *stage)
    run = umed_run([*TWO_PROCESSES, *flags], pythonpath=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    (line, *_) = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert line["own/rank"] == 0.5
    # Answers of four random tokens: nothing in them can agree or disagree, and no step of the file is taken.
    assert line["guard/unscored/consistency"] == 1 and "reward/consistency" not in line
    assert line[f"reward/symbolic:{tmp_path}/steps.yaml"] == 0
    # The window has the questions of both processes with a lesion, in both the same.
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "rewarding_state.json").read_text())
    lesions = sum(bool(record["objects"]["bbox"]) for record in json.loads(records.read_text()))
    window = state["rewards"]["localization_curriculum"]["window"]
    assert window == [[0.0, 0.0]] * len(window) and 0 < len(window) <= min(2, lesions)


WRONG = """
import json, os

class Wrong:
    metric_names, calls = ("own/known",), 0
    def __call__(self, prompts, completions, **columns):
        self.calls += 1
        self.bad = self.calls == 2 and os.environ.get("RANK", "0") == os.environ["BAD_RANK"]
        if self.bad and os.environ["FAULT"] == "raise":
            {}["box"]
        values = [float(index) for index in range(len(completions))]
        if self.bad and os.environ["FAULT"] == "nan":
            values[0] = float("nan")
        return values + [0.5] * (self.bad and os.environ["FAULT"] == "surplus")

    def metrics(self):
        return {"own/unknown" if self.bad and os.environ["FAULT"] == "metric" else "own/known": 1.0}

    def scale(self, record, **columns):
        return [1.0] * (len(record) + (self.bad and os.environ["FAULT"] == "scale"))

    def fails_behind_a_step(self, fault):
        if os.environ["FAULT"] == fault and self.calls == 1 and os.environ.get("RANK", "0") == os.environ["BAD_RANK"]:
            {}[fault]

    @property
    def stop(self):
        self.fails_behind_a_step("stop")

    def state(self):
        self.fails_behind_a_step("state")
        return {"calls": self.calls}
"""
FAULTS = {
    "raise": "reward 'wrong:Wrong' raised KeyError: 'box' (",
    "nan": "reward 'wrong:Wrong' returned nan.",
    "surplus": "reward 'wrong:Wrong' returned 3 values for 2 answers.",
    "metric": "reward 'wrong:Wrong': metrics() returned own/unknown",
    "stop": "reward 'wrong:Wrong' raised KeyError: 'stop' (",
    "state": "reward 'wrong:Wrong' raised KeyError: 'state' (",
    "scale": "reward 'wrong:Wrong': scale returned 3 numbers for 2 answers.",
}


@pytest.mark.parametrize(
    ("fault", "processes"),
    [("surplus", 1), ("metric", 1), ("scale", 1), ("nan", 1), ("raise", 2), ("stop", 2), ("state", 2)],
)
def test_what_is_wrong_of_a_reward_ends_all_processes_with_a_checkpoint(
    fault, processes, tiny_llama, tmp_path, monkeypatch
):
    """In the second of three rollouts, on the last process; answers that are cut off are left out, here all of them."""
    records = grounded_records(tmp_path / "data")
    (tmp_path / "wrong.py").write_text(WRONG)
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setenv("BAD_RANK", str(processes - 1))
    stage = shlex.split(
        "--umed_stage rewarding --umed_num_candidates 2 --umed_max_new_tokens 4 --umed_cut_off mask --max_steps 3"
        " --save_steps 100 --per_device_train_batch_size 1 --umed_rewards wrong:Wrong"
    )
    flags = train_flags(tiny_llama, records, tmp_path / "out", *stage)
    command = ["python", "-m", "llava.train.train_mem"] if processes == 1 else TWO_PROCESSES
    run = umed_run([*command, *flags], pythonpath=tmp_path)
    assert run.returncode == 1, run.stderr[-3000:]
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert f"training stopped after step 1: {FAULTS[fault]}" in run.stderr
    assert f"Saved: {checkpoint}" in run.stderr
    assert (checkpoint / "trainer_state.json").is_file()
    if processes == 2:
        assert "a reward failed in another process; its message says why." in run.stderr
