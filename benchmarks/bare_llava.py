"""A LLaVA of any size from torch and transformers 5 alone, with the methods of LLaVA's class and PEFT's wrapper that we call.

The architecture is LLaVA-Med 1.5's: Mistral, CLIP-L with patches of 14 pixels, a projector of two layers. Weights are random
and created on the device.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, MistralConfig, MistralForCausalLM

from umed_plugin.model.forward import embed_prompts, encode_images

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraLinear(nn.Module):
    """A frozen linear layer plus the product of two thin ones (LoRA), which can be switched off."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base, self.on = base, True
        like = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_down, self.lora_up = (
            nn.Linear(base.in_features, rank, **like),
            nn.Linear(rank, base.out_features, **like),
        )
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, states: Tensor) -> Tensor:
        output = self.base(states)
        return output + 2 * self.lora_up(self.lora_down(states)) if self.on else output  # alpha is twice the rank


class Tower(nn.Module):
    """A CLIP tower as LLaVA's class uses it: the patches of its penultimate layer."""

    select_feature = "patch"

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.clip, self.config = CLIPVisionModel(config), config

    @property
    def device(self) -> torch.device:
        return self.clip.device

    @property
    def dtype(self) -> torch.dtype:
        return self.clip.dtype

    def forward(self, pixels: Tensor) -> Tensor:
        return self.clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


class Llava(MistralForCausalLM):
    """The methods of LLaVA's class and of PEFT's wrapper that the plugin calls."""

    def __init__(self, config: MistralConfig, tower: CLIPVisionConfig) -> None:
        super().__init__(config)
        config.rope_theta = config.rope_parameters["rope_theta"]  # where LLaVA's configuration has it
        width = config.hidden_size
        projector = nn.Linear(tower.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        self.model.vision_tower, self.model.mm_projector = Tower(tower), nn.Sequential(*projector)

    def get_model(self) -> nn.Module:
        return self.model

    def get_vision_tower(self) -> Tower:
        return self.model.vision_tower

    @torch.no_grad()
    def generate(self, prompts: Tensor, images: Tensor, **settings: Any) -> Tensor:
        embedded = embed_prompts(self, list(prompts), encode_images(self, images))
        return super().generate(inputs_embeds=embedded.embeds, attention_mask=embedded.mask, **settings)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        layers = [module for module in self.modules() if isinstance(module, LoraLinear)]
        try:
            for layer in layers:
                layer.on = False
            yield
        finally:
            for layer in layers:
                layer.on = True


def build(options: argparse.Namespace) -> Llava:
    """The model; its LoRA layers and projector are trainable."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 7 // 2,  # Mistral 7B: 14336 / 4096
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128,
        num_key_value_heads=max(1, options.hidden // 512),
        max_position_embeddings=32768,
        sliding_window=None,
    )
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    tower = CLIPVisionConfig(
        **sizes, num_hidden_layers=options.tower_layers, image_size=options.image_size, patch_size=14
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with torch.device(options.device):
            model = Llava(config, tower)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name in LINEAR:
                if hasattr(block, name):
                    setattr(block, name, LoraLinear(getattr(block, name), options.lora_rank))
    model.model.mm_projector.requires_grad_(True)
    # No answer may end before its T tokens.
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model
