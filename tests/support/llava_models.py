"""Prompts and answers for real LLaVA classes with random weights; the fixtures are in ``tests/conftest.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from umed_plugin.model.forward import (
    IMAGE_TOKEN_INDEX,
    Candidates,
    embed_prompts,
    encode_images,
)


def load(checkpoint: Path) -> tuple[Any, Any]:
    """(tokenizer, model in float32) of LLaVA's own classes, its tower loaded."""
    import llava.model  # noqa: F401 (registers the model types)
    from transformers import AutoModelForCausalLM, LlamaTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32)
    model.get_vision_tower().load_model()
    return LlamaTokenizer.from_pretrained(checkpoint), model.eval()


def prompts_and_images(tokenizer: Any, model: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Token ids of three prompts of different lengths, an image in each, and the images [3, 3, S, S]."""
    size = model.get_vision_tower().config.image_size
    shuffle = torch.Generator().manual_seed(0)
    lengths = [(3, 9), (5, 2), (1, 14)]
    bos, image = torch.tensor([tokenizer.bos_token_id]), torch.tensor([IMAGE_TOKEN_INDEX])
    prompts = [torch.cat([bos, ids(a, tokenizer, shuffle), image, ids(b, tokenizer, shuffle)]) for a, b in lengths]
    return prompts, torch.randn(len(prompts), 3, size, size, generator=shuffle)


def ids(count: int, tokenizer: Any, shuffle: torch.Generator) -> torch.Tensor:
    """``count`` random token ids, none of them special."""
    return torch.randint(5, len(tokenizer), (count,), generator=shuffle)


def embedded(model: Any, batch: tuple[list[torch.Tensor], torch.Tensor]) -> Any:
    """The prompts embedded with their images."""
    prompts, images = batch
    return embed_prompts(model, prompts, encode_images(model, images))


def drawn_answers(tokenizer: Any, queries: int, each: int, longest: int = 7) -> Candidates:
    """Answers of different lengths, 1 to ``longest`` tokens, so much so that they are packed."""
    shuffle = torch.Generator().manual_seed(1)
    count = queries * each
    lengths = torch.randint(1, longest // 2 + 1, (count,), generator=shuffle)
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths[:, None]).long()
    assert mask.numel() > 1.5 * mask.sum()
    return Candidates(ids(count * longest, tokenizer, shuffle).view(count, longest), mask)
