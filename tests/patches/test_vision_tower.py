"""The tower before the first step: the checkpoint's own weights or the original ones, in float32, without LoRA."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.llava_args import parse

from umed_plugin import patching
from umed_plugin.errors import UmedError
from umed_plugin.patches import ALL, vision_tower

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def towered(source: Path, target: Path, *, shift=0.0, drop=0, shards=False, dtype=torch.float32) -> Path:
    """A copy of a tiny checkpoint that carries tower weights, ``shift`` away from the original ones."""
    target.mkdir()
    for file in (file for file in source.iterdir() if file.is_file()):
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    tower = load_file(source / "vision_tower" / "model.safetensors")
    tower = {
        f"model.vision_tower.vision_tower.{n}": (t + shift).to(dtype)
        for n, t in list(tower.items())[drop:]
        if "position_ids" not in n
    }
    if shards:
        (target / "model.safetensors").unlink()
        parts = {"pytorch_model-1.bin": weights, "pytorch_model-2.bin": tower}
        for name, part in parts.items():
            torch.save(part, target / name)
        places = {tensor: name for name, part in parts.items() for tensor in part}
        (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        save_file({**weights, **tower}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def loaded_tower(checkpoint: Path, tiny: Path, flags: list[str], *more: str):
    """The model and its tower as `train()` has them before the first step."""
    from llava.train import train as llava_train

    tower = ["--vision_tower", str(tiny / "vision_tower"), "--umed_stage", "instruction_tuning"]
    model_args, data_args, training_args = parse([*flags, "--model_name_or_path", str(checkpoint), *tower, *more])
    model = llava_train.LlavaLlamaForCausalLM.from_pretrained(str(checkpoint))
    model.get_model().initialize_vision_modules(model_args=model_args, fsdp=training_args.fsdp)
    loaded = model.get_vision_tower()
    loaded.to(dtype=torch.float16, device=training_args.device)
    assert (data_args.umed_patch_size, data_args.umed_num_patches) == (8, 64)
    return model, loaded


@pytest.mark.parametrize("shards", [False, True], ids=["safetensors", "bin-shards"])
def test_the_checkpoints_own_tower_is_loaded_and_stock_is_told(tiny_mistral, flags, tmp_path, capsys, shards):
    checkpoint = towered(tiny_mistral, tmp_path / "towered", shift=0.5, shards=shards)
    original = load_file(tiny_mistral / "vision_tower" / "model.safetensors")
    patching.apply(ALL)
    model, tower = loaded_tower(checkpoint, tiny_mistral, flags)
    assert tower.dtype == torch.float32
    name = "vision_model.post_layernorm.weight"
    assert torch.allclose(tower.vision_tower.state_dict()[name], original[name].float() + 0.5)
    assert model.config.unfreeze_mm_vision_tower is True
    assert "by 0.5 at most" in capsys.readouterr().out
    model, tower = loaded_tower(checkpoint, tiny_mistral, flags, "--umed_tower_weights", "original")
    assert torch.equal(tower.vision_tower.state_dict()[name], original[name].float())
    assert not hasattr(model.config, "unfreeze_mm_vision_tower")


NOTE = "umed_tower_weights"
LORA = ("--lora_enable", "True")


def test_a_tower_that_was_left_out_is_noted_where_the_training_saves_none(tiny_mistral, flags, tmp_path, capsys):
    original = ("--umed_tower_weights", "original")
    patching.apply(ALL)
    differing = towered(tiny_mistral, tmp_path / "towered", shift=0.5)
    for part in (LORA, ("--tune_mm_mlp_adapter", "True")):
        model, _ = loaded_tower(differing, tiny_mistral, flags, *original, *part)
        assert getattr(model.config, NOTE) == "original"
    assert f"the weights in {differing} are left out" in capsys.readouterr().out
    # Full fine-tuning saves the tower itself; an equal one is no other; and a narrower one is.
    assert not hasattr(loaded_tower(differing, tiny_mistral, flags, *original)[0].config, NOTE)
    equal = towered(tiny_mistral, tmp_path / "equal", dtype=torch.bfloat16)
    assert not hasattr(loaded_tower(equal, tiny_mistral, flags, *original, *LORA)[0].config, NOTE)
    partial = towered(tiny_mistral, tmp_path / "partial", drop=2)
    assert getattr(loaded_tower(partial, tiny_mistral, flags, *original, *LORA)[0].config, NOTE) == "original"


def test_a_note_of_an_earlier_training_does_not_stay(tiny_mistral, flags, tmp_path):
    patching.apply(ALL)
    checkpoint = towered(tiny_mistral, tmp_path / "towered", shift=0.5)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, NOTE: "original"}))
    assert not hasattr(loaded_tower(checkpoint, tiny_mistral, flags, *LORA)[0].config, NOTE)


def test_the_original_tower_is_trained_with_where_the_checkpoint_asks_for_its_own(tiny_mistral, flags, tmp_path):
    """With unfreeze_mm_vision_tower in its config.json, LLaVA builds the tower with the checkpoint's weights in it."""
    original = load_file(tiny_mistral / "vision_tower" / "model.safetensors")
    checkpoint = towered(tiny_mistral, tmp_path / "towered", shift=0.5)
    config = json.loads((checkpoint / "config.json").read_text())
    own = {"unfreeze_mm_vision_tower": True, "mm_vision_tower": str(tiny_mistral / "vision_tower")}
    (checkpoint / "config.json").write_text(json.dumps({**config, **own}))
    patching.apply(ALL)
    name = "vision_model.post_layernorm.weight"
    for more, shift in (((), 0.5), (("--umed_tower_weights", "original"), 0)):
        model, tower = loaded_tower(checkpoint, tiny_mistral, flags, *more)
        assert torch.allclose(tower.vision_tower.state_dict()[name], original[name].float() + shift)
        assert getattr(model.config, "unfreeze_mm_vision_tower", False) == bool(shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_equal_tower_is_said_to_be_equal_rounded_or_not(tiny_mistral, flags, tmp_path, capsys, dtype):
    patching.apply(ALL)
    model, _ = loaded_tower(towered(tiny_mistral, tmp_path / "towered", dtype=dtype), tiny_mistral, flags)
    assert "equal those of" in capsys.readouterr().out
    assert not hasattr(model.config, "unfreeze_mm_vision_tower")


@pytest.fixture
def said_by_transformers(monkeypatch) -> Iterator[list[str]]:
    """What it warns of while it loads."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "level", logging.WARNING)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_tower_tensors_are_not_listed_as_unused_where_they_are_loaded(
    tiny_mistral, flags, tmp_path, said_by_transformers, capsys
):
    """Another tensor that nothing uses still is, and so are the tower's where its weights are not asked for."""

    def listed(*more: str) -> set[str]:
        said_by_transformers.clear()
        loaded_tower(checkpoint, tiny_mistral, flags, *more)
        lists = [text for text in said_by_transformers if "were not used when" in text or "UNEXPECTED" in text]
        return {name for name in ("vision_tower", "model.stray") if name in "".join(lists)}

    checkpoint = towered(tiny_mistral, tmp_path / "towered")
    patching.apply(ALL)
    assert listed() == set() and "equal those of" in capsys.readouterr().out
    assert listed("--umed_tower_weights", "original") == {"vision_tower"}
    file = checkpoint / "model.safetensors"
    save_file({**load_file(file), "model.stray": torch.zeros(1)}, file, metadata={"format": "pt"})
    assert listed() == {"model.stray"}


def test_a_tower_that_does_not_fit_is_refused(tiny_mistral, flags, tmp_path):
    patching.apply(ALL)
    with pytest.raises(UmedError, match="2 tensors are missing"):
        loaded_tower(towered(tiny_mistral, tmp_path / "towered", drop=2), tiny_mistral, flags)


def test_lora_stays_out_of_a_tower_that_is_loaded_early(tiny_mistral, flags, tmp_path):
    from llava.train import train as llava_train
    from peft import LoraConfig, get_peft_model

    patching.apply(ALL)
    model, _ = loaded_tower(tiny_mistral, tiny_mistral, flags)
    names = llava_train.find_all_linear_names(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM"))
    places = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert places
    assert not [name for name in places if "vision_tower" in name or "mm_projector" in name]
    assert vision_tower._outside_the_tower(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(1, 1)}), ["q_proj"]) == [
        "q_proj"
    ]


def test_without_a_stage_the_tower_is_only_made_computable(tiny_mistral, flags, tmp_path, capsys):
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    patching.apply(ALL)
    args = SimpleNamespace(mm_vision_select_layer=-2)
    tower = CLIPVisionTower(str(tiny_mistral / "vision_tower"), args)
    assert tower.to(dtype=torch.float16, device="cpu").dtype == torch.float32
    assert tower.to(dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16
    assert vision_tower._computable(tower, {"dtype": torch.float16, "device": "cuda:0"})["dtype"] == torch.float16
    tower.umed_keep_fp32 = True
    assert vision_tower._computable(tower, {"dtype": torch.float16, "device": "cuda:0"})["dtype"] == torch.float32
