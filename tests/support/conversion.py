"""Checkpoints in LLaVA's layout and in transformers', and the comparison of the two."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from umed_plugin.checkpoints.folder import TOWER, read_tensors, weight_files
from umed_plugin.checkpoints.loading import load_checkpoint
from umed_plugin.checkpoints.prompt_templates import question_prompt
from umed_plugin.checkpoints.to_llava import to_llava
from umed_plugin.checkpoints.to_transformers import to_transformers

QUESTION = "Where is it, and how large is [0.12, 0.5]?"


def picture() -> Image.Image:
    """Wide and not symmetric, so that padding, cropping and swapped sides all show."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8))


def loaded_by_transformers(folder: Path):
    """(model in float32, processor)."""
    from transformers import LlavaForConditionalGeneration

    model, report = LlavaForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    tied = "language_model.lm_head.weight"
    assert not [name for name in report["missing_keys"] if name not in (tied, "lm_head.weight")], report
    assert not report["unexpected_keys"], report
    return model.eval(), loaded_processor(folder)


def loaded_processor(folder: Path):
    """The processor; from its two parts where transformers reads a patch size that its class refuses (docs/convert.md)."""
    from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor, LlavaProcessor

    if "patch_size" in inspect.signature(LlavaProcessor).parameters or not hasattr(
        LlavaProcessor, "get_processor_dict"
    ):
        return AutoProcessor.from_pretrained(folder)
    return LlavaProcessor(CLIPImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


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
    """All tensors of a checkpoint by name."""
    return {name: tensor for file in weight_files(checkpoint) for name, tensor in read_tensors(file).items()}


def config_of(checkpoint: Path) -> dict:
    """What its config.json holds."""
    return json.loads((checkpoint / "config.json").read_text())


def linear_projector(tensors: dict) -> dict:
    """The tensors with a linear projector of random values instead of the MLP."""
    kept = {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name}
    values = torch.Generator().manual_seed(1)
    weight = torch.randn(128, 96, generator=values).half() / 10
    return {**kept, "model.mm_projector.weight": weight, "model.mm_projector.bias": weight[:, 0].clone()}


def variant(checkpoint: Path, out: Path, config: dict, change: Callable[[dict], dict]) -> Path:
    """A copy with other values in config.json, and with changed tensors."""
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
