"""PPO in two processes: one value network, which learns what one process with the batches of both would have learnt."""

from __future__ import annotations

import json
import shlex

import torch
from safetensors.torch import load_file
from support.records import grounded_records
from support.umed_runs import TWO_PROCESSES, train_flags, umed_run

# A reward that is known by the record, so that the processes' shares of a rollout teach different things. It is made before the
# value network's layer, which it has each process write down at its end: a run saves that of its first process alone.
REWARD = """
import atexit, os
from pathlib import Path

class Pays:
    def __init__(self):
        import umed_plugin.model.sampling as sampling
        import umed_plugin.training.trainer as trainer
        sampling._next_token = lambda logits, settings: logits.argmax(dim=-1)
        made = trainer.ValueHead
        def make(hidden_size):
            head = made(hidden_size)
            folder = Path(os.environ["HEADS"]) / os.environ.get("RANK", "alone")
            folder.mkdir(parents=True)
            atexit.register(head.save, folder)
            return head
        trainer.ValueHead = make

    def __call__(self, prompts, completions, *, record, **columns):
        return [float(each["patient"]) for each in record]
"""
# The likeliest token each time, so that as many processes as you like sample the same; and a policy that stays where it is, since
# its advantages are whitened within a process.
FLAGS = shlex.split(
    "--umed_stage rewarding --umed_algorithm ppo --umed_rewards each:Pays --umed_reward_norm none"
    " --umed_num_candidates 2 --umed_max_new_tokens 4 --umed_updates_per_rollout 2 --max_steps 4 --save_strategy no"
    " --umed_kl_target 0.05 --umed_kl_horizon 50 --umed_value_clip_range 10 --learning_rate 1e-9"
    " --umed_value_learning_rate 1e-2 --lr_scheduler_type constant --gradient_checkpointing True"
)


def test_two_processes_teach_one_value_network_what_one_process_would(tiny_llama, tmp_path, monkeypatch):
    records = grounded_records(tmp_path / "data")
    (records.parent / "each.py").write_text(REWARD)
    monkeypatch.setenv("HEADS", str(tmp_path / "heads"))
    lines = {}
    for name, command, batch in (("two", TWO_PROCESSES, "2"), ("one", ["python", "-m", "llava.train.train_mem"], "4")):
        flags = [*FLAGS, "--per_device_train_batch_size", batch]
        out = tmp_path / name
        run = umed_run([*command, *train_flags(tiny_llama, records, out, *flags)], pythonpath=records.parent)
        assert run.returncode == 0, run.stderr[-3000:]
        lines[name] = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [line["answers_cut_off"] for line in lines["two"] if "answers_cut_off" in line] == [1, 1], (
        "a mean over tokens"
    )

    first, second, alone = (
        load_file(tmp_path / "heads" / rank / "value_head.safetensors") for rank in ("0", "1", "alone")
    )
    saved = load_file(tmp_path / "two" / "value_head.safetensors")
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], saved[name])
        assert tensor.abs().max() > 5e-3
        # Adam makes whole steps of gradients that are all but 0, whose sign is that of a rounding error.
        assert torch.cosine_similarity(first[name].flatten(), tensor.flatten(), dim=0) > 0.9
    # The weight of the KL is steered by the answers of both.
    steered = [[line["kl_coef"] for line in lines[name] if "kl_coef" in line] for name in ("two", "one")]
    assert steered[0][0] > steered[0][1]
    torch.testing.assert_close(*map(torch.tensor, steered))


FAILS = """
import os

def in_one_process(prompts, completions, **columns):
    return [None if os.environ["RANK"] == "1" else 1.0] * len(completions)
"""


def test_answers_without_a_reward_are_left_out_and_count_as_the_mean_of_both_processes(tiny_llama, tmp_path):
    records = grounded_records(tmp_path / "data")
    (records.parent / "judge.py").write_text(FAILS)
    flags = [*FLAGS, "--umed_rewards", "judge:in_one_process", "--max_steps", "2", "--umed_cut_off", "keep"]
    run = umed_run(
        [*TWO_PROCESSES, *train_flags(tiny_llama, records, tmp_path / "out", *flags)], pythonpath=records.parent
    )
    assert run.returncode == 0, run.stderr[-3000:]
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    (line,) = [line for line in history if "answers_unrewarded" in line]
    assert (line["answers_unrewarded"], line["reward/total"]) == (0.5, 1.0)
