"""The language model of a checkpoint alone: plain Mistral and Llama with the same logits, tokenizer and vocabulary."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from umed_plugin.checkpoints.language_model import is_language_model, is_of, to_language_model
from umed_plugin.checkpoints.loading import load_checkpoint
from umed_plugin.cli import main
from umed_plugin.errors import UmedError


@pytest.fixture(params=["mistral", "llama"])
def checkpoint(request, tiny_mistral, tiny_llama):
    return {"mistral": tiny_mistral, "llama": tiny_llama}[request.param]


def test_the_language_model_gives_the_same_logits(checkpoint, tmp_path, capsys):
    out = tmp_path / "language-model"
    assert main(["convert", str(checkpoint), "--language-model-only", "--out", str(out), "--quiet"]) == 0
    assert f"serve it with: umed rollout-server {out}" in capsys.readouterr().out
    _, llava, _ = load_checkpoint(checkpoint, device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(out, torch_dtype=torch.float32).eval()
    assert type(plain).__name__ in ("MistralForCausalLM", "LlamaForCausalLM")
    embeds = torch.randn(2, 9, plain.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (model(inputs_embeds=embeds, use_cache=False).logits for model in (llava, plain))
    assert torch.equal(ours, theirs)
    assert (out / "tokenizer.model").read_bytes() == (checkpoint / "tokenizer.model").read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert not [key for key in config if key.startswith("mm_")] and config["vocab_size"] == len(ours[0, 0])
    names = {name.split(".")[1] for name in plain.state_dict()}
    assert "vision_tower" not in names and "mm_projector" not in names


def test_it_is_known_again_until_the_checkpoint_changes(tiny_mistral, tmp_path):
    import shutil

    checkpoint = shutil.copytree(tiny_mistral, tmp_path / "llava-mistral-own")
    out = to_language_model(checkpoint, tmp_path / "language-model")
    assert is_language_model(out) and is_of(out, checkpoint) and not is_language_model(checkpoint)
    with pytest.raises(UmedError, match="exists"):
        to_language_model(checkpoint, out)
    to_language_model(checkpoint, out, overwrite=True)
    weights = next(file for file in checkpoint.iterdir() if file.suffix in (".safetensors", ".bin"))
    weights.touch()
    assert not is_of(out, checkpoint)


def test_a_tokenizer_without_its_vocabulary_is_none(tiny_mistral, tmp_path):
    """A server could not load it, and the files that are left only describe it."""
    base = shutil.copytree(tiny_mistral, tmp_path / "llava-mistral")
    (base / "tokenizer.model").unlink()
    (base / "vocab.json").write_text("{}")
    with pytest.raises(
        UmedError, match=r"has no tokenizer\. Needed: tokenizer\.model or .*vocab\.json and merges\.txt"
    ):
        to_language_model(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_and_a_template_are_refused(tiny_mistral, tmp_path, capsys):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(UmedError, match="is a LoRA folder"):
        to_language_model(tmp_path / "lora", tmp_path / "out")
    arguments = [
        "convert",
        str(tiny_mistral),
        "--language-model-only",
        "--template",
        "umed_v1",
        "--out",
        str(tmp_path / "x"),
    ]
    assert main(arguments) == 2 and "--template umed_v1 has no effect" in capsys.readouterr().err
