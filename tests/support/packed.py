"""The packed pass and the plain one, under one loss, for comparing their outputs and gradients."""

from __future__ import annotations

import copy
from typing import Any

import torch

from support.llava_models import embedded
from umed_plugin.model.forward import answer_pass, base_llava, repeated_inputs


def with_lora(model: Any, *targets: str) -> Any:
    """A copy of the model with an adapter that has left its zeros."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return adapted


def outcome(model: Any, batch: Any, candidates: Any, run: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Logits and hidden states at the answers' tokens, and the gradient of all that is trained, under one loss."""
    model.zero_grad()
    prompts = embedded(model, batch)
    logits, hidden = run(model, prompts, candidates)
    kept = candidates.mask.bool()
    weights = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(2))
    (logits[kept].logsumexp(dim=-1) - logits[kept][:, 3] + hidden[kept] @ weights).mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits[kept].detach(), hidden[kept].detach(), gradients


def packed_run(model: Any, prompts: Any, candidates: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and hidden states of packed rows."""
    passed = answer_pass(model, prompts, candidates, packed=True)
    return passed.logits, passed.hidden


def plain_run(model: Any, prompts: Any, candidates: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt repeated before every answer, in transformers' own words."""
    inputs = repeated_inputs(base_llava(model), prompts, candidates)
    output = model(**inputs, use_cache=False, output_hidden_states=True, return_dict=True)
    start = prompts.mask.shape[1] - 1
    return output.logits[:, start:-1], output.hidden_states[-1][:, start:-1]
