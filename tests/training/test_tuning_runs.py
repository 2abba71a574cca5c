"""Runs of stage 1 with further losses, records that come twice and a trained tower, through ``umed-run``."""

from __future__ import annotations

import json
import math
import shlex
import shutil

import pytest
import torch
import yaml
from support.llava_models import load
from support.pages import DOCS, blocks
from support.records import write_records
from support.sam_files import write_sam_file
from support.umed_runs import TWO_PROCESSES, train, train_flags, umed_run, weights

from umed_plugin.checkpoints.folder import TOWER
from umed_plugin.commands.demo.tiny_checkpoint import DEFAULT_CORPUS, make_checkpoint

LORA = shlex.split("--lora_enable True --lora_r 4 --gradient_checkpointing True --learning_rate 1e-2")
SGD = shlex.split("--optim sgd --lr_scheduler_type constant --max_grad_norm 0 --learning_rate 0.05")
STAGE = ("--umed_stage", "instruction_tuning")


def logged(out):
    return [row for row in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in row]


def succeeded(run):
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def test_all_of_it_together_resumes_bit_equal(tiny_mistral, tmp_path):
    records = write_records(tmp_path / "data", count=6)
    teacher = write_sam_file(tmp_path / "vit.pth", "model.")
    asked = "--umed_keep clinkd --umed_logit_rows 5 --umed_replay 0.4 --umed_tower_lr 1e-3 --umed_augment True"
    length = "--num_train_epochs 2 --save_steps 3 --save_total_limit 5 --group_by_modality_length True"
    flags = [*LORA, *asked.split(), *length.split(), "--umed_tower_teacher", str(teacher)]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run = succeeded(train(tiny_mistral, records, whole, *flags))
    assert "2 of 6 records come twice. The run has 7 steps." in run.stdout + run.stderr
    assert "Its licence binds the use of the result." in run.stdout + run.stderr
    log = logged(whole)
    assert log[0]["keep_kl"] == 0 and log[-1]["keep_kl"] > 0.01 and all(-1 <= row["tower_cosine"] <= 1 for row in log)
    assert log[-1]["epoch"] == 2 and [row["epoch"] for row in log[2:4]] == [1, 1.25]
    final = weights(whole)
    assert any("vision_tower" in name for name in final) and not any("map" in name for name in final)
    for number in (3, 6):  # at the end of an epoch, and within one
        resumed.mkdir()
        shutil.copytree(whole / f"checkpoint-{number}", resumed / f"checkpoint-{number}")
        succeeded(train(tiny_mistral, records, resumed, *flags))
        again = weights(resumed)
        assert all(torch.equal(tensor, again[name]) for name, tensor in final.items()), number
        shutil.rmtree(resumed)


def test_keeping_starts_at_the_start_and_holds_full_fine_tuning_back(tiny_llama, tmp_path):
    records = write_records(tmp_path / "data")
    steps = ("--max_steps", "6", "--learning_rate", "3e-3", "--lr_scheduler_type", "constant", "--umed_logit_rows", "4")
    for name, keep in (("held", "20"), ("barely", "1e-6")):
        succeeded(train(tiny_llama, records, tmp_path / name, *steps, "--umed_keep", keep))
    held, barely = logged(tmp_path / "held"), logged(tmp_path / "barely")
    assert held[0]["loss"] == barely[0]["loss"] and held[0]["keep_kl"] == 0
    assert held[-1]["keep_kl"] < barely[-1]["keep_kl"] / 2


def test_another_checkpoint_teaches(tiny_mistral, tmp_path):
    records = write_records(tmp_path / "data")
    teacher = make_checkpoint(tmp_path / "llava-mistral-teacher", seed=7)
    flags = ("--max_steps", "6", "--learning_rate", "3e-3", "--lr_scheduler_type", "constant", "--umed_keep", "5")
    succeeded(train(tiny_mistral, records, tmp_path / "out", *flags, "--umed_teacher", str(teacher)))
    log = logged(tmp_path / "out")
    assert log[0]["keep_kl"] > 0.1 and log[-1]["keep_kl"] < log[0]["keep_kl"] - 0.02
    alone = (*flags, "--max_steps", "1", "--umed_teacher", str(tiny_mistral))
    own = train(tiny_mistral, records, tmp_path / "own", *alone)
    assert logged(tmp_path / "own")[0]["keep_kl"] == 0, succeeded(own).stderr


def test_teachers_that_cannot_teach_are_refused_before_the_model_is_loaded(tiny_mistral, tiny_llama, tmp_path):
    records = write_records(tmp_path / "data")
    words = make_checkpoint(
        tmp_path / "llava-mistral-words", corpus=[*DEFAULT_CORPUS, "pneumothorax cardiomegaly " * 9]
    )
    resnet = tmp_path / "resnet.pth"
    torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, resnet)

    def said(*flags):
        run = train(tiny_mistral, records, tmp_path / "out", "--max_steps", "1", *flags)
        assert run.returncode != 0
        return " ".join(run.stderr.split())

    found = said(
        "--umed_keep", "0.1", "--umed_teacher", str(words), "--umed_tower_teacher", str(resnet), "--umed_replay", "2"
    )
    assert (
        "has another tokenizer. Token " in found and "tokens differ). Needed: a teacher of the same tokenizer" in found
    )
    assert "--umed_tower_teacher" in found and "has no effect without --umed_tower_lr" in found
    assert "holds a ResNet" in found and "--umed_replay 2.0: must be from 0 to 1" in found
    assert "asked under the template llava_v1" in said("--umed_keep", "0.1", "--umed_teacher", str(tiny_llama))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_tower_has_its_own_learning_rate(kind, tiny_mistral, tmp_path):
    """One step of SGD moves by the learning rate, so twice the rate moves the tower twice as far and nothing else."""
    records = write_records(tmp_path / "data")
    lora = ("--lora_enable", "True", "--lora_r", "4", "--lora_dropout", "0") if kind == "lora" else ()
    ends = []
    for rate in (0.01, 0.02):
        out = tmp_path / str(rate)
        succeeded(train(tiny_mistral, records, out, *SGD, *lora, "--max_steps", "1", "--umed_tower_lr", str(rate)))
        ends.append({name.removeprefix("base_model.model."): t.float() for name, t in weights(out).items()})
        assert json.loads((out / "config.json").read_text())["unfreeze_mm_vision_tower"] is True
    start = load(tiny_mistral)[1].state_dict()
    moved = 0
    for name, once in ends[0].items():
        if "lora_" in name or not name.startswith(TOWER):
            assert torch.equal(once, ends[1][name]), name
        elif not name.endswith("position_ids"):
            first, second = once - start[name], ends[1][name] - start[name]
            moved += bool(first.abs().max() > 0)
            torch.testing.assert_close(second, 2 * first, rtol=1e-3, atol=2e-7)
    assert moved > 15, "embeddings and the layer before the selected one are trained"
    with_last = [name for name in ends[0] if "encoder.layers.1." in name]
    assert bool(with_last) == (kind == "full"), "the layer behind the selected one is frozen: LoRA does not save it"
    for name in with_last:
        assert torch.equal(ends[0][name], start[name])


def test_replay_is_the_same_however_a_step_is_split(tiny_mistral, tmp_path):
    """At a learning rate of 0 the losses are those of the start, so a plain loop over the records gives them too."""
    records = write_records(tmp_path / "data", count=7)
    states = {}
    for name, size, accumulation, processes in (("one", 4, 1, 1), ("four", 1, 4, 1), ("two", 2, 1, 2)):
        out = tmp_path / name
        split = shlex.split(f"--per_device_train_batch_size {size} --gradient_accumulation_steps {accumulation}")
        flags = [*STAGE, *SGD, *split, "--learning_rate", "0", "--umed_replay", "0.3", "--num_train_epochs", "2"]
        command = ["python", "-m", "llava.train.train_mem"] if processes == 1 else TWO_PROCESSES
        flags += ["--save_steps", "2", "--save_total_limit", "9"]
        succeeded(umed_run([*command, *train_flags(tiny_mistral, records, out, *flags)]))
        first, last = (torch.load(out / f"checkpoint-{n}" / "replay.pt", weights_only=True) for n in (2, 4))
        assert (first["epoch"], first["steps"], last["epoch"]) == (0, 2, 1)
        states[name] = first["losses"], last["twice"].tolist()
        assert len(states[name][1]) == 2 and not first["losses"].isnan().any()
    for losses, twice in states.values():
        torch.testing.assert_close(losses, states["one"][0], rtol=0, atol=1e-5)
        assert twice == states["one"][1]
    by_loss = sorted(range(7), key=lambda i: -float(states["one"][0][i]))
    assert states["one"][1] == by_loss[:2] and math.isfinite(sum(states["one"][0].tolist()))


def test_the_flags_of_the_page_train(tiny_mistral, tmp_path):
    records = write_records(tmp_path / "data", count=6)
    teacher = write_sam_file(tmp_path / "vit.pth", "model.")
    examples = [yaml.safe_load(block) for block in blocks(DOCS / "training.md", "yaml")]
    given = [block["instruction_tuning"]["flags"] for block in examples if "instruction_tuning" in block]
    assert {"umed_keep", "umed_replay", "umed_tower_lr", "umed_tower_teacher"} == {
        name for one in given for name in one
    }
    for number, flags in enumerate(given):
        flags |= {"umed_tower_teacher": teacher} if "umed_tower_teacher" in flags else {}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        short = ("--max_steps", "3", "--bf16", "True", *(LORA if number else ()))
        succeeded(train(tiny_mistral, records, tmp_path / str(number), *short, *words))


def test_a_weight_of_0_is_no_loss_to_the_bit(tiny_mistral, tmp_path):
    records = write_records(tmp_path / "data")
    flags = ("--max_steps", "2", "--umed_tower_lr", "1e-3")
    missing = ("--umed_tower_teacher", str(tmp_path / "none.pth"), "--umed_tower_teacher_weight", "0")
    for name, more in (("without", ()), ("zero", missing)):
        succeeded(train(tiny_mistral, records, tmp_path / name, *flags, *more))
    without, zero = weights(tmp_path / "without"), weights(tmp_path / "zero")
    assert without and all(torch.equal(tensor, zero[name]) for name, tensor in without.items())


def test_two_processes_share_the_map_of_the_tower_teacher(tiny_mistral, tmp_path):
    records = write_records(tmp_path / "data")
    teacher = write_sam_file(tmp_path / "vit.pth", "image_encoder.")
    ends = []
    for name, size, command in (("one", 4, ["python", "-m", "llava.train.train_mem"]), ("two", 2, TWO_PROCESSES)):
        out = tmp_path / name
        asked = "--max_steps 3 --save_steps 2 --umed_tower_lr 0.05 --umed_tower_teacher_weight 1 --umed_keep 0.3"
        split = f"--per_device_train_batch_size {size}"
        flags = [*STAGE, *SGD, *split.split(), *asked.split(), "--umed_tower_teacher", str(teacher)]
        succeeded(umed_run([*command, *train_flags(tiny_mistral, records, out, *flags)]))
        state = torch.load(out / "checkpoint-2" / "tower_map.pt", weights_only=True)
        ends.append({**weights(out), **state["map"]})
    for name, tensor in ends[0].items():
        torch.testing.assert_close(
            ends[1][name], tensor, rtol=0, atol=5e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
