"""A checkpoint in LLaVA's layout and in transformers' form: the same logits, the same ids, and back into stock LLaVA."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from umed_plugin.checkpoint import load_checkpoint, read_tensors, weight_files
from umed_plugin.cli import main
from umed_plugin.conversation import question_prompt
from umed_plugin.to_transformers import to_transformers

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


def test_answers_as_llava_does(checkpoint, family, tmp_path):
    out = to_transformers(checkpoint, tmp_path / "hf", template=TEMPLATES[family][1])
    model, processor = loaded_by_transformers(out)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ids, wanted = llava_logits(checkpoint, pixels, TEMPLATES[family][1])
    found_ids, found = transformers_logits(model, processor, pixels)
    assert found_ids == ids
    assert len(ids) + 63 == len(wanted) == len(found)
    torch.testing.assert_close(found[:, : wanted.shape[1]], wanted, atol=1e-5, rtol=0)


STOCK = """
import json, sys
sys.modules["umed_plugin"] = None  # every import of it fails
import numpy, torch
from PIL import Image
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
    was = {name: tensor for file in weight_files(checkpoint) for name, tensor in read_tensors(file).items()}
    now = {name: tensor for file in weight_files(back) for name, tensor in read_tensors(file).items()}
    assert set(now) == set(was)
    assert all(torch.equal(now[name], was[name]) and now[name].dtype == was[name].dtype for name in was)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint, back))
    different = {key for key in {*old, *new} if old.get(key) != new.get(key)}
    assert different <= {"mm_vision_tower", "transformers_version", "dtype", "torch_dtype"} | ROPE
    assert new["mm_vision_tower"] == str(back / "vision_tower")
    picture().save(tmp_path / "wide.png")
    first, second = stock_answers(TEMPLATES[family][0], tmp_path / "wide.png", checkpoint, back)
    assert first == second


# transformers 5 saves rotary settings under a name of its own; the conversion writes the one that all versions read.
ROPE = {"rope_parameters", "rope_theta", "rope_scaling"}
