"""In bf16, the first update begins at ratios of exactly 1 and at a KL of exactly 0: all passes round alike."""

from __future__ import annotations

import json
import shlex

import pytest
from support.records import grounded_records
from support.umed_runs import train_flags, umed_run

# A reward that differs between candidates, and writes down for each update how far the log-probabilities are apart.
WATCH = """
import json, os

class Watch:
    def __init__(self):
        import umed_plugin.training.trainer as trainer

        def watching(objective):
            def watched(policy, *rest):
                apart = {
                    "old": (policy.log_probs - policy.old_log_probs).abs().max().item(),
                    "reference": (policy.log_probs - policy.reference_log_probs).abs().max().item(),
                }
                with open(os.environ["WATCHED"], "a") as file:
                    file.write(json.dumps(apart) + "\\n")
                return objective(policy, *rest)
            return watched

        trainer.grpo_objective = watching(trainer.grpo_objective)
        trainer.ppo_objective = watching(trainer.ppo_objective)

    def __call__(self, prompts, completions, **columns):
        return [sum(letter < "n" for letter in text.lower()) / (1 + len(text)) for text in completions]
"""
FLAGS = shlex.split(
    "--umed_stage rewarding --umed_rewards watch:Watch,vision_relevance --umed_num_candidates 4 --umed_max_new_tokens 12"
    " --bf16 True --learning_rate 1e-2 --max_steps 2 --save_strategy no --lr_scheduler_type constant"
)
LORA = "--lora_enable True --lora_r 4"


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("mistral", f"--umed_algorithm grpo {LORA} --gradient_checkpointing True"),
        ("llama", "--umed_algorithm grpo --gradient_checkpointing False"),
        ("mistral", f"--umed_algorithm ppo {LORA} --gradient_checkpointing False"),
        ("llama", "--umed_algorithm ppo --gradient_checkpointing True --umed_packed False"),
    ],
    ids=["grpo-lora-checkpointing", "grpo-full", "ppo-lora", "ppo-full-checkpointing-not-packed"],
)
def test_the_first_update_starts_where_policy_old_policy_and_reference_are_one(
    family, flags, request, tmp_path, monkeypatch
):
    checkpoint, records = request.getfixturevalue(f"tiny_{family}"), grounded_records(tmp_path / "data")
    (records.parent / "watch.py").write_text(WATCH)
    monkeypatch.setenv("WATCHED", str(tmp_path / "watched.jsonl"))
    flags = [*train_flags(checkpoint, records, tmp_path / "out"), *FLAGS, *flags.split()]
    run = umed_run(["python", "-m", "llava.train.train_mem", *flags], pythonpath=records.parent)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "None of the inputs have requires_grad" not in run.stderr

    first, second = map(json.loads, (tmp_path / "watched.jsonl").read_text().splitlines())
    assert first == {"old": 0, "reference": 0}
    assert second["old"] == 0 and second["reference"] > 1e-3
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    one, two = (line for line in history if "loss" in line)
    assert one["policy_loss"] == pytest.approx(0, abs=1e-6) and one["clip_fraction"] == 0
    assert one["kl"] == one["kl_per_answer"] == 0
    assert two["kl"] > 0
