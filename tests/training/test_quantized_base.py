"""QLoRA: both stages train an adapter over a base of 4 bits, which `umed merge` adds to the 16-bit base; all else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.llava_args import llava_args
from support.quantized import machine_fault, needs_kernels
from support.records import grounded_records, write_records
from support.umed_runs import reward, train, weights

from umed_plugin import cli
from umed_plugin.checkpoints.loading import load_checkpoint
from umed_plugin.flags.checks import find_faults
from umed_plugin.flags.definition import UmedFlags

QLORA = ("--lora_enable", "True", "--lora_r", "4", "--bits", "4")


@needs_kernels
def test_stage_1_trains_resumes_and_is_merged_into_the_16_bit_base(
    tiny_mistral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, whole, resumed = write_records(tmp_path / "data"), tmp_path / "whole", tmp_path / "resumed"
    steps = ("--lr_scheduler_type", "constant", "--save_steps", "2")
    assert (run := train(tiny_mistral, records, whole, *QLORA, *steps, "--max_steps", "4")).returncode == 0, run.stderr
    assert "100.0% of the trained entries moved" in run.stdout
    for until in ("2", "4"):
        run = train(tiny_mistral, records, resumed, *QLORA, *steps, "--max_steps", until)
        assert run.returncode == 0, run.stderr[-3000:]
    expected, found = weights(whole), weights(resumed)
    assert set(found) == set(expected) and any("mm_projector" in name for name in expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)

    merged = tmp_path / "llava-mistral-merged"
    assert cli.main(["merge", str(whole), "--base", str(tiny_mistral), "--out", str(merged)]) == 0
    assert "the adapter was trained over weights of 4 bits" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    _, model, _ = load_checkpoint(merged, device="cpu")
    _, over_16_bits, _ = load_checkpoint(whole, base=tiny_mistral, device="cpu")
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, over_16_bits(ids).logits, rtol=0, atol=0.02)


@needs_kernels
def test_stage_1_holds_to_its_start_over_4_bits(tiny_mistral: Path, tmp_path: Path) -> None:
    """The first step's KL is 0: its start is the model with its adapter off. Resumed, the teacher is the same start."""
    records, whole, resumed = write_records(tmp_path / "data"), tmp_path / "whole", tmp_path / "resumed"
    steps = ("--lr_scheduler_type", "constant", "--save_steps", "2", "--umed_keep", "0.5", "--umed_logit_rows", "7")
    assert (run := train(tiny_mistral, records, whole, *QLORA, *steps, "--max_steps", "4")).returncode == 0, run.stderr
    for until in ("2", "4"):
        run = train(tiny_mistral, records, resumed, *QLORA, *steps, "--max_steps", until)
        assert run.returncode == 0, run.stderr[-3000:]
    logs = [json.loads((out / "trainer_state.json").read_text())["log_history"][:4] for out in (whole, resumed)]
    kept = [[float(row["keep_kl"]) for row in log] for log in logs]
    assert kept[0][0] == pytest.approx(0, abs=1e-6) and kept[0][-1] > 1e-4
    assert kept[1] == pytest.approx(kept[0], rel=1e-4, abs=1e-6)
    expected, found = weights(whole), weights(resumed)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


@needs_kernels
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_stage_2_learns_over_4_bits_from_what_it_has_sampled(
    algorithm: str, tiny_mistral: Path, tmp_path: Path
) -> None:
    """The first step's KL is 0: the reference policy is the policy with its adapter off. Its ratios are 1: one policy."""
    records, out = grounded_records(tmp_path / "data"), tmp_path / "out"
    flags = (*QLORA, "--umed_algorithm", algorithm, "--umed_rewards", "half:half", "--umed_reward_weights", "1")
    run = reward(tiny_mistral, records, out, *flags, "--max_steps", "3", "--save_steps", "2")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "100.0% of the trained entries moved" in run.stdout
    state: dict[str, Any] = json.loads((out / "trainer_state.json").read_text())
    first, second = state["log_history"][:2]
    assert abs(float(first["kl"])) < 1e-6 < float(second["kl"])
    assert float(first["clip_fraction"]) == 0 and abs(float(first["policy_loss"])) < 1e-4
    assert json.loads((out / "umed.json").read_text())["settings"]["bits"] == 4
    run = reward(tiny_mistral, records, out, *flags, "--max_steps", "4", "--save_steps", "2")
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 8, "lora_enable": True}, "--bits 8: 8-bit layers compute an answer differently in another batch"),
        ({"bits": 3, "lora_enable": True}, "--bits 3: LLaVA would ignore it"),
        ({"bits": 4, "lora_enable": False}, "Add --lora_enable True"),
        ({"bits": 4, "lora_enable": True, "fsdp": "full_shard"}, "--bits 4 does not work with --fsdp"),
        ({"bits": 4, "lora_enable": True, "deepspeed": {"zero_optimization": {"stage": 3}}}, "with ZeRO-3"),
        ({"bits": 4, "lora_enable": True, "deepspeed": {"zero_optimization": {"stage": 2}}}, None),
        ({"bits": 16, "lora_enable": False}, None),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, Any], said: str | None) -> None:
    model_args, data_args, training_args = llava_args()
    for name, value in changes.items():
        setattr(training_args, name, value)
    faults = find_faults(UmedFlags(umed_stage="instruction_tuning"), model_args, data_args, training_args, files=False)
    found = [fault for fault in faults if "--bits" in fault]
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])


def test_a_machine_without_kernels_is_named_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_fault(bits=16) == []
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    (fault,) = machine_fault()
    assert fault.startswith("--bits 4: bitsandbytes is not installed.") and "--bits 16" in fault
