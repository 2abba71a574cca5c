"""A tiny checkpoint that says one sentence, whatever it is asked, for tests that need a box in an answer.

Its weights are set, not trained: no layer adds anything, so a token's own embedding alone decides which one comes next. For
that no token may stand twice in the sentence; a character that does is spelled by its byte then, which reads the same.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

SENTENCE = "The finding is a nodule at (125,430;687 951)."
BOX01 = (0.125, 0.43, 0.687, 0.951)


def teach(checkpoint: Path, out: Path, sentence: str = SENTENCE, template: str = "") -> Path:
    """A copy of the checkpoint below ``out`` (of the same name) that answers with the sentence when asked in the template."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    from umed_plugin.checkpoints.prompt_templates import question_prompt

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, use_fast=False)
    template = template or ("umed_mistral" if "mistral" in checkpoint.name else "umed_v1")
    chain = [tokenizer(question_prompt("What is it?", template)).input_ids[-1]]
    for token in tokenizer(sentence, add_special_tokens=False).input_ids:
        if token in chain:
            character = tokenizer.convert_ids_to_tokens(token).replace("\u2581", " ")
            token = tokenizer.convert_tokens_to_ids(f"<0x{ord(character):02X}>")
        chain.append(token)
    chain.append(tokenizer.eos_token_id)
    assert len(set(chain)) == len(chain), "a token stands twice"

    weights = load_file(checkpoint / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")) and "vision_tower" not in name:
            tensor.zero_()
    weights["model.norm.weight"].fill_(1.0)
    embeddings = torch.nn.functional.normalize(weights["model.embed_tokens.weight"].float(), dim=1)
    output = torch.zeros_like(embeddings)
    for token, following in zip(chain, chain[1:]):
        output[following] = embeddings[token]
    weights["lm_head.weight"] = output.half()
    taught = out / checkpoint.name
    shutil.copytree(checkpoint, taught)
    save_file(weights, taught / "model.safetensors", metadata={"format": "pt"})
    return taught
