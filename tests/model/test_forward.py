"""Sampling and scoring against LLaVA's own forward pass and ``generate``, on real LLaVA classes with random weights."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from support.llava_models import embedded
from torch.utils._python_dispatch import TorchDispatchMode

from umed_plugin.errors import UmedError
from umed_plugin.model.forward import (
    answer_log_probs,
    answer_pass,
    repeated_inputs,
)
from umed_plugin.model.sampling import SamplingSettings, adapter_for_decoding, generate
from umed_plugin.patches import attention_mask


def test_prompts_are_embedded_as_llava_does(loaded, batch):
    _, model = loaded
    prompts, images = batch
    ours = embedded(model, batch)
    for q, prompt in enumerate(prompts):
        theirs = model.prepare_inputs_labels_for_multimodal(prompt[None], None, None, None, None, images[q : q + 1])[4]
        torch.testing.assert_close(ours.embeds[q][ours.mask[q].bool()], theirs[0])
        features = model.encode_images(images[q : q + 1])[0]
        start = int(ours.image_start[q])
        torch.testing.assert_close(ours.embeds[q, start : start + ours.n_patches], features)


def test_greedy_tokens_are_those_of_llavas_generate(loaded, batch):
    tokenizer, model = loaded
    prompts, images = batch
    ours = generate(
        model,
        embedded(model, batch),
        SamplingSettings(max_new_tokens=12, temperature=0, eos_token_id=tokenizer.eos_token_id),
    )
    for q, prompt in enumerate(prompts):
        theirs = model.generate(
            prompt[None], images=images[q : q + 1], do_sample=False, max_new_tokens=13, pad_token_id=0, use_cache=True
        )[0]
        theirs = theirs[1:] if theirs[0] == tokenizer.bos_token_id else theirs
        got = ours.token_ids[q][ours.mask[q].bool()]
        assert got.tolist() == theirs[: len(got)].tolist()


def test_greedy_tokens_are_the_argmax_of_the_teacher_forced_pass(loaded, batch):
    """The BOS trap: with ``generate``'s artificial first token left in, every position would be off by one."""
    tokenizer, model = loaded
    prompts = embedded(model, batch)
    greedy = generate(
        model, prompts, SamplingSettings(max_new_tokens=12, temperature=0, eos_token_id=tokenizer.eos_token_id)
    )
    with torch.no_grad():
        logits = answer_pass(model, prompts, greedy).logits
    kept = greedy.mask.bool()
    assert torch.equal(logits.argmax(dim=-1)[kept], greedy.token_ids[kept])


def test_shared_prompt_gives_the_logits_and_gradients_of_the_repeated_one(loaded, batch):
    tokenizer, model = loaded
    torch.manual_seed(0)
    candidates = generate(
        model,
        embedded(model, batch),
        SamplingSettings(num_candidates=3, max_new_tokens=6, temperature=1.0, eos_token_id=tokenizer.eos_token_id),
    )
    kept = candidates.mask.bool()
    model.requires_grad_(True)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        prompts = embedded(model, batch)
        prompts.embeds.retain_grad()
        logits = answer_pass(model, prompts, candidates).logits
        logits[kept].logsumexp(dim=-1).sum().backward()
        results.append((logits[kept].detach(), prompts.embeds.grad.clone(), model.lm_head.weight.grad.clone()))
    model.gradient_checkpointing_disable()
    model.eval()
    for shared, repeated in zip(*results):
        torch.testing.assert_close(shared, repeated, atol=2e-4, rtol=1e-3)


def test_hidden_states_are_those_that_the_logits_are_made_from(loaded, batch):
    tokenizer, model = loaded
    prompts = embedded(model, batch)
    candidates = generate(
        model,
        prompts,
        SamplingSettings(num_candidates=2, max_new_tokens=5, temperature=1.0, eos_token_id=tokenizer.eos_token_id),
    )
    with torch.no_grad():
        passed = answer_pass(model, prompts, candidates)
        expected = model(**repeated_inputs(model, prompts, candidates), output_hidden_states=True).hidden_states[-1]
    kept = candidates.mask.bool()
    torch.testing.assert_close(passed.hidden[kept], expected[:, prompts.mask.shape[1] - 1 : -1][kept])
    torch.testing.assert_close(model.lm_head(passed.hidden), passed.logits)


def test_logits_made_around_the_output_layer_are_an_error(loaded, batch, monkeypatch):
    _, model = loaded
    if model.config.model_type != "llava_llama":
        pytest.skip("Mistral has no pretraining_tp")
    if attention_mask.PATCH.not_needed():
        pytest.skip("transformers 5 calls the output layer whatever pretraining_tp is")
    monkeypatch.setattr(model.config, "pretraining_tp", 2)
    with pytest.raises(UmedError, match="pretraining_tp above 1"):
        generate(model, embedded(model, batch), SamplingSettings(max_new_tokens=2, temperature=0, eos_token_id=-1))


def test_candidates_of_an_expanded_cache_equal_those_of_repeated_prompts(loaded, batch):
    tokenizer, model = loaded
    prompts, images = batch
    settings = {"max_new_tokens": 10, "temperature": 0.8, "top_p": 0.9, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(3)
    shared = generate(model, embedded(model, batch), SamplingSettings(num_candidates=4, **settings))
    repeated = [p for p in prompts for _ in range(4)], images.repeat_interleave(4, dim=0)
    torch.manual_seed(3)
    plain = generate(model, embedded(model, repeated), SamplingSettings(**settings))
    assert torch.equal(shared.token_ids, plain.token_ids)
    assert torch.equal(shared.mask, plain.mask)
    assert len({tuple(row.tolist()) for row in shared.token_ids[:4]}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_merged_while_sampling_where_no_digit_of_it_is_lost(loaded, batch, dtype):
    model, inner = adapted(loaded[1], dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    prompts = embedded(model, batch)
    passes, same_weights = [], []
    for layer in inner:
        layer.register_forward_hook(lambda *_: passes.append(1))
    name, projection = next((name, module) for name, module in model.named_modules() if name.endswith("q_proj"))
    stock = next(weight for key, weight in before.items() if key.startswith(name) and "lora_" not in key)
    handle = projection.register_forward_hook(lambda layer, *_: same_weights.append(torch.equal(layer.weight, stock)))

    sampled = generate(model, prompts, SamplingSettings(max_new_tokens=8, temperature=0, eos_token_id=-1))

    handle.remove()
    # The adapter's own layers are not called. In bf16 its weights are not in the model's either: an update would be rounded away.
    assert not passes
    assert set(same_weights) == {dtype == torch.bfloat16}
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not [module for module in model.modules() if "forward" in vars(module) and hasattr(module, "lora_A")]
    teacher_forced = answer_pass(model, prompts, sampled).logits.argmax(dim=-1)
    agreeing = (teacher_forced == sampled.token_ids).float().mean()
    assert agreeing == 1 if dtype == torch.float32 else agreeing > 0.8
    assert passes
    with model.disable_adapter():
        without = generate(model, prompts, SamplingSettings(max_new_tokens=8, temperature=0, eos_token_id=-1))
    assert not torch.equal(without.token_ids, sampled.token_ids)


def adapted(plain, dtype):
    """A copy in ``dtype`` with a float32 adapter that matters, and the adapter's linear layers."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(plain).to(dtype), settings).eval()
    inner = [
        module for name, module in model.named_modules() if "lora_" in name and isinstance(module, torch.nn.Linear)
    ]
    for layer in inner:
        layer.float()
        torch.nn.init.normal_(layer.weight, std=0.3)
    return model, inner


class Casts(TorchDispatchMode):
    """Counts the casts of matrices with 4 rows or columns: the adapter's weights."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += name == "_to_copy" and args[0].dim() == 2 and 4 in args[0].shape
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_the_adapter_is_cast_once_and_not_for_each_token(loaded, batch, autocast):
    model, inner = adapted(loaded[1], torch.bfloat16)
    prompts = embedded(model, batch)
    counts, forward = [], type(model).forward
    if autocast:  # as accelerate wraps a model's forward pass; leaving the block forgets the casts
        model.forward = torch.autocast("cpu", torch.bfloat16)(functools.partial(forward, model))
    for tokens in (2, 6):
        with torch.no_grad(), Casts() as casts:
            generate(model, prompts, SamplingSettings(max_new_tokens=tokens, temperature=0, eos_token_id=-1))
        counts.append(casts.count)
    assert counts == [len(inner)] * 2


def test_adapters_of_another_form_are_left_to_peft(loaded):
    """Two at a time, or one that is merged already: what is computed stays PEFT's."""
    model, _ = adapted(loaded[1], torch.bfloat16)
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and len(module.lora_A)]
    with adapter_for_decoding(model):
        assert all("forward" in vars(layer) for layer in layers)
    layers[0].merge()
    with adapter_for_decoding(model):
        assert ["forward" in vars(layer) for layer in layers] == [False] + [True] * (len(layers) - 1)
    assert not [layer for layer in layers if "forward" in vars(layer)]


def test_nucleus_keeps_only_the_most_likely_tokens(loaded, batch):
    tokenizer, model = loaded
    settings = {"max_new_tokens": 8, "eos_token_id": tokenizer.eos_token_id}
    greedy = generate(model, embedded(model, batch), SamplingSettings(temperature=0, **settings))
    narrow = generate(model, embedded(model, batch), SamplingSettings(temperature=1.0, top_p=1e-6, **settings))
    assert torch.equal(greedy.token_ids, narrow.token_ids)


def test_mask_ends_with_the_first_eos(loaded, batch):
    _, model = loaded
    prompts = embedded(model, batch)
    free = generate(model, prompts, SamplingSettings(max_new_tokens=6, temperature=0, eos_token_id=-1))
    eos = int(free.token_ids[0, 2])
    ended = generate(model, prompts, SamplingSettings(max_new_tokens=6, temperature=0, eos_token_id=eos))
    first = free.token_ids[0].tolist().index(eos)
    assert ended.mask[0].tolist() == [1] * (first + 1) + [0] * (ended.mask.shape[1] - first - 1)


def test_log_probs_are_those_of_one_answer_alone_without_padding(loaded, batch):
    tokenizer, model = loaded
    prompts, images = batch
    torch.manual_seed(0)
    candidates = generate(
        model,
        embedded(model, batch),
        SamplingSettings(num_candidates=2, max_new_tokens=9, temperature=1.0, eos_token_id=tokenizer.eos_token_id),
    )
    with torch.no_grad():
        ours = answer_log_probs(
            answer_pass(model, embedded(model, batch), candidates).logits, candidates, temperature=0.7
        )
        for n, prompt in enumerate(p for p in prompts for _ in range(2)):
            answer = candidates.token_ids[n][candidates.mask[n].bool()]
            logits = model(input_ids=torch.cat([prompt, answer])[None], images=images[n // 2][None]).logits[0] / 0.7
            expected = logits[-len(answer) - 1 : -1].log_softmax(dim=-1)
            torch.testing.assert_close(
                ours.log_probs[n, : len(answer)], expected.gather(-1, answer[:, None])[:, 0], atol=1e-4, rtol=1e-4
            )
            entropy = -(expected.exp() * expected).sum(dim=-1)
            torch.testing.assert_close(ours.entropy[n, : len(answer)], entropy, atol=1e-4, rtol=1e-4)
            assert ours.log_probs[n, len(answer) :].eq(0).all()
