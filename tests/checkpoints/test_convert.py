"""A checkpoint in LLaVA's layout and in transformers' form: the same logits, the same ids, and back into stock LLaVA."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.conversion import (
    add_tokens,
    check_both_ways,
    config_of,
    linear_projector,
    picture,
    tensors_of,
    variant,
)

from umed_plugin.checkpoints.folder import TOWER, read_tensors, weight_files
from umed_plugin.checkpoints.to_transformers import to_transformers
from umed_plugin.checkpoints.tower_weights import bare_tower_name
from umed_plugin.cli import main
from umed_plugin.errors import UmedError

TEMPLATES = {"mistral": ("mistral_instruct", "umed_mistral"), "llama": ("llava_v1", "umed_v1")}


@pytest.fixture(params=["mistral", "llama"])
def family(request):
    return request.param


@pytest.fixture
def checkpoint(family, tiny_mistral, tiny_llama) -> Path:
    return {"mistral": tiny_mistral, "llama": tiny_llama}[family]


def test_answers_as_llava_does(checkpoint, family, tmp_path):
    check_both_ways(checkpoint, TEMPLATES[family][1], tmp_path)


# One property of a checkpoint each: (changes of config.json, change of the tensors by name).


def without_output_layer(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def in_bfloat16(tensors: dict) -> dict:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def two_more_rows(tensors: dict) -> dict:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    return {**tensors, **{name: torch.cat([tensors[name], tensors[name][40:42]]) for name in names}}


PROPERTIES = {
    "linear projector": ({"mm_projector_type": "linear"}, linear_projector),
    "class token": ({"mm_vision_select_feature": "cls_patch"}, dict),
    "last layer": ({"mm_vision_select_layer": -1}, dict),
    "tied embeddings": ({"tie_word_embeddings": True}, without_output_layer),
    "bfloat16": ({"torch_dtype": "bfloat16"}, in_bfloat16),
    "larger rotary base": ({"rope_theta": 1000000.0}, dict),
    "scaled positions": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, dict),
    "image marks": ({"mm_use_im_start_end": True, "vocab_size": 729}, two_more_rows),
    "patch token": ({"mm_use_im_patch_token": True, "vocab_size": 729}, two_more_rows),
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_each_property_of_a_checkpoint_survives(name, checkpoint, family, tmp_path):
    changed = variant(checkpoint, tmp_path / f"llava-{family}", *PROPERTIES[name])
    if name == "image marks":
        add_tokens(changed, "<im_start>", "<im_end>")
    if name == "patch token":
        add_tokens(changed, "<im_patch>", "<own>")
    there, back = check_both_ways(changed, TEMPLATES[family][0], tmp_path)
    for key in PROPERTIES[name][0]:
        assert config_of(back).get(key, config_of(back).get("dtype")) == PROPERTIES[name][0][key]
    if name == "linear projector":
        assert torch.equal(tensors_of(there)["multi_modal_projector.linear_2.weight"], torch.eye(128).half())


def test_the_tower_inside_a_checkpoint_is_the_one_that_counts(tiny_mistral, tmp_path):
    """As in LLaVA-Med 1.5; the folder that config.json names holds another one."""
    tower = read_tensors(weight_files(tiny_mistral / "vision_tower")[0])
    inside = {f"{TOWER}vision_tower.vision_model.{bare_tower_name(name)}": tensor for name, tensor in tower.items()}
    inside = {name: tensor * 1.5 for name, tensor in inside.items()}
    changed = variant(tiny_mistral, tmp_path / "llava-mistral", {}, lambda tensors: {**tensors, **inside})
    there, back = check_both_ways(changed, "mistral_instruct", tmp_path)
    name = "vision_tower.vision_model.post_layernorm.weight"
    assert torch.equal(tensors_of(there)[name], inside[TOWER + name])
    assert "unfreeze_mm_vision_tower" not in config_of(back)
    with pytest.raises(UmedError, match="do not fit the tower"):
        gone = inside.pop(f"{TOWER}vision_tower.vision_model.embeddings.position_embedding.weight")
        cut = {f"{TOWER}vision_tower.vision_model.embeddings.position_embedding.weight": gone[:10].clone()}
        other = variant(tiny_mistral, tmp_path / "other-llava", {}, lambda tensors: {**tensors, **inside, **cut})
        to_transformers(other, tmp_path / "none")


@pytest.mark.parametrize("kind", ["safetensors", "bin", "one bin"])
def test_weights_in_any_kind_of_file(kind, tiny_mistral, tmp_path, monkeypatch):
    """Read from shards and pickles, written in shards where the limit of a file is reached."""
    changed = shutil.copytree(tiny_mistral, tmp_path / "llava-mistral")
    tensors = load_file(changed / "model.safetensors")
    (changed / "model.safetensors").unlink()
    halves = {"1": list(tensors)[::2], "2": list(tensors)[1::2]} if kind != "one bin" else {"": list(tensors)}
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    for part, names in halves.items():
        file, some = changed / f"{stem}{part}.{ending}", {name: tensors[name] for name in names}
        save_file(some, file, metadata={"format": "pt"}) if ending == "safetensors" else torch.save(some, file)
    if len(halves) > 1:
        places = {name: f"{stem}{part}.{ending}" for part, names in halves.items() for name in names}
        (changed / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    monkeypatch.setattr("umed_plugin.checkpoints.weight_shards._SHARD_BYTES", 500_000)
    there, back = check_both_ways(changed, "mistral_instruct", tmp_path)
    for folder in (there, back):
        files = weight_files(folder)
        assert len(files) > 1
        assert all(file.stat().st_size < 800_000 for file in files)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors_of(folder).values()]
        assert index["metadata"]["total_size"] == sum(sizes)


STOCK = """
import json, sys
sys.modules["umed_plugin"] = None  # every import of it fails
import numpy, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

answers = []
for path in sys.argv[3:]:
    tokenizer, model, processor, _ = load_pretrained_model(path, None, get_model_name_from_path(path), device="cpu")
    model.float()
    conversation = conv_templates[sys.argv[1]].copy()
    conversation.append_message(conversation.roles[0], "<image>\\nWhere is it?")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer)
    pixels = process_images([Image.open(sys.argv[2])], processor, model.config).float()
    start = len(ids)
    with torch.no_grad():
        for _ in range(12):  # whole passes: generate() needs patches on transformers 5
            ids.append(int(model(input_ids=torch.tensor([ids]), images=pixels).logits[0, -1].argmax()))
    answers.append(ids)
print(json.dumps(answers))
"""


def stock_answers(template: str, image: Path, *checkpoints: Path) -> list[list[int]]:
    """Prompt and greedy answer by stock LLaVA's loader, in a process that cannot import the plugin."""
    command = [sys.executable, "-I", "-c", STOCK, template, str(image), *map(str, checkpoints)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=image.parent, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_back_in_llavas_layout_it_is_the_same_checkpoint(checkpoint, family, tmp_path):
    there, back = tmp_path / "hf", tmp_path / f"llava-{family}-back"
    assert main(["convert", str(checkpoint), "--out", str(there)]) == 0
    assert main(["convert", str(there), "--out", str(back)]) == 0
    old, new = config_of(checkpoint), config_of(back)
    different = {key for key in {*old, *new} if old.get(key) != new.get(key)}
    assert different <= {"mm_vision_tower", "transformers_version", "dtype", "torch_dtype"} | ROPE
    assert new["mm_vision_tower"] == str(back / "vision_tower")
    picture().save(tmp_path / "wide.png")
    first, second = stock_answers(TEMPLATES[family][0], tmp_path / "wide.png", checkpoint, back)
    assert first == second


# transformers 5 saves rotary settings under a name of its own; the conversion writes the one that all versions read.
ROPE = {"rope_parameters", "rope_theta", "rope_scaling"}
