"""Stage 2 through ``umed-run`` and LLaVA's own script: full and LoRA, Llama and Mistral, killed and resumed."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.records import grounded_records
from support.taught import learn_by_heart, study_records
from support.umed_runs import FLAGS, INTERRUPT, TWO_PROCESSES, reward, train_flags, umed_run, weights

from umed_plugin.flags.names import PAPER_REWARDS, SHIPPED_REWARDS
from umed_plugin.rewards.guards import GUARDS

LORA = shlex.split(
    "--umed_vrr_heads 0,2 --umed_vrr_mask_sinks 2.5 --lora_enable True --lora_r 4 --group_by_modality_length True --bf16 True"
)
TWICE = shlex.split(
    "--gradient_checkpointing True --umed_updates_per_rollout 2 --gradient_accumulation_steps 2 --umed_kl_coef 0"
)
# 9 records fill two rollouts of 4; a checkpoint at step 3 falls between the updates of one.
PPO = shlex.split(
    "--umed_algorithm ppo --umed_updates_per_rollout 2 --umed_minibatches_per_rollout 2"
    " --umed_kl_target 0.05 --umed_kl_horizon 50 --umed_value_learning_rate 1e-2 --umed_entropy_coef 0.01"
)
# The last file of a checkpoint: a run is stopped as soon as it is there. That of the next one: a run is stopped as it opens it.
WRITTEN, HALF_WRITTEN = "checkpoint-3/trainer_state.json", "tmp-checkpoint-6/trainer_state.json"
# As `INTERRUPT`, but at one moment: a thread that looks now and then may miss the milliseconds between two files of a checkpoint.
IN_A_WRITE = """
import os, sys
def kill(event, given):
    if event == "open" and given[0] == {state!r}:
        os.kill(os.getpid(), {signal})
if "llava.train.train_mem" in " ".join(sys.orig_argv if hasattr(sys, "orig_argv") else [open("/proc/self/cmdline").read()]):
    sys.addaudithook(kill)
"""


def steps_of_a_rollout(flags):
    """Optimizer steps between one sampling and the next."""
    words = ["--umed_updates_per_rollout", "--umed_minibatches_per_rollout"]
    return math.prod(int(flags[flags.index(word) + 1]) for word in words if word in flags)


def sampled(output: Path) -> dict[int, dict]:
    """The last candidates that a run has written in each step; a question is there once, also if a step was sampled twice."""
    groups = [json.loads(line) for line in (output / "candidates.jsonl").read_text().splitlines()]
    assert len({(group["step"], group["id"]) for group in groups}) == len(groups)
    return {group["step"]: group for group in groups}


def check_ppo(whole: Path, resumed: Path) -> None:
    """What PPO logs and saves, and that nothing of it is where a stock reader would find it."""
    history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    again = json.loads((resumed / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in history if "loss" in line]
    assert all({"value_loss", "value_clip_fraction"} <= set(line) for line in lines)
    rollouts = [line for line in lines if "explained_variance" in line]
    assert [line["step"] for line in rollouts] == [1, 5]
    assert all({"returns_mean", "advantage_std", "kl_per_answer"} <= set(line) for line in rollouts)
    # The coefficient has moved, and the resumed run went on with it: the last rollout was sampled after resuming.
    assert rollouts[0]["kl_coef"] == pytest.approx(0.1)
    assert rollouts[1]["kl_coef"] != pytest.approx(0.1, rel=1e-3)
    assert {line["step"]: line for line in again if "kl_coef" in line}[5]["kl_coef"] == rollouts[1]["kl_coef"]

    head = load_file(whole / "value_head.safetensors")
    assert head["linear.weight"].abs().max() > 1e-3
    checkpoint = whole / "checkpoint-6"
    error = min(max(rollouts[1]["kl_per_answer"] / 0.05 - 1, -0.2), 0.2)
    reached = rollouts[1]["kl_coef"] * math.exp(error * 16 / 50)  # 4 questions, 4 answers each
    assert json.loads((checkpoint / "rewarding_state.json").read_text())["kl_coef"] == pytest.approx(reached)
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    assert groups[-1]["initial_lr"] == 1e-2 and len(groups[-1]["params"]) == len(head)
    names = {name for folder in (whole, checkpoint) for name in weights(folder) if name not in head}
    assert names and not [name for name in names if "value" in name or "linear." in name]
    assert not [key for key in json.loads((whole / "config.json").read_text()) if key.startswith(("umed", "value"))]


@pytest.mark.parametrize(
    ("family", "flags", "stop", "when"),
    [
        ("mistral", LORA, signal.SIGKILL, WRITTEN),
        ("llama", TWICE, signal.SIGINT, WRITTEN),
        ("mistral", [*LORA, *PPO], signal.SIGKILL, WRITTEN),
        ("llama", PPO, signal.SIGKILL, HALF_WRITTEN),
    ],
    ids=["lora-kill", "full-two-updates-ctrl-c", "ppo-lora-kill", "ppo-full-cached-kill-in-a-write"],
)
def test_rewarding_logs_every_term_and_resumes_to_the_same_weights(family, flags, stop, when, request, tmp_path):
    checkpoint = request.getfixturevalue(f"tiny_{family}")
    records = grounded_records(tmp_path / "data")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"

    run = reward(checkpoint, records, whole, *flags, "--umed_log_candidates", "1")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "not packed" not in run.stdout
    history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    assert len([line for line in history if "loss" in line]) == 8
    # consistency scores no random text, and symbolic needs a file: tests/rewards/test_reward_runs.py
    shipped = {*SHIPPED_REWARDS} - {"consistency", "symbolic"}
    terms = {f"reward/{name}" for name in (*shipped, "half:half", "total")}
    assert terms <= {name for line in history for name in line}
    steps = steps_of_a_rollout(flags)
    expected = [0.5 - 0.25 * (step // steps) / (8 // steps - 1) for step in range(8)]
    found = {line["step"]: line["weight/half:half"] for line in history if "weight/half:half" in line}
    assert found == {step + 1: pytest.approx(expected[step]) for step in range(0, 8, steps)}
    assert all(line.get("localization_curriculum/threshold", 0.3) == pytest.approx(0.3) for line in history)
    assert ("kl" in history[0]) == ("--umed_kl_coef" not in flags)
    groups = sampled(whole)
    assert set(groups) == set(range(0, 8, steps_of_a_rollout(flags)))
    assert all(len(group["candidates"]) == 4 and "half:half" in group["candidates"][0] for group in groups.values())

    hook = tmp_path / "hook"
    hook.mkdir()
    in_a_write = when == HALF_WRITTEN
    code = IN_A_WRITE if in_a_write else INTERRUPT
    (hook / "sitecustomize.py").write_text(code.format(state=str(resumed / when), signal=int(stop)))
    cached = [*flags, "--umed_feature_cache", str(tmp_path / "cache")] if in_a_write else flags
    stopped = reward(checkpoint, records, resumed, *cached, hook=hook)
    assert stopped.returncode != 0
    assert (resumed / "checkpoint-3").is_dir()
    assert not (resumed / "trainer_state.json").exists(), "the run was over before it was stopped"
    if in_a_write:
        there = {file.name for file in (resumed / "tmp-checkpoint-6").iterdir()}
        assert "optimizer.pt" in there and "trainer_state.json" not in there, "it was not stopped inside the write"
        assert not (resumed / "checkpoint-6").exists()
    run = reward(checkpoint, records, resumed, *cached, "--umed_log_candidates", "1")
    assert run.returncode == 0, run.stderr[-3000:]
    assert (resumed / "checkpoint-6").is_dir() and not list(resumed.glob("tmp-*"))
    assert not in_a_write or "8 of 9 images are cached" in run.stdout
    assert "sample the rollout anew" not in run.stdout + run.stderr

    assert sampled(resumed).keys() <= groups.keys()
    assert min(sampled(resumed)) >= 3, "it began anew"
    for step, group in sampled(resumed).items():
        assert group == groups[step], f"other answers or rewards in step {step}"
    expected, found = weights(whole), weights(resumed)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    # Without gradient checkpointing, CPU autocast would hand the update weights that have lost their graph.
    assert all(tensor.abs().max() > 0 for name, tensor in expected.items() if "lora_B" in name)
    states = [json.loads((run / "checkpoint-6" / "rewarding_state.json").read_text()) for run in (whole, resumed)]
    assert states[0] == states[1] and len(states[0]["rewards"]["localization_curriculum"]["window"]) > 3
    if "ppo" in flags:
        check_ppo(whole, resumed)


def with_config(checkpoint: Path, folder: Path, **changes: object) -> Path:
    """A copy of a checkpoint with entries of its configuration changed."""
    copy = folder / checkpoint.name
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


@pytest.mark.parametrize("checkpointing", ["True", "False"])
def test_what_is_learnt_from_once_is_scored_by_the_update_and_teaches_the_same(checkpointing, tiny_mistral, tmp_path):
    """Vision relevance has a pass over the answers before the update, here for a reward of weight 0."""
    records = grounded_records(tmp_path / "data")
    found = {}
    for terms, coefficients in (("half:half", "1"), ("half:half,vision_relevance", "1,0")):
        flags = ["--umed_rewards", terms, "--umed_reward_weights", coefficients, "--max_steps", "3"]
        run = reward(tiny_mistral, records, tmp_path / terms, *flags, "--gradient_checkpointing", checkpointing)
        assert run.returncode == 0, run.stderr[-3000:]
        history = json.loads((tmp_path / terms / "trainer_state.json").read_text())["log_history"]
        found[terms] = weights(tmp_path / terms), [line["kl_per_answer"] for line in history if "loss" in line]
    (once, kl), (twice, expected) = found.values()
    assert kl == pytest.approx(expected, abs=1e-4) and expected[-1] > 1e-3
    for name, tensor in twice.items():
        torch.testing.assert_close(once[name], tensor, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_update_sees_the_policy_that_sampled_whatever_dropout_the_checkpoint_has(family, request, tmp_path):
    """Before the first step the policy is its reference, whose log-probabilities are those of sampling: KL 0 in the update."""
    checkpoint = with_config(request.getfixturevalue(f"tiny_{family}"), tmp_path / "checkpoint", attention_dropout=0.5)
    records = grounded_records(tmp_path / "data")
    run = reward(checkpoint, records, tmp_path / "out", "--max_steps", "1")
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attention_dropout"] == 0.5
    first, *_ = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert abs(first["kl"]) < 1e-9


def test_the_value_networks_gradient_is_clipped_and_a_rollout_that_is_lost_is_sampled_anew(tiny_llama, tmp_path):
    records = grounded_records(tmp_path / "data")
    flags = [*PPO, "--save_steps", "1", "--umed_log_candidates", "1"]
    run = reward(tiny_llama, records, tmp_path / "out", *flags, "--max_steps", "2", "--max_grad_norm", "1e-12")
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("each epoch leaves out 1 of 9 records, others each time: a rollout takes 4") == 1
    # A gradient of this norm vanishes beside Adam's epsilon of 1e-8; without the bound each step is the learning rate of 1e-2.
    assert 0 < load_file(tmp_path / "out" / "value_head.safetensors")["linear.weight"].abs().max() < 1e-5

    lost = tmp_path / "lost"
    shutil.copytree(tmp_path / "out" / "checkpoint-1", lost / "checkpoint-1")
    (lost / "checkpoint-1" / "rollout_0.pt").unlink()
    accept = ("--umed_accept_changed", "max_grad_norm,per_device_train_batch_size")
    run = reward(tiny_llama, records, lost, *flags, *accept, "--max_steps", "2")
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stderr.count("not each of the 1 processes finds its rollout_N.pt") == 1
    assert set(sampled(lost)) == {1}

    # Without optimizer and random state, value network and rollout are there all the same.
    alone = tmp_path / "alone"
    for steps in ("1", "2"):
        run = reward(tiny_llama, records, alone, *flags, "--max_steps", steps, "--save_only_model", "True")
        assert run.returncode == 0, run.stderr[-3000:]
        assert (alone / "checkpoint-1" / "rewarding_state.json").is_file() and "rollout_N.pt" not in run.stderr

    # Between the updates of a rollout nothing may change that shapes it, even if the change is accepted.
    between = tmp_path / "between"
    shutil.copytree(tmp_path / "out" / "checkpoint-1", between / "checkpoint-1")
    run = reward(tiny_llama, records, between, *flags, *accept, "--per_device_train_batch_size", "1")
    assert run.returncode == 2
    assert (
        "--per_device_train_batch_size 1: checkpoint-1 was trained with 2, and is in the middle of a rollout"
        in run.stderr
    )
    # A checkpoint that is older than stored settings tells by its rollout.
    (between / "checkpoint-1" / "umed.json").write_text('{"umed_stage": "rewarding"}')
    run = reward(tiny_llama, records, between, *flags, "--per_device_train_batch_size", "1")
    assert run.returncode == 1 and "does not say with which flags it was trained" in run.stdout
    assert "is a rollout of 4 queries with 4 candidates each, but this run has 2 with 4" in run.stderr


@pytest.mark.parametrize(
    ("begun", "changed"),
    [
        ("--umed_kl_coef 0.04 --umed_kl_target 6", "umed_kl_coef"),
        ("--umed_kl_coef 0", "umed_kl_coef,umed_kl_target"),
    ],
    ids=["another", "from-0"],
)
def test_a_kl_weight_that_is_accepted_on_resume_is_where_adapting_begins(begun, changed, tiny_llama, tmp_path):
    records, out = grounded_records(tmp_path / "data"), tmp_path / "out"
    flags = ["--save_steps", "1", "--umed_rewards", "half:half", "--umed_reward_weights", "1"]
    run = reward(tiny_llama, records, out, *flags, *begun.split(), "--max_steps", "1")
    assert run.returncode == 0, run.stderr[-3000:]
    later = shlex.split(f"--umed_kl_coef 0.2 --umed_kl_target 6 --umed_accept_changed {changed}")
    run = reward(tiny_llama, records, out, *flags, *later, "--max_steps", "2")
    assert run.returncode == 0, run.stderr[-3000:]
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    (second,) = [line for line in history if line.get("step") == 2 and "loss" in line]
    assert second["kl_coef"] == pytest.approx(0.2)
    # From here on it is the adapted one that a run goes on with.
    adapted = json.loads((out / "checkpoint-2" / "rewarding_state.json").read_text())["kl_coef"]
    assert adapted != pytest.approx(0.2, rel=1e-5) and adapted == pytest.approx(0.2, rel=0.01)
    run = reward(tiny_llama, records, out, *flags, *later, "--max_steps", "3")
    assert run.returncode == 0, run.stderr[-3000:]
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    (third,) = [line for line in history if line.get("step") == 3 and "loss" in line]
    assert third["kl_coef"] == pytest.approx(adapted, rel=1e-6)  # logged as float32


# Writes down which queries of its rollout each batch learns from.
TAKEN = """
import os
from umed_plugin.training.experience import Experience
made = Experience.minibatch

def minibatch(self, queries):
    if len(queries) == 1:  # all queries of a step are also taken together, to weigh it
        with open(os.environ["TAKEN"], "a") as file:
            print(*queries, file=file)
    return made(self, queries)

Experience.minibatch = minibatch

def taken(prompts, completions, **columns):
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_each_epoch_over_a_rollout_learns_from_every_query_once(algorithm, tiny_llama, tmp_path, monkeypatch):
    records = grounded_records(tmp_path / "data")
    (records.parent / "taken.py").write_text(TAKEN)
    monkeypatch.setenv("TAKEN", str(tmp_path / "taken"))
    flags = shlex.split(
        f"--umed_algorithm {algorithm} --umed_rewards taken:taken --umed_reward_weights 1 --umed_kl_coef 0 --max_steps 6"
        " --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --umed_minibatches_per_rollout 3"
        " --umed_updates_per_rollout 2 --save_strategy no"
    )
    run = reward(tiny_llama, records, tmp_path / "out", *flags)
    assert run.returncode == 0, run.stderr[-3000:]
    taken = [int(line) for line in (tmp_path / "taken").read_text().splitlines()]
    assert sorted(taken[:6]) == sorted(taken[6:]) == list(range(6))
    assert taken[:6] != taken[6:], "each epoch is shuffled anew"


def test_a_model_that_cannot_pack_is_trained_apart_and_the_run_says_so_once(tiny_llama, tmp_path):
    records = grounded_records(tmp_path / "data")
    checkpoint = with_config(tiny_llama, tmp_path / "checkpoint", rope_scaling={"type": "dynamic", "factor": 2.0})
    flags = ["--max_steps", "2", "--umed_rewards", "half:half", "--umed_reward_weights", "1", "--umed_kl_coef", "0"]
    run = reward(checkpoint, records, tmp_path / "out", *flags)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("answers are not packed") == 1
    again = reward(checkpoint, records, tmp_path / "again", *flags, "--umed_packed", "False")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "not packed" not in again.stdout


def test_two_processes_reward_a_model_that_names_the_lesion(tiny_mistral, tmp_path):
    """The terms are more than zero where there is something to reward, and both processes' gradients reach the weights."""
    records = study_records(tmp_path / "data")
    for record in records:
        record["terms"]["cyst"] = ["cyst"]
        record |= {"split": "train", "source": "test", "modality": "CT", "patient": "1", "answer_type": "grounded"}
    # What the answers say, in pixels of an 80 x 48 image: 16 pixels of padding lie above it.
    for record, name, box in zip(records, ("nodule", "cyst"), ([9.6, 11.2, 44.8, 46.4], [40, 4, 60, 16])):
        record["objects"] = {"ref": [name], "bbox": [box], "bbox_type": "real"}
    file = tmp_path / "data" / "records.json"
    file.write_text(json.dumps(records * 2))
    checkpoint = tmp_path / "taught-llava-mistral"
    learn_by_heart(tiny_mistral, records, tmp_path / "data", checkpoint)

    flags = train_flags(
        checkpoint, file, tmp_path / "out", *FLAGS[:4], "--umed_max_new_tokens", "80", "--max_steps", "2"
    )
    flags[flags.index("--vision_tower") + 1] = str(tiny_mistral / "vision_tower")
    flags += [
        "--lora_enable",
        "True",
        "--lora_r",
        "4",
        "--umed_log_candidates",
        "1",
        "--umed_stock_template_share",
        "1",
    ]
    run = umed_run([*TWO_PROCESSES, *flags])
    assert run.returncode == 0, run.stderr[-3000:]
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["reward/localization"] > 0.5
    assert history[0]["reward/relevance"] > 0.5
    assert 0 < history[0]["reward/vision_relevance"] < 1
    assert {*GUARDS, "vision_relevance/over_uniform"} <= set(history[0])
    assert 0.5 < history[0]["guard/box_area_ratio"] < 2
    (group, *_) = [json.loads(line) for line in (tmp_path / "out" / "candidates.jsonl").read_text().splitlines()]
    assert all(set(candidate) == {"text", "reward", *PAPER_REWARDS} for candidate in group["candidates"])
    # The reward can be recomputed by hand. An answer that was cut off loses the sum of the weights.
    assert set(group["weights"]) == set(group["normalised"]) == set(PAPER_REWARDS)
    for place, candidate in enumerate(group["candidates"]):
        parts = sum(weight * group["normalised"][name][place] for name, weight in group["weights"].items())
        lost = parts - candidate["reward"]
        assert lost == pytest.approx(0, abs=1e-5) or lost == pytest.approx(sum(group["weights"].values()), abs=1e-5)
    changed = weights(tmp_path / "out")
    assert all(tensor.abs().max() > 0 for name, tensor in changed.items() if "lora_B" in name)
