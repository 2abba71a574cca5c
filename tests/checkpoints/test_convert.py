"""A checkpoint in LLaVA's layout and in transformers' form: the same logits, the same ids, and back into stock LLaVA."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from umed_plugin.checkpoints.loading import TOWER, load_checkpoint, read_tensors, weight_files
from umed_plugin.checkpoints.prompt_templates import question_prompt
from umed_plugin.checkpoints.to_llava import to_llava
from umed_plugin.checkpoints.to_transformers import bare_tower_name, to_transformers
from umed_plugin.cli import main
from umed_plugin.errors import UmedError

QUESTION = "Where is it, and how large is [0.12, 0.5]?"
TEMPLATES = {"mistral": ("mistral_instruct", "umed_mistral"), "llama": ("llava_v1", "umed_v1")}


@pytest.fixture(params=["mistral", "llama"])
def family(request):
    return request.param


@pytest.fixture
def checkpoint(family, tiny_mistral, tiny_llama) -> Path:
    return {"mistral": tiny_mistral, "llama": tiny_llama}[family]


def picture() -> Image.Image:
    """Wide and not symmetric, so that padding, cropping and swapped sides all show."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8))


def loaded_by_transformers(folder: Path):
    """(model in float32, processor)."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, report = LlavaForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    tied = "language_model.lm_head.weight"
    assert not [name for name in report["missing_keys"] if name not in (tied, "lm_head.weight")], report
    assert not report["unexpected_keys"], report
    return model.eval(), AutoProcessor.from_pretrained(folder)


def llava_logits(checkpoint: Path, pixels: torch.Tensor, template: str) -> tuple[list[int], torch.Tensor]:
    """(ids with -200 for the image, logits [L, V]) of LLaVA for the question about ``pixels`` [1, 3, S, S]."""
    from llava.mm_utils import tokenizer_image_token

    tokenizer, model, _ = load_checkpoint(checkpoint, device="cpu")
    marks = "<im_start><image><im_end>" if getattr(model.config, "mm_use_im_start_end", False) else "<image>"
    ids = tokenizer_image_token(question_prompt(f"{marks}\n{QUESTION}", template), tokenizer)
    with torch.no_grad():
        return ids, model(input_ids=torch.tensor([ids]), images=pixels).logits[0]


def transformers_logits(model, processor, pixels: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """(ids with -200 for the image, logits [L, V + 1]) of transformers' model for the same."""
    chat = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
    prompt = processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    # The chat template begins with BOS, as vLLM wants it; the processor adds one of its own.
    inputs = processor(text=prompt.removeprefix("<s>"), images=picture(), return_tensors="pt")
    with torch.no_grad():
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=torch.ones_like(inputs["input_ids"]), pixel_values=pixels
        )
    image, ids = model.config.image_token_index, []
    for index in inputs["input_ids"][0].tolist():
        if index != image or not ids or ids[-1] != -200:
            ids.append(-200 if index == image else index)
    return ids, logits.logits[0]


def check_both_ways(checkpoint: Path, template: str, folder: Path) -> tuple[Path, Path]:
    """Same ids and logits in transformers' form, same tensors back in LLaVA's; returns both folders."""
    there = to_transformers(checkpoint, folder / "hf", template=template)
    model, processor = loaded_by_transformers(there)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ids, wanted = llava_logits(checkpoint, pixels, template)
    found_ids, found = transformers_logits(model, processor, pixels)
    assert found_ids == ids
    patches = 64 + (model.config.vision_feature_select_strategy == "full")
    assert len(ids) - 1 + patches == len(wanted) == len(found)
    torch.testing.assert_close(found[:, : wanted.shape[1]], wanted, atol=1e-5, rtol=0)
    back = to_llava(there, folder / "llava-back")
    was = {name: tensor for name, tensor in tensors_of(checkpoint).items() if not name.startswith(TOWER)}
    now = tensors_of(back)
    assert set(now) == set(was)
    assert all(torch.equal(now[name], was[name]) and now[name].dtype == was[name].dtype for name in was)
    again = llava_logits(back, pixels, template)
    assert again[0] == ids
    torch.testing.assert_close(again[1], wanted, atol=1e-5, rtol=0)
    return there, back


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(checkpoint) for name, tensor in read_tensors(file).items()}


def config_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "config.json").read_text())


def test_answers_as_llava_does(checkpoint, family, tmp_path):
    check_both_ways(checkpoint, TEMPLATES[family][1], tmp_path)


# One property of a checkpoint each: (changes of config.json, change of the tensors by name).


def linear_projector(tensors: dict) -> dict:
    kept = {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name}
    values = torch.Generator().manual_seed(1)
    weight = torch.randn(128, 96, generator=values).half() / 10
    return {**kept, "model.mm_projector.weight": weight, "model.mm_projector.bias": weight[:, 0].clone()}


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
    "image marks": ({"mm_use_im_start_end": True, "vocab_size": 729}, two_more_rows),
    "patch token": ({"mm_use_im_patch_token": True, "vocab_size": 729}, two_more_rows),
}


def variant(checkpoint: Path, out: Path, config: dict, change) -> Path:
    shutil.copytree(checkpoint, out)
    (out / "config.json").write_text(json.dumps({**config_of(out), **config}))
    save_file(change(load_file(out / "model.safetensors")), out / "model.safetensors", metadata={"format": "pt"})
    return out


def add_tokens(checkpoint: Path, *tokens: str) -> None:
    """Tokens behind the 727 of the sentencepiece model."""
    file = checkpoint / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for index, token in enumerate(tokens, start=727):
        plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        config["added_tokens_decoder"][str(index)] = {"content": token, **plain}
    file.write_text(json.dumps(config))


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
