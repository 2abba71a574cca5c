"""Weights that are trained in bf16 learn: they are kept in float32, through checkpoints too, and the run says what moved."""

from __future__ import annotations

import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.records import grounded_records
from support.umed_runs import reward, train, weights
from torch import nn
from transformers import TrainerControl, TrainerState

from umed_plugin.errors import UmedError
from umed_plugin.training.finite_weights import FiniteWeights, has_broken_weights
from umed_plugin.training.trained_weights import MovedShare, keep_in_float32, say_moved

# The default learning rate of the projector in `umed upgrade`, and in LLaVA's LoRA scripts.
TWENTY = shlex.split("--bf16 True --max_steps 20 --lr_scheduler_type constant --mm_projector_lr 2e-5 --save_steps 10")


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 0, 0.2), (torch.float32, 1, 1)])
def test_share_of_entries_that_twenty_steps_of_the_projectors_learning_rate_move(dtype, least, most):
    """The fault itself: 20 steps of 2e-5 leave most bf16 entries where they are."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 256, bias=False, dtype=dtype)
    before, target = layer.weight.detach().clone(), torch.randn(256, 256, dtype=dtype)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-5, weight_decay=0.0)
    for _ in range(20):
        layer.weight.grad = layer.weight.detach() - target
        optimizer.step()
    assert least <= (layer.weight != before).float().mean().item() <= most


def test_a_lora_runs_projector_moves_whole_and_its_checkpoint_keeps_float32(tiny_mistral, tmp_path):
    records = grounded_records(tmp_path / "data")
    lora = ("--lora_enable", "True", "--lora_r", "4")
    run = train(tiny_mistral, records, tmp_path / "out", *TWENTY, *lora)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "trained tensors (28,928 entries) are kept in float32" in run.stdout
    assert re.search(r"100.0% of the trained entries moved in the first 10 steps \(61,6\d\d of 61,696\)", run.stdout), (
        run.stdout
    )
    first = load_file(tiny_mistral / "model.safetensors")
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-10"):
        projector = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
        assert len(projector) == 4
        for name, tensor in projector.items():
            assert tensor.dtype == torch.float32
            start = first[name.removeprefix("base_model.model.")].bfloat16().float()
            assert (tensor != start).float().mean() > 0.999, name


def test_full_fine_tuning_in_bf16_keeps_float32_and_resumes_to_the_same_weights(tiny_llama, tmp_path):
    records = grounded_records(tmp_path / "data")
    flags = [*TWENTY, "--learning_rate", "1e-6", "--umed_rewards", "half:half", "--umed_reward_weights", "1"]
    flags += ["--gradient_checkpointing", "True", "--umed_updates_per_rollout", "2", "--save_steps", "3"]
    steps = ("--max_steps", "6")
    run = reward(tiny_llama, records, tmp_path / "out", *flags, *steps)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "100.0% of the trained entries moved in the first 6 steps" in run.stdout
    expected = weights(tmp_path / "out")
    (tmp_path / "again").mkdir()
    (tmp_path / "out" / "checkpoint-3").rename(tmp_path / "again" / "checkpoint-3")
    run = reward(tiny_llama, records, tmp_path / "again", *flags, *steps)
    assert run.returncode == 0, run.stderr[-3000:]
    found = weights(tmp_path / "again")
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == torch.float32 or "vision_tower" in name, name


def test_only_what_is_trained_and_short_is_cast():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3, dtype=torch.float16), nn.Linear(3, 2, dtype=torch.bfloat16))
    model[2].weight.requires_grad_(False)
    cast = keep_in_float32(model)
    assert (cast.tensors, cast.entries) == (3, 6 + 3 + 2)
    assert [p.dtype for p in model.parameters()] == [torch.float32] * 4 + [torch.bfloat16, torch.float32]


def test_the_run_warns_if_little_moved(capsys):
    say_moved(157, 1000, 10)
    printed = capsys.readouterr()
    assert "15.7% of the trained entries moved in the first 10 steps (157 of 1,000)" in printed.out
    assert "only 15.7%" in printed.err
    say_moved(900, 1000, 1)
    printed = capsys.readouterr()
    assert "90.0% of the trained entries moved in the first step" in printed.out and not printed.err


def test_nan_has_not_moved(capsys):
    model = nn.Linear(2, 2)
    model.get_input_embeddings = nn.Module
    moved, state = MovedShare(), TrainerState(max_steps=1)
    moved.on_train_begin(None, state, None, model=model)
    model.weight.data.fill_(float("nan"))
    state.global_step = 1
    moved.on_step_end(None, state, None)
    assert "0.0% of the trained entries moved" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["nan", "inf"])
def test_weights_that_are_not_finite_end_the_run_before_a_log_a_save_and_the_end(broken, tmp_path):
    model, head = nn.Linear(2, 2), nn.Linear(2, 1)
    (tmp_path / "checkpoint-2").mkdir()
    args = SimpleNamespace(output_dir=str(tmp_path), learning_rate=0.5, device=torch.device("cpu"))
    gathers = SimpleNamespace(gather=lambda own: torch.cat([torch.zeros(1), own]))  # another rank finds nothing
    state = TrainerState(global_step=3)
    watch = FiniteWeights(SimpleNamespace(args=args, state=state, model=model, value_head=head, accelerator=gathers))
    asked = [
        TrainerControl(should_log=True),
        TrainerControl(should_save=True),
        TrainerControl(should_training_stop=True),
    ]
    for control in asked:
        watch.on_step_end(args, state, control)
    head.weight.data[0, 1] = float(broken)
    watch.on_step_end(args, state, TrainerControl())
    for control in asked:
        with pytest.raises(UmedError, match=r"after step 3: .*checkpoint-2; .*--learning_rate is too high \(0.5\)"):
            watch.on_step_end(args, state, control)
    with pytest.raises(UmedError, match="checkpoint-2 has NaN"):
        watch.on_train_begin(args, state, TrainerControl())
    head.weight.requires_grad_(False)
    watch.on_epoch_end(args, state, TrainerControl(should_save=True))


def test_the_padding_of_a_part_under_zero_3_is_not_looked_at(monkeypatch):
    """DeepSpeed cuts a weight into equal parts. What is behind its end in the last one was never written."""
    parameter = nn.Parameter(torch.zeros(0))
    parameter.ds_numel, parameter.ds_tensor = 10, torch.zeros(4)
    parameter.ds_tensor[2:] = float("nan")
    trainer = SimpleNamespace(
        model=nn.ParameterList([parameter]),
        args=SimpleNamespace(device=torch.device("cpu")),
        accelerator=SimpleNamespace(gather=lambda own: own),
    )
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 2)
    assert not has_broken_weights(trainer)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 1)
    assert has_broken_weights(trainer)


@pytest.mark.parametrize("stage", ["tuning", "rewarding"])
def test_a_run_that_turns_to_nan_says_so_and_saves_nothing_of_it(stage, tiny_llama, tmp_path):
    records, out = grounded_records(tmp_path / "data"), tmp_path / "out"
    flags = shlex.split("--learning_rate 1e20 --max_steps 4 --logging_steps 500 --save_steps 100 --umed_stage ")
    if stage == "tuning":
        run = train(tiny_llama, records, out, *flags, "instruction_tuning")
        assert "after step 4: trained weights are NaN or infinite" in run.stderr
    else:
        run = reward(tiny_llama, records, out, *flags, "rewarding")
        assert re.search("after step [1-3]: the logits of an answer's first token are NaN or infinite", run.stderr)
    assert run.returncode == 1 and "No checkpoint was saved before" in run.stderr and "(1e+20)" in run.stderr
    assert "100.0% of the trained" not in run.stdout and not list(out.glob("*.safetensors"))
