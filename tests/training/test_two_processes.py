"""Both stages in two processes under gradient checkpointing, as on a GPU machine, with batches in which the ranks differ."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import version

import pytest
import torch
from support.records import grounded_records, write_records
from support.umed_runs import TWO_PROCESSES, train_flags, umed_run

from umed_plugin.training.sampler import EpochSampler

CHECKPOINTED = shlex.split("--gradient_checkpointing True --max_steps 2 --save_strategy no")
LORA = ("--lora_enable", "True", "--lora_r", "4")
REWARDING = shlex.split(
    "--umed_stage rewarding --umed_num_candidates 3 --umed_max_new_tokens 8 --umed_rewards seen:seen --umed_kl_coef 0"
)
# Each rank writes down the answers that it is given.
SEEN = """
import json, os
def seen(prompts, completions, **columns):
    with open(os.environ["SEEN"] + os.environ.get("RANK", "0"), "a") as file:
        file.write(json.dumps(completions) + "\\n")
    return [sum(letter < "n" for letter in text.lower()) / (1 + len(text)) for text in completions]
"""


@pytest.mark.parametrize("flags", [LORA, (), ("--tune_mm_mlp_adapter", "True")], ids=["lora", "full", "projector"])
def test_stage_1_where_one_rank_has_images_and_the_other_text_alone(flags, tiny_mistral, tmp_path):
    records = write_records(tmp_path / "data")
    items = json.loads(records.read_text())
    # The order is dealt to the ranks in turn: text goes to rank 0 in the first step, to rank 1 in the second.
    order = list(EpochSampler(len(items), seed=42))
    for item in (items[order[0]], items[order[3]]):
        del item["image"]
        item["conversations"][0]["value"] = "Is there anything abnormal?"
    records.write_text(json.dumps(items))
    batch = ("--per_device_train_batch_size", "1", "--umed_stage", "instruction_tuning")
    run = umed_run(
        [*TWO_PROCESSES, *train_flags(tiny_mistral, records, tmp_path / "out", *CHECKPOINTED, *batch, *flags)]
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize(
    ("family", "flags"),
    [("mistral", LORA), ("llama", ()), ("mistral", (*LORA, "--umed_algorithm", "ppo"))],
    ids=["grpo-lora", "grpo-full", "ppo-lora"],
)
def test_stage_2_samples_other_answers_on_each_rank(family, flags, request, tmp_path, monkeypatch):
    records = grounded_records(tmp_path / "data")
    items = json.loads(records.read_text())
    records.write_text(json.dumps([{**items[1], "id": str(number)} for number in range(4)]))
    (tmp_path / "data" / "seen.py").write_text(SEEN)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    checkpoint = request.getfixturevalue(f"tiny_{family}")
    command = [*TWO_PROCESSES, *train_flags(checkpoint, records, tmp_path / "out", *CHECKPOINTED, *REWARDING, *flags)]
    run = umed_run(command, pythonpath=tmp_path / "data")
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (
        [json.loads(line) for line in (tmp_path / f"seen{rank}").read_text().splitlines()] for rank in "01"
    )
    assert len(first) == len(second) == 2
    assert not {text for batch in first for text in batch} & {text for batch in second for text in batch}


def test_a_search_for_unused_weights_is_refused_where_ddp_would_fail(tiny_mistral, tmp_path):
    records = write_records(tmp_path / "data")
    flags = (*CHECKPOINTED, "--umed_stage", "instruction_tuning", *LORA, "--ddp_find_unused_parameters", "True")
    run = umed_run([*TWO_PROCESSES, *train_flags(tiny_mistral, records, tmp_path / "out", *flags)])
    reentrant = version("transformers").startswith("4.")
    assert (run.returncode != 0) == reentrant, run.stderr[-3000:]
    assert ("--ddp_find_unused_parameters True does not work" in run.stderr) == reentrant


# Rewards of rank 1 lie ten times as far apart. Each rank writes down its rewards and the spread that divides them.
FAR = """
import json, os
import umed_plugin.training.experience_maker as maker
RANK, made = int(os.environ["RANK"]), maker.grpo_experience

def experience(samples, kl_coef, reward_coef, spread, *rest):
    with open(os.environ["SEEN"] + str(RANK), "a") as file:
        file.write(json.dumps([samples.rewards.tolist(), spread.item()]) + "\\n")
    return made(samples, kl_coef, reward_coef, spread, *rest)

maker.grpo_experience = experience

def far(prompts, completions, **columns):
    return [float(number % 3) * 10 ** RANK for number in range(len(completions))]
"""


def test_a_spread_of_the_batch_is_that_of_all_ranks(tiny_mistral, tmp_path, monkeypatch):
    records = grounded_records(tmp_path / "data")
    (tmp_path / "data" / "far.py").write_text(FAR)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    flags = shlex.split("--umed_rewards far:far --umed_reward_norm none --umed_advantage_scale batch --max_steps 1")
    command = [*TWO_PROCESSES, *train_flags(tiny_mistral, records, tmp_path / "out", *CHECKPOINTED, *REWARDING, *flags)]
    run = umed_run(command, pythonpath=tmp_path / "data")
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"seen{rank}").read_text()) for rank in "01"]
    rewards = torch.tensor([group for rank_rewards, _ in ranks for group in rank_rewards])
    spread = (rewards - rewards.mean(dim=1, keepdim=True)).square().mean().sqrt().item()
    assert [found for _, found in ranks] == pytest.approx([spread] * 2)
    assert spread == pytest.approx((101 / 3) ** 0.5)
