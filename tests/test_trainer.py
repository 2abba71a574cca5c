"""Stage 2 through ``umed-run`` and LLaVA's own script: full and LoRA, Llama and Mistral, killed and resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from test_resume import INTERRUPT, weights
from umed_runs import train_flags, umed_run, write_records

FLAGS = (
    *(
        "--umed_stage",
        "rewarding",
        "--umed_num_candidates",
        "4",
        "--umed_max_new_tokens",
        "12",
        "--learning_rate",
        "1e-3",
    ),
    *("--max_steps", "8", "--save_steps", "3", "--umed_rewards", "relevance,localization,vision_relevance,half:half"),
    *("--umed_reward_weights", "1,1,1,0.5", "--gradient_checkpointing", "True"),
)
LORA = ("--lora_enable", "True", "--lora_r", "4", "--group_by_modality_length", "True", "--bf16", "True")
TWICE = ("--umed_updates_per_rollout", "2", "--gradient_accumulation_steps", "2", "--umed_kl_coef", "0")
# A reward that differs between candidates of a model with random weights, where IoU and relevance are mostly 0.
OWN_REWARD = """
def half(prompts, completions, **columns):
    return [sum(letter < "n" for letter in text.lower()) / (1 + len(text)) for text in completions]
"""


def grounded_records(folder: Path) -> Path:
    """Records with the true boxes that rewards need: one lesion, two, or none."""
    file = write_records(folder, count=9)
    records = json.loads(file.read_text())
    for i, record in enumerate(records):
        boxes = [[5, 5, 30, 30], [35, 10, 60, 40]][: i % 3]
        record["objects"] = {"ref": ["nodule", "cyst"][: i % 3], "bbox": boxes, "bbox_type": "real"}
        record["terms"] = {"nodule": ["nodule"], "cyst": ["cyst"]}
        record |= {"image_size": [64, 48], "source": "test", "modality": "CT", "patient": str(i)}
        record["answer_type"] = "grounded" if boxes else "negative"
    file.write_text(json.dumps(records))
    return file


def reward(checkpoint, records, output, *more, hook=None):
    folder = hook or records.parent
    (folder / "half.py").write_text(OWN_REWARD)
    flags = train_flags(checkpoint, records, output, *FLAGS, *more)
    return umed_run(["python", "-m", "llava.train.train_mem", *flags], pythonpath=folder)


@pytest.mark.parametrize(
    ("family", "flags", "stop"),
    [("mistral", LORA, signal.SIGKILL), ("llama", TWICE, signal.SIGINT)],
    ids=["lora-kill", "full-two-updates-ctrl-c"],
)
def test_rewarding_logs_every_term_and_resumes_to_the_same_weights(family, flags, stop, request, tmp_path):
    checkpoint = request.getfixturevalue(f"tiny_{family}")
    records = grounded_records(tmp_path / "data")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"

    run = reward(checkpoint, records, whole, *flags, "--umed_log_candidates", "4")
    assert run.returncode == 0, run.stderr[-3000:]
    history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    assert len([line for line in history if "loss" in line]) == 8
    terms = {"reward/localization", "reward/relevance", "reward/vision_relevance", "reward/half:half", "reward/total"}
    assert terms <= {name for line in history for name in line}
    assert ("kl" in history[0]) == ("--umed_kl_coef" not in flags)
    groups = [json.loads(line) for line in (whole / "candidates.jsonl").read_text().splitlines()]
    assert {group["step"] for group in groups} == {0, 4}
    assert all(len(group["candidates"]) == 4 and "half:half" in group["candidates"][0] for group in groups)

    hook = tmp_path / "hook"
    hook.mkdir()
    state = str(resumed / "checkpoint-3" / "trainer_state.json")
    (hook / "sitecustomize.py").write_text(INTERRUPT.format(state=state, signal=int(stop)))
    stopped = reward(checkpoint, records, resumed, *flags, hook=hook)
    assert stopped.returncode != 0
    assert (resumed / "checkpoint-3").is_dir()
    assert not (resumed / "trainer_state.json").exists(), "the run was over before it was stopped"
    run = reward(checkpoint, records, resumed, *flags)
    assert run.returncode == 0, run.stderr[-3000:]

    expected, found = weights(whole), weights(resumed)
    assert set(found) == set(expected)
    if flags is LORA:  # with two updates a rollout, a run resumed in between samples anew
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert any(tensor.abs().max() > 0 for name, tensor in expected.items() if "lora_B" in name or flags is TWICE)
