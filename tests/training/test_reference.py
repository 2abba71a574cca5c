"""The reference policy is the start of stage 2, with LoRA and without, and leaves the policy as it was."""

from __future__ import annotations

import pytest
import torch
from support.llava_models import embedded

from umed_plugin.model.forward import answer_pass
from umed_plugin.model.sampling import SamplingSettings, generate
from umed_plugin.training.reference import ReferencePolicy


def logits_of(model, batch, candidates):
    with torch.no_grad():
        return answer_pass(model, embedded(model, batch), candidates).logits


def disturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("lora", [True, False])
def test_reference_gives_the_first_logits_and_gives_the_policy_back(loaded, batch, lora):
    import copy

    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(loaded[1])
    model.requires_grad_(not lora)
    model.get_vision_tower().requires_grad_(False)
    candidates = generate(
        model,
        embedded(model, batch),
        SamplingSettings(num_candidates=2, max_new_tokens=5, temperature=1.0, eos_token_id=-1),
    )
    before = logits_of(model, batch, candidates)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        model.get_base_model().get_model().mm_projector.requires_grad_(True)  # as LLaVA trains it beside the adapter
        model.eval()
    reference = ReferencePolicy(model)
    disturb(model)
    trained = logits_of(model, batch, candidates)
    assert (trained - before).abs().max() > 1e-2
    with reference.as_reference(model) as frozen:
        torch.testing.assert_close(
            answer_pass(frozen, embedded(frozen, batch), candidates).logits, before, atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(logits_of(model, batch, candidates), trained, atol=0, rtol=0)


@pytest.mark.parametrize("lora", [True, False])
def test_under_autocast_the_reference_is_the_start_too(lora, loaded, batch):
    """Autocast keeps bf16 copies of float32 weights that are trained, and knows them by parameter."""
    import copy

    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(loaded[1])
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        model.get_base_model().get_model().mm_projector.requires_grad_(True)
    else:
        model.requires_grad_(True)
        model.get_vision_tower().requires_grad_(False)
    model.eval()
    settings = SamplingSettings(num_candidates=2, max_new_tokens=5, temperature=1.0, eos_token_id=-1)
    candidates = generate(model, embedded(model, batch), settings)
    reference = ReferencePolicy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = logits_of(model, batch, candidates)
    disturb(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = logits_of(model, batch, candidates)
        with reference.as_reference(model) as frozen:
            of_reference = logits_of(frozen, batch, candidates)
        assert torch.equal(logits_of(model, batch, candidates), trained)
    assert torch.equal(of_reference, before)
    assert (trained - before).abs().max() > 1e-2


def test_only_what_training_changes_is_kept(loaded):
    model = loaded[1]
    model.requires_grad_(True)
    model.get_vision_tower().requires_grad_(False)
    kept = ReferencePolicy(model)._initial_values
    assert kept
    assert not [name for name in kept if "vision_tower" in name]
