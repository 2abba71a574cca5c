"""Epochs that do not fill whole optimizer steps: each step averages gradients, and a run has all its epochs or says so.

transformers 5 does so by itself; on LLaVA's pins it is `umed_plugin.patches.short_epochs`.
"""

from __future__ import annotations

import json
import shlex
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from support.records import grounded_records
from support.umed_runs import TWO_PROCESSES, train_flags, umed_run, weights

ON_PINS = version("transformers").startswith("4.")
ALONE = ["python", "-m", "llava.train.train_mem"]
EARLY = """
def early(prompts, completions, **columns):
    return [sum(letter < "n" for letter in text.lower()) / (1 + len(text)) for text in completions]
"""
STAGES = {
    "rewarding": shlex.split("--umed_rewards early:early --umed_num_candidates 4 --umed_max_new_tokens 6"),
    "instruction_tuning": [],
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = grounded_records(tmp_path_factory.mktemp("data"))
    assert len(json.loads(file.read_text())) == 9  # five batches of one record for each of two processes
    (file.parent / "early.py").write_text(EARLY)
    return file


def train(command: list[str], stage: str, checkpoint: Path, records: Path, out: Path, flags: str) -> str:
    """Run; returns what it says."""
    dealt = shlex.split(f"--num_train_epochs 3 --per_device_train_batch_size 1 --umed_stage {stage} {flags}")
    run = umed_run(
        [*command, *train_flags(checkpoint, records, out, *dealt, *STAGES[stage])], pythonpath=records.parent
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout + run.stderr


def check_equal(found: Path, expected: Path) -> None:
    ours = weights(found)
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


def steps_and_epoch(out: Path) -> tuple[int, float]:
    state = json.loads((out / "trainer_state.json").read_text())
    return state["global_step"], state["epoch"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_an_epoch_cannot_fill_takes_the_epoch(stage, tiny_llama, records, tmp_path):
    """A step whose gradients are not averaged has other weights than one that is as long as the epoch."""
    what = (stage, tiny_llama, records)
    said = train(TWO_PROCESSES, *what, tmp_path / "short", "--save_strategy no --gradient_accumulation_steps 8")
    train(TWO_PROCESSES, *what, tmp_path / "whole", "--save_strategy no --gradient_accumulation_steps 5")
    assert steps_and_epoch(tmp_path / "short") == (3, 3.0)
    check_equal(tmp_path / "short", tmp_path / "whole")
    told = (
        "an epoch has 5 batches per process, fewer than --gradient_accumulation_steps 8. So each optimizer step takes 5"
    )
    assert said.count(told) == (1 if ON_PINS else 0)


def test_such_a_run_keeps_its_flag_when_it_is_resumed(tiny_llama, records, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run = (ALONE, "rewarding", tiny_llama, records)
    flags = "--gradient_accumulation_steps 16 --save_strategy steps --save_steps 1"
    train(*run, whole, flags)
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-1", resumed / "checkpoint-1")
    train(*run, resumed, flags)
    assert steps_and_epoch(resumed) == (3, 3.0)
    check_equal(resumed, whole)


def test_a_run_that_ends_before_its_last_epoch_says_so(tiny_llama, records, tmp_path):
    run = (TWO_PROCESSES, "rewarding", tiny_llama, records)
    said = train(*run, tmp_path / "out", "--save_strategy no --gradient_accumulation_steps 3")
    told = (
        "an epoch has 5 batches per process, which do not fill whole optimizer steps of --gradient_accumulation_steps 3. The "
        "run has 3 steps, and ends after 1.8 of 3 epochs. For all of them, add --max_steps 5."
    )
    assert said.count(told) == (1 if ON_PINS else 0)
    if ON_PINS:
        assert steps_and_epoch(tmp_path / "out") == (3, pytest.approx(1.8))
    else:
        assert steps_and_epoch(tmp_path / "out") == (6, 3.0)


@pytest.mark.skipif(not ON_PINS, reason="transformers 5 ends a step where an epoch ends")
@pytest.mark.parametrize(
    ("batches", "accumulation", "epochs", "max_steps", "lacks"),
    [
        (7, 4, 4, -1, "4 steps, and ends after 2.3 of 4 epochs. For all of them, add --max_steps 7."),
        (5, 4, 3, -1, None),  # three of 3.75 steps
        (5, 4, 4, -1, "4 steps, and ends after 3.2 of 4 epochs. For all of them, add --max_steps 5."),
        (7, 4, 4, 3, None),
        (8, 4, 4, -1, None),
        (10001, 4, 3, -1, None),
        (6, 4, 0.5, -1, None),
    ],
)
def test_steps_that_are_lacking_at_the_end(batches, accumulation, epochs, max_steps, lacks):
    from umed_plugin.patches.short_epochs import early_end

    found = early_end(batches, accumulation, epochs, max_steps)
    assert found == lacks if lacks is None else found is not None and found.endswith(f"The run has {lacks}")


def test_deepspeed_gets_numbers_that_fit_together():
    """LLaVA's pins have no DeepSpeed for a CPU, so its settings alone are looked at."""
    from types import SimpleNamespace

    from umed_plugin.patches.short_epochs import _fit

    settings = {"gradient_accumulation_steps": 8, "train_batch_size": 32, "train_micro_batch_size_per_gpu": 2}
    args = SimpleNamespace(gradient_accumulation_steps=8, process_index=1, deepspeed="zero2.json")
    args.train_batch_size, args.world_size = 2, 2
    plugin = SimpleNamespace(deepspeed_config=settings)
    accelerator = SimpleNamespace(gradient_accumulation_steps=8, state=SimpleNamespace(deepspeed_plugin=plugin))
    _fit(SimpleNamespace(args=args, accelerator=accelerator), 5)
    assert args.gradient_accumulation_steps == accelerator.gradient_accumulation_steps == 5
    assert settings == {
        "gradient_accumulation_steps": 5,
        "train_batch_size": 20,
        "train_micro_batch_size_per_gpu": 2,
    }
