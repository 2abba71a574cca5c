"""Runs of stage 1 with ``--umed_attention_loss``, through ``umed-run``."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
import torch
from support.records import grounded_records
from support.tuning import make_dataset
from support.umed_runs import TWO_PROCESSES, train, train_flags, umed_run, weights

from umed_plugin.errors import UmedError
from umed_plugin.training.attention_loss_data import LesionCollator, LesionDataset, has_lesion

LOSS = ("--umed_attention_loss", "30")
LORA = shlex.split("--lora_enable True --lora_r 4 --gradient_checkpointing True --bf16 True --learning_rate 1e-2")
SGD = shlex.split("--optim sgd --lr_scheduler_type constant --max_grad_norm 0 --learning_rate 0.05")


def logged(out):
    return [row for row in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in row]


def test_lora_with_checkpointing_in_bf16_turns_the_attention_and_resumes_bit_equal(tiny_mistral, tmp_path):
    records = grounded_records(tmp_path / "data")
    flags = [*LORA, *LOSS, "--umed_vrr_layers", "1,-1", "--max_steps", "8", "--save_steps", "5"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run = train(tiny_mistral, records, whole, *flags)
    assert run.returncode == 0, run.stderr[-3000:]
    log = logged(whole)
    assert {"attention_loss", "attention_on_lesion"} <= {name for row in log for name in row}
    of_records = [row["records_without_lesion"] for row in log]
    assert sum(of_records[:4]) * 2 == pytest.approx(3, abs=1), "3 of 9 records have no boxes"
    shares = [row["attention_on_lesion"] for row in log if "attention_on_lesion" in row]
    assert shares[-1] > shares[0] + 0.01
    for row in log:
        assert row["loss"] >= 30 * row.get("attention_loss", 0) * (1 - row["records_without_lesion"])

    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-5", resumed / "checkpoint-5")
    run = train(tiny_mistral, records, resumed, *flags)
    assert run.returncode == 0, run.stderr[-3000:]
    expected, found = weights(whole), weights(resumed)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    run = train(tiny_mistral, records, resumed, *flags, "--umed_attention_loss", "2", "--max_steps", "9")
    assert run.returncode != 0 and "--umed_attention_loss" in run.stderr


def test_however_a_step_is_split_it_teaches_the_same(tiny_llama, tmp_path):
    """Answers are equally long here, so that LLaVA's own loss does not depend on the split either."""
    records = grounded_records(tmp_path / "data")

    def run(name, size, accumulation, processes=1):
        out = tmp_path / name
        split = shlex.split(f"--per_device_train_batch_size {size} --gradient_accumulation_steps {accumulation}")
        flags = ["--umed_stage", "instruction_tuning", *SGD, *LOSS, *split, "--max_steps", "2"]
        command = ["python", "-m", "llava.train.train_mem"] if processes == 1 else TWO_PROCESSES
        done = umed_run([*command, *train_flags(tiny_llama, records, out, *flags)])
        assert done.returncode == 0, done.stderr[-3000:]
        return weights(out), logged(out)

    one, log = run("one", 4, 1)
    start = weights(tiny_llama)
    assert max(float((tensor - start.get(name, tensor)).abs().max()) for name, tensor in one.items()) > 1e-3
    for found, again in (run("four", 1, 4), run("two", 2, 1, processes=2)):
        for name, tensor in one.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6)
        for row, other in zip(log, again):
            for metric in ("attention_loss", "attention_on_lesion", "records_without_lesion"):
                assert other[metric] == pytest.approx(row[metric], abs=1e-5), metric


def test_the_watched_tokens_are_the_names_of_lesions_that_have_boxes(tokenizer, tmp_path):
    file = grounded_records(tmp_path / "data")
    dataset = make_dataset(file, tokenizer, kind=LesionDataset)
    assert "lesion_tokens" not in dataset[1], "nothing is added before the tower's sizes are known"
    dataset.use_grid(64, 8)
    items = [dataset[index] for index in range(4)]
    assert not len(items[0]["lesion_tokens"]) and not items[0]["lesion_cover"].any()
    for item in (items[1], items[2]):
        pieces = tokenizer.convert_ids_to_tokens(item["input_ids"][item["lesion_tokens"]].tolist())
        assert "".join(pieces).strip("\u2581") == "nodule"
    # 64 x 48 padded to the square: boxes [5, 5, 30, 30] and [35, 10, 60, 40] are moved down by 8.
    first = torch.zeros(64, 64)
    first[13:38, 5:30] = 1
    second = first.clone()
    second[18:48, 35:60] = 1
    for item, pixels in ((items[1], first), (items[2], second)):
        cover = pixels.view(8, 8, 8, 8).mean(dim=(1, 3)).flatten()
        torch.testing.assert_close(item["lesion_cover"], cover, atol=1e-3, rtol=0)
    batch = LesionCollator(lambda items: {"input_ids": len(items)})(items)
    assert batch["input_ids"] == len(batch["lesion_tokens"]) == 4 and batch["lesion_cover"].shape == (4, 64)


def test_records_without_any_box_are_refused(tokenizer, tmp_path):
    file = grounded_records(tmp_path / "data")
    content = json.loads(file.read_text())
    file.write_text(json.dumps([record for record in content if not has_lesion(record)]))
    with pytest.raises(UmedError, match="none of the 3 records has boxes"):
        make_dataset(file, tokenizer, kind=LesionDataset, umed_attention_loss=0.03).use_grid(64, 8)
