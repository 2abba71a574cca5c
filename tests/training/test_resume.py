"""A stage-1 run that is interrupted and started again ends with the weights of the run that was not interrupted."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from support.records import write_records
from support.umed_runs import INTERRUPT, train, weights

STEPS = ("--max_steps", "16", "--save_steps", "6")
# Grouped as in LLaVA's own scripts.
LORA = ("--lora_enable", "True", "--lora_r", "4", "--lora_dropout", "0.3", "--group_by_modality_length", "True")
PROJECTOR = ("--tune_mm_mlp_adapter", "True")


@pytest.mark.parametrize(
    ("family", "flags", "stop"),
    [("llama", (), signal.SIGINT), ("mistral", LORA, signal.SIGKILL), ("llama", PROJECTOR, signal.SIGKILL)],
    ids=["full-ctrl-c", "lora-kill", "projector-kill"],
)
def test_interrupted_and_resumed_ends_with_the_same_weights(family, flags, stop, request, tmp_path):
    checkpoint = request.getfixturevalue(f"tiny_{family}")
    records = write_records(tmp_path / "data")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"

    run = train(checkpoint, records, whole, *STEPS, *flags)
    assert run.returncode == 0, run.stderr[-3000:]

    hook = tmp_path / "hook"
    hook.mkdir()
    state = str(resumed / "checkpoint-6" / "trainer_state.json")
    (hook / "sitecustomize.py").write_text(INTERRUPT.format(state=state, signal=int(stop)))
    stopped = train(checkpoint, records, resumed, *STEPS, *flags, pythonpath=hook)
    assert stopped.returncode in (-stop, 128 + stop, 1)
    assert (resumed / "checkpoint-6").is_dir()
    assert not (resumed / "trainer_state.json").exists(), "the run was over before it was interrupted"

    run = train(checkpoint, records, resumed, *STEPS, *flags)
    assert run.returncode == 0, run.stderr[-3000:]
    expected, found = weights(whole), weights(resumed)
    assert set(found) == set(expected)
    assert any("mm_projector" in name for name in expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_where_an_epoch_does_not_fill_whole_steps_no_record_is_passed_over(tiny_mistral, tmp_path):
    """Eight batches an epoch, three a step: step 4 ends behind 4 batches of the second epoch. Dropout shows the random state."""
    records, whole, resumed = write_records(tmp_path / "data"), tmp_path / "whole", tmp_path / "resumed"
    dealt = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "3")
    flags = (*dealt, *LORA, "--max_steps", "7", "--save_steps", "4")
    assert train(tiny_mistral, records, whole, *flags).returncode == 0
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    run = train(tiny_mistral, records, resumed, *flags)
    assert run.returncode == 0, run.stderr[-3000:]
    history, again = (json.loads((f / "trainer_state.json").read_text())["log_history"] for f in (whole, resumed))
    assert [line["loss"] for line in again if "loss" in line] == [line["loss"] for line in history if "loss" in line]
    expected, found = weights(whole), weights(resumed)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("family", "flags"), [("llama", ()), ("mistral", LORA)], ids=["full", "lora"])
def test_started_again_behind_its_last_step_it_trains_no_step_more(family, flags, request, tmp_path):
    """As a run that was killed while it saved its result; its last step is in the middle of an epoch of four."""
    checkpoint, records = request.getfixturevalue(f"tiny_{family}"), write_records(tmp_path / "data")
    output, flags = tmp_path / "out", ("--max_steps", "3", "--save_steps", "3", *flags)
    assert train(checkpoint, records, output, *flags).returncode == 0
    expected = weights(output)
    for file in output.iterdir():
        if file.is_file():
            file.unlink()

    run = train(checkpoint, records, output, *flags)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "all 3 steps were done before" in run.stdout
    found = weights(output)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    # Under other settings it names them; what it did before is not taken for their result.
    other = records.with_name("other.json")
    other.write_text(json.dumps(json.loads(records.read_text())[:-1]))
    run = train(checkpoint, other, output, *flags, "--learning_rate", "0.5")
    assert run.returncode == 2 and run.stderr.count("\n  - ") == 2
    assert "--learning_rate 0.5: checkpoint-3 was trained with 0.001" in run.stderr
    assert f"--data_path {other}" in run.stderr and "--umed_accept_changed data_path" in run.stderr


def test_a_run_goes_on_with_its_own_batches_and_with_data_whose_change_is_accepted(tiny_llama, tmp_path):
    """Four steps are an epoch of eight records. transformers 4 would take the checkpoint's batch size for the flag's."""
    records, output = write_records(tmp_path / "data"), tmp_path / "out"
    assert train(tiny_llama, records, output, "--max_steps", "4", "--save_steps", "4").returncode == 0
    items = json.loads(records.read_text())
    records.write_text(json.dumps([*items[:-1], {**items[-1], "id": "another"}]))
    dealt = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--max_steps", "6")
    run = train(tiny_llama, records, output, *dealt, "--umed_accept_changed", "data_path")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "checkpoint-4 was trained under other settings: --data_path: " in run.stdout
    assert "--max_steps: 4 -> 6" in run.stdout and "--per_device_train_batch_size: 2 -> 1" in run.stdout
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 6 and state["epoch"] == 1.5


def test_lora_biases_that_cannot_be_merged_are_refused_before_training(tiny_mistral, tmp_path):
    run = train(tiny_mistral, write_records(tmp_path / "data"), tmp_path / "out", *STEPS, *LORA, "--lora_bias", "all")
    assert run.returncode in (1, 2) and "--lora_bias all: it trains biases that umed merge cannot merge" in run.stderr
    assert not list((tmp_path / "out").glob("checkpoint-*"))


# No file may grow beyond this: what a full disk or a quota does to one that is written.
NO_ROOM = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"


def test_a_full_disk_is_one_line_and_with_room_the_run_goes_on(tiny_mistral, tmp_path):
    """torch.save hides the reason behind "unexpected pos": the line gives it, without a traceback."""
    records, out, hook = write_records(tmp_path / "data"), tmp_path / "out", tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(NO_ROOM)
    flags = ("--max_steps", "4", "--save_steps", "2", *LORA)
    run = train(tiny_mistral, records, out, *flags, pythonpath=hook)
    assert run.returncode == 1
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("umed: error: ")]
    assert "could not be written to its end" in line or "File too large" in line
    assert "the same command again" in line and "Traceback" not in run.stderr
    assert train(tiny_mistral, records, out, *flags).returncode == 0
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4 and weights(out)
