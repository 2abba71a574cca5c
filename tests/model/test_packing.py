"""Packed rows against one row for each answer: logits, hidden states, gradients and sampled tokens, on real LLaVA classes."""

from __future__ import annotations

import copy

import pytest
import torch
from support.llava_models import drawn_answers, embedded
from support.packed import outcome, packed_run, plain_run, with_lora

from umed_plugin import patching
from umed_plugin.model.forward import answer_log_probs, answer_pass, base_llava, uses_packed_pass
from umed_plugin.model.kv_cache import PreallocatedCache
from umed_plugin.model.output_layer import Scoring
from umed_plugin.model.packing import Columns, block_mask, pack, packing_fault
from umed_plugin.model.sampling import SamplingSettings, generate
from umed_plugin.patches import attention_mask


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("each", [1, 8])
@pytest.mark.parametrize("way", ["full", "full-checkpointing", "lora", "lora-checkpointing"])
def test_logits_hidden_states_and_gradients_are_the_plain_pass(loaded, batch, way, each):
    tokenizer, model = loaded
    candidates = drawn_answers(tokenizer, 3, each)
    model = with_lora(model, "q_proj", "v_proj", "up_proj") if "lora" in way else copy.deepcopy(model)
    model.train()
    if "full" in way:
        model.requires_grad_(True)
    if "checkpointing" in way:
        model.gradient_checkpointing_enable()
        base_llava(model).enable_input_require_grads()
    logits, hidden, gradients = outcome(model, batch, candidates, packed_run)
    expected_logits, expected_hidden, expected_gradients = outcome(model, batch, candidates, plain_run)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(hidden, expected_hidden, atol=1e-4, rtol=1e-4)
    assert set(gradients) == set(expected_gradients)
    assert ("lora" in way) == any("lora_" in name for name in gradients)
    for name, expected in expected_gradients.items():
        assert (gradients[name] - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("way", ["packed", "repeated", "shared"])
@pytest.mark.parametrize("rows", [0, 5])
def test_scores_made_part_by_part_are_those_of_all_logits(loaded, batch, way, rows):
    tokenizer, model = loaded
    candidates = drawn_answers(tokenizer, 3, 4)
    model = copy.deepcopy(model).train().requires_grad_(True)
    if way != "shared":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    results = []
    for scoring in (Scoring(0.7, rows, entropy_gradient=True, hidden=True), None):
        model.zero_grad()
        passed = answer_pass(model, embedded(model, batch), candidates, packed=way == "packed", scoring=scoring)
        scores = passed.scores
        if scoring is None:
            scores = answer_log_probs(passed.logits, candidates, temperature=0.7, entropy_gradient=True)
        (scores.log_probs.sum() + 0.3 * scores.entropy.sum() + passed.hidden.square().mean()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((scores.log_probs.detach(), scores.entropy.detach(), gradients))
    (log_probs, entropy, gradients), (expected, expected_entropy, expected_gradients) = results
    torch.testing.assert_close(log_probs, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-6, rtol=1e-6)
    assert log_probs[~candidates.mask.bool()].eq(0).all() and entropy[~candidates.mask.bool()].eq(0).all()
    assert set(gradients) == set(expected_gradients)
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.usefixtures("patched")
def test_scores_keep_no_logits_for_the_backward_pass_and_hidden_states_only_on_request(loaded, batch):
    tokenizer, model = loaded
    candidates = drawn_answers(tokenizer, 3, 4)
    model = copy.deepcopy(model).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = {}
    for rows in (0, 5):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.shape) or x, lambda x: x):
            passed = answer_pass(model, embedded(model, batch), candidates, packed=True, scoring=Scoring(1.0, rows))
        kept[rows] = sum(shape[-1:] == (len(tokenizer),) and len(shape) < 3 for shape in sizes)
        assert passed.hidden.numel() == passed.logits.numel() == 0
    assert kept[0] > 0 and kept[5] == 0


@pytest.mark.usefixtures("patched")
def test_answers_take_one_row_where_no_cache_is_kept(loaded):
    _, model = loaded
    model = copy.deepcopy(model).train()
    assert not uses_packed_pass(model, packed=True)
    model.gradient_checkpointing_enable()
    assert uses_packed_pass(model, packed=True)
    assert not uses_packed_pass(model, packed=False)


@pytest.mark.usefixtures("patched")
def test_autocast_trains_the_adapter_and_agrees_to_its_precision(loaded, batch):
    tokenizer, model = loaded
    candidates = drawn_answers(tokenizer, 3, 4)
    model = with_lora(model, "q_proj", "v_proj").train()
    results = []
    for run in (packed_run, plain_run):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(outcome(model, batch, candidates, run))
    (logits, _, gradients), (expected, _, expected_gradients) = results
    torch.testing.assert_close(logits, expected.float(), atol=0.05, rtol=0)
    # How far bfloat16 takes gradients from those in float32 depends on the processor, and so how far apart the two passes may be.
    exact = outcome(model, batch, candidates, plain_run)[2]
    for name, gradient in expected_gradients.items():
        rounding = (gradient - exact[name]).norm()
        assert (gradients[name] - gradient).norm() <= 2 * max(rounding, 0.1 * gradient.norm()), name


@pytest.mark.usefixtures("patched")
def test_a_sliding_window_reaches_back_as_far_as_in_the_plain_pass(tiny_mistral, batch):
    import llava.model  # noqa: F401 (registers the model types)
    from transformers import AutoModelForCausalLM, LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(tiny_mistral)
    model = AutoModelForCausalLM.from_pretrained(tiny_mistral, torch_dtype=torch.float32, sliding_window=9).eval()
    model.get_vision_tower().load_model()
    candidates = drawn_answers(tokenizer, 3, 2, longest=12)
    prompts, kept = embedded(model, batch), candidates.mask.bool()
    with torch.no_grad():
        found, expected = packed_run(model, prompts, candidates)[0], plain_run(model, prompts, candidates)[0]
        model.config.sliding_window = None
        unlimited, as_stock = packed_run(model, prompts, candidates)[0], plain_run(model, prompts, candidates)[0]
    if torch.equal(as_stock, expected):
        pytest.skip("the sdpa of transformers 4.37 knows no sliding window")
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-4, rtol=0)
    assert (found - unlimited)[kept].abs().max() > 1e-3


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_sampled_side_by_side_the_tokens_are_those_of_one_row_each(loaded, batch, temperature):
    tokenizer, model = loaded
    settings = {"num_candidates": 4, "max_new_tokens": 12, "temperature": temperature, "top_p": 0.95}
    free = generate(model, embedded(model, batch), SamplingSettings(**settings, eos_token_id=-1))
    common = free.token_ids.flatten().bincount(minlength=len(tokenizer))
    for eos in (-1, int(common.argmax())):  # no answer ends, or they end at different steps
        answers = []
        for packed in (False, True):
            torch.manual_seed(3)
            answers.append(
                generate(model, embedded(model, batch), SamplingSettings(**settings, eos_token_id=eos, packed=packed))
            )
        assert torch.equal(answers[0].mask, answers[1].mask)
        assert torch.equal(answers[0].token_ids, answers[1].token_ids)
    if temperature:
        assert len(set(answers[1].mask.sum(dim=1).tolist())) > 1, "all answers ended at the same step"


@pytest.mark.skipif(
    attention_mask.PATCH.not_needed() is not None, reason="this transformers takes a ready mask by itself"
)
def test_without_the_patch_the_model_takes_no_block_mask_and_with_it_does(loaded):
    _, model = loaded
    before = torch.random.get_rng_state()
    # transformers 4.36 fails on it; 4.37 reads it as ones and zeros.
    assert packing_fault(model).startswith(
        ("its attention refuses a block mask (ValueError", "its attention ignores a block mask")
    )
    patching.apply([attention_mask.PATCH])
    try:
        assert packing_fault(model) is None
        assert packing_fault(copy.deepcopy(model).bfloat16()) is None
    finally:
        patching.undo(attention_mask.PATCH)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.usefixtures("patched")
def test_attention_that_ignores_or_misreads_the_mask_is_found_out(loaded, monkeypatch):
    """LLaVA's xformers attention looks at one number of the mask; transformers 4.37 takes ones and zeros."""
    _, model = loaded
    stock = type(model.get_model()).forward

    def causal(self, *, attention_mask, **inputs):
        return stock(self, attention_mask=torch.ones(1, 3), **inputs)

    def inverted(self, *, attention_mask, **inputs):
        mask = 1 - attention_mask
        return stock(self, attention_mask=mask.masked_fill(mask.bool(), torch.finfo(mask.dtype).min), **inputs)

    monkeypatch.setattr(type(model.get_model()), "forward", causal)
    assert "ignores" in packing_fault(model)
    monkeypatch.setattr(type(model.get_model()), "forward", inverted)
    assert packing_fault(model) is not None


def test_flash_attention_and_scaling_by_length_are_named(loaded, monkeypatch):
    _, model = loaded
    monkeypatch.setattr(model.config, "rope_scaling", {"type": "dynamic", "factor": 2.0}, raising=False)
    assert "'dynamic'" in packing_fault(model)
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    assert packing_fault(model) == "flash_attention_2 takes no block mask"


def test_layout_of_two_queries():
    prompts = torch.tensor([[0, 1, 1], [1, 1, 1]])
    answers = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 0]])
    rows = pack(prompts, answers)
    assert rows.columns.segments.tolist() == [[-1, 0, 0, 1, 1, 2], [0, 0, 0, 1, 2, -1]]
    assert rows.columns.positions.tolist() == [[0, 0, 1, 2, 3, 2], [0, 1, 2, 3, 3, 0]]
    assert rows.column.tolist() == [[3, 4], [5, 5], [3, 3], [4, 4]]
    assert rows.before[:, 0].tolist() == [2, 2, 2, 2]
    assert rows.before[0, 1] == 3
    assert rows.put(torch.tensor([[7, 8], [9, 0], [4, 0], [5, 0]]), answers).tolist() == [[7, 8, 9], [4, 5, 0]]


def test_the_mask_of_a_row():
    columns = Columns(torch.tensor([[-1, 0, 0, 1, 1, 2]]), torch.tensor([[0, 0, 1, 2, 3, 2]]))
    seen = block_mask(columns, columns, None, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 0, 0, 1],
    ]
    near = block_mask(columns, columns, 2, torch.float32)[0, 0] == 0
    assert near[4].int().tolist() == [0, 0, 0, 1, 1, 0]


def test_a_cache_with_room_holds_what_was_written_without_moving_it():
    cache = PreallocatedCache(room=5)
    first, second = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8)
    keys, values = cache.update(first, -first, 0)
    place = keys.data_ptr()
    keys, values = cache.update(second, -second, 0)
    assert keys.data_ptr() == place
    assert torch.equal(keys, torch.cat([first, second], dim=2))
    assert torch.equal(values, -keys)
    assert cache.get_seq_length() == 6
    cache.take_rows(torch.tensor([1, 1]))
    assert torch.equal(cache.update(second, second, 0)[0][0, :, :6], keys[1])
