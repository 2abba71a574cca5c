"""A GPU that runs out of memory in stage 2: the error names the flag that helps."""

from __future__ import annotations

import shlex

import pytest
import torch
from support.records import grounded_records
from support.umed_runs import train_flags, umed_run

from umed_plugin.errors import UmedError
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.training.out_of_memory import remedy_for_memory, sampling_remedy

FULL = """
import torch
import umed_plugin.training.rollout_engine as engine
import umed_plugin.training.trainer as trainer

class {name}:
    def __init__(self):
        def full(*arguments, **keywords):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        {place} = full

    def __call__(self, prompts, completions, **columns):
        return [0.0] * len(completions)
"""
STEP = shlex.split("--umed_num_candidates 4 --umed_max_new_tokens 4 --gradient_accumulation_steps 2 --max_steps 1")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (
            "engine.generate",
            "out of GPU memory while sampling 4 answers to each of 4 questions. Set --umed_sampling_batch_size 2: ",
        ),
        (
            "trainer.answer_pass",
            "out of GPU memory while learning from sampled answers. Halve --per_device_train_batch_size and double ",
        ),
    ],
    ids=["sampling", "learning"],
)
def test_a_run_that_does_not_fit_says_what_to_lower(place, said, tiny_llama, tmp_path):
    records = grounded_records(tmp_path / "data")
    (records.parent / "full.py").write_text(FULL.format(name="Full", place=place))
    flags = train_flags(tiny_llama, records, tmp_path / "out", "--umed_stage", "rewarding", *STEP)
    command = ["python", "-m", "llava.train.train_mem", *flags, "--umed_rewards", "full:Full"]
    run = umed_run(command, pythonpath=records.parent)
    assert run.returncode != 0
    assert f"umed: error: {said}" in run.stderr
    assert run.stderr.rstrip().endswith("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_single_question_that_does_not_fit_needs_fewer_or_shorter_answers():
    remedy = sampling_remedy(UmedFlags(), 1)
    assert "--umed_num_candidates (8) or --umed_max_new_tokens (128)" in remedy and "sampling_batch" not in remedy


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="^shapes$"), remedy_for_memory("trying", "Lower it."):
        raise RuntimeError("shapes")
    said = "^out of GPU memory while trying. Lower it. CUDA out of memory.$"
    with pytest.raises(UmedError, match=said), remedy_for_memory("trying", "Lower it."):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nmore")
