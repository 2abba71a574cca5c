"""What a merge keeps of what was learnt: the formula, the command's words, and the way out with --dtype."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support.taught import write_lora

from umed_plugin.checkpoints.folder import read_tensors, weight_files
from umed_plugin.checkpoints.kept_share import KeptShare
from umed_plugin.checkpoints.loading import load_checkpoint
from umed_plugin.cli import main


@pytest.mark.parametrize(
    ("dtype", "size", "share"),
    [
        (torch.bfloat16, 8.7e-5, 0.62),
        (torch.bfloat16, 2.9e-4, 0.88),
        (torch.float16, 8.7e-5, 0.95),
        (torch.float16, 2.9e-4, 0.99),
        (torch.float32, 2.9e-5, 1.0),
    ],
)
def test_a_change_near_the_steps_between_numbers_is_lost(dtype, size, share):
    torch.manual_seed(0)
    base = (torch.randn(512, 512) * 0.02).to(dtype)
    kept = KeptShare()
    for change in torch.randn(2, 256, 512) * size:
        half = base[:256]
        kept.add("w", half, half.float() + change, (half.float() + change).to(dtype))
    assert kept.share == pytest.approx(share, abs=0.02)


def test_frozen_weights_and_the_tower_do_not_count():
    kept, base = KeptShare(), torch.ones(4)
    kept.add("w", base, base, base)
    kept.add("model.vision_tower.w", base, base + 1, base)
    assert kept.share is None
    kept.add("w", base, base + torch.inf, base)
    assert kept.share == 0


def test_tensors_that_the_base_lacks_are_no_training_without_effect(capsys):
    """A projector over a plain language model: there is no change of the base to keep."""
    kept = KeptShare(added=4)
    kept.add("w", torch.ones(4), torch.ones(4), torch.ones(4))
    kept.report()
    printed = capsys.readouterr()
    assert "changed no weight of the base, and added 4 tensors" in printed.out and "warning" not in printed.err


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["large", "small"])
def test_merge_says_what_it_keeps_and_float32_keeps_all(scale, tiny_mistral, tmp_path, capsys):
    base = tmp_path / "base-llava-mistral"
    shutil.copytree(tiny_mistral, base, ignore=shutil.ignore_patterns("vision_tower"))
    load_checkpoint(tiny_mistral, device="cpu", dtype=torch.bfloat16)[1].save_pretrained(base, max_shard_size="400KB")
    (base / "model.safetensors").unlink()
    lora = write_lora(base, tmp_path / "llava-mistral-lora")
    (file,) = lora.glob("adapter_model.*")
    adapter = {name: t * scale if "lora_B" in name else t for name, t in read_tensors(file).items()}
    file.unlink()
    torch.save(adapter, lora / "adapter_model.bin")
    torch.save({}, lora / "non_lora_trainables.bin")

    assert main(["merge", str(lora), "--base", str(base), "--out", str(tmp_path / "llava-mistral-a")]) == 0
    printed = capsys.readouterr()
    lost = "umed: warning: the merge keeps" in printed.err
    assert lost == (scale < 1) and lost == ("--dtype float32" in printed.err)
    assert lost or "umed: the merge keeps 9" in printed.out

    out = tmp_path / "llava-mistral-b"
    assert main(["merge", str(lora), "--base", str(base), "--out", str(out), "--dtype", "float32"]) == 0
    assert "the merge keeps 100.0% of what was learnt." in capsys.readouterr().out
    # A base of float32 values, such as this result, is compared with what it was, not with what it became.
    more = ["merge", str(lora), "--base", str(out), "--out", str(tmp_path / "llava-mistral-c")]
    assert main(more) == 0
    printed = capsys.readouterr()
    assert "the merge keeps 100.0% of what was learnt." in printed.out and "changed no weight" not in printed.err
    tensors = {name: tensor for file in weight_files(out) for name, tensor in read_tensors(file).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    config = json.loads((out / "config.json").read_text())
    assert {config[key] for key in ("torch_dtype", "dtype") if key in config} == {"float32"}
    (index,) = out.glob("*.index.json")
    assert json.loads(index.read_text())["metadata"]["total_size"] == sum(4 * t.numel() for t in tensors.values())


def test_export_says_so_too_and_that_nothing_was_learnt(tiny_mistral, tmp_path, capsys):
    trained = tmp_path / "trained-llava-mistral"
    shutil.copytree(tiny_mistral, trained, ignore=shutil.ignore_patterns("vision_tower"))
    command = ["merge", str(trained), "--base", str(tiny_mistral), "--out"]
    assert main([*command, str(tmp_path / "llava-mistral-a")]) == 0
    assert "the training changed no weight" in capsys.readouterr().err
    model = load_checkpoint(tiny_mistral, device="cpu")[1]
    with torch.no_grad():
        model.lm_head.weight += 1e-6
    model.save_pretrained(trained)
    assert main([*command, str(tmp_path / "llava-mistral-b")]) == 0
    assert "umed: warning: the merge keeps" in capsys.readouterr().err
