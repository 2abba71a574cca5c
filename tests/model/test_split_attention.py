"""Packed rows by split attention: with eager, SDPA and flash attention, on both stacks, against the prompt repeated K times.

flash-attn needs a GPU. Its one function is replaced by `support.flash`, which has the same signature and semantics; all else is
the code that runs on a GPU.
"""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from support.flash import exact_flash_attn_func, exact_flash_attn_varlen_func, flash_attn_varlen_func
from support.llava_models import drawn_answers, embedded
from support.packed import outcome, packed_run, plain_run, with_lora
from transformers import modeling_utils
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from umed_plugin import patching
from umed_plugin.errors import UmedError
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.model import split_attention
from umed_plugin.model.forward import base_llava, prefill
from umed_plugin.model.kv_cache import PreallocatedCache
from umed_plugin.model.packing import Columns, packing_fault
from umed_plugin.model.sampling import SamplingSettings, continue_prompts
from umed_plugin.patches import attention_mask
from umed_plugin.patches import split_attention as patch
from umed_plugin.training.answer_packing import can_pack

KINDS = ("eager", "sdpa", "flash_attention_2")


@pytest.fixture
def split(monkeypatch):
    """The layers read descriptions of rows, and flash attention runs on a CPU, also for a plain row without padding."""
    monkeypatch.setattr(split_attention, "flash_function", lambda: exact_flash_attn_varlen_func)
    monkeypatch.setattr(modeling_llama, "flash_attn_func", exact_flash_attn_func, raising=False)
    monkeypatch.setattr(modeling_mistral, "flash_attn_func", exact_flash_attn_func, raising=False)
    monkeypatch.setattr(modeling_mistral, "_flash_supports_window_size", True, raising=False)
    functions = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", None)
    if functions is not None:  # transformers 5
        monkeypatch.setitem(functions, "flash_attention_2", functions["sdpa"])
    patching.apply([attention_mask.PATCH, patch.PATCH])
    yield
    patching.undo(patch.PATCH)
    patching.undo(attention_mask.PATCH)


def with_attention(model, kind):
    """The model as if it had been loaded with this kind of attention, which may not run here."""
    llava = base_llava(model)
    llava.config._attn_implementation = kind
    for layer in llava.get_model().layers:
        classes = vars(sys.modules[type(layer.self_attn).__module__])
        family = "Mistral" if "mistral" in llava.config.model_type else "Llama"
        name = {"eager": "Attention", "sdpa": "SdpaAttention", "flash_attention_2": "FlashAttention2"}[kind]
        layer.self_attn.__class__ = classes.get(f"{family}{name}", classes[f"{family}Attention"])
        layer.self_attn._flash_attn_uses_top_left_mask = False  # flash-attn 2.1 or later
    decoder = llava.get_model()
    decoder._use_flash_attention_2, decoder._use_sdpa = kind == "flash_attention_2", kind == "sdpa"
    return model


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["kept", "reentrant", "recomputed"])
def test_outputs_and_gradients_are_those_of_the_repeated_prompt(loaded, batch, kind, checkpointing):
    tokenizer, model = loaded
    candidates = drawn_answers(tokenizer, 3, 4)
    plain = copy.deepcopy(model).train().requires_grad_(True)
    model = with_attention(copy.deepcopy(plain), kind)
    assert packing_fault(model) is None
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    logits, hidden, gradients = outcome(model, batch, candidates, packed_run)
    expected_logits, expected_hidden, expected_gradients = outcome(plain, batch, candidates, plain_run)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(hidden, expected_hidden, atol=1e-4, rtol=1e-4)
    assert set(gradients) == set(expected_gradients)
    for name, expected in expected_gradients.items():
        assert (gradients[name] - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_and_an_answer_alone(loaded, batch, kind):
    tokenizer, model = loaded
    candidates = drawn_answers(tokenizer, 3, 1)
    plain = with_lora(model, "q_proj", "v_proj").train()
    adapted = with_attention(copy.deepcopy(plain), kind)
    adapted.gradient_checkpointing_enable()
    base_llava(adapted).enable_input_require_grads()
    _, _, gradients = outcome(adapted, batch, candidates, packed_run)
    _, _, expected_gradients = outcome(plain, batch, candidates, plain_run)
    assert set(gradients) == set(expected_gradients)
    for name, expected in expected_gradients.items():
        assert (gradients[name] - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("kind", KINDS)
def test_a_sliding_window_reaches_back_as_far_as_in_the_plain_pass(tiny_mistral, batch, kind):
    import llava.model  # noqa: F401 (registers the model types)
    from transformers import AutoModelForCausalLM, LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(tiny_mistral)
    plain = AutoModelForCausalLM.from_pretrained(
        tiny_mistral, torch_dtype=torch.float32, sliding_window=9, attn_implementation="eager"
    ).train()
    plain.get_vision_tower().load_model()
    model = with_attention(copy.deepcopy(plain), kind)
    model.gradient_checkpointing_enable()
    candidates = drawn_answers(tokenizer, 3, 2, longest=12)
    kept = candidates.mask.bool()
    with torch.no_grad():
        found = packed_run(model, embedded(model, batch), candidates)[0]
        expected = plain_run(plain, embedded(plain, batch), candidates)[0]
        model.config.sliding_window = None
        unlimited = packed_run(model, embedded(model, batch), candidates)[0]
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-4, rtol=0)
    assert (found - unlimited)[kept].abs().max() > 1e-3


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("kind", KINDS)
def test_answers_side_by_side_are_those_of_one_row_each_and_copy_no_key(loaded, batch, kind, monkeypatch):
    tokenizer, model = loaded
    settings = {"num_candidates": 4, "max_new_tokens": 10, "temperature": 1.0, "eos_token_id": tokenizer.eos_token_id}

    repeated = []

    def counting(stock):
        return lambda *inputs: repeated.append(1) or stock(*inputs)

    def sampled(packed, kind):
        torch.manual_seed(3)
        one = with_attention(copy.deepcopy(model), "eager")
        prompts, cache = embedded(one, batch), PreallocatedCache(40)
        with torch.no_grad():
            first = prefill(one, prompts, cache)
        repeated.clear()
        with_attention(
            one, kind
        )  # the prompts were read by eager attention: without flash-attn, transformers has no other
        return continue_prompts(
            one, cache, first.logits[:, -1], prompts.mask, SamplingSettings(**settings, packed=packed)
        )

    module = sys.modules[type(model.get_model().layers[0].self_attn).__module__]
    monkeypatch.setattr(module, "repeat_kv", counting(module.repeat_kv))
    packed = sampled(packed=True, kind=kind)
    assert not repeated
    patching.undo(patch.PATCH)
    plain = sampled(packed=False, kind="eager")
    patching.apply([patch.PATCH])
    assert repeated, "the stock method copies them"
    assert torch.equal(packed.token_ids, plain.token_ids)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", ["bool", "added", "causal"])
def test_grouped_heads_are_those_of_repeated_keys(name, masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    seen = torch.ones(5, 5).tril().bool()
    mask = {"bool": seen, "added": torch.zeros(2, 1, 5, 5).masked_fill(~seen, -1e30), "causal": None}[masked]
    scores = q @ k.repeat_interleave(4, dim=1).transpose(2, 3) / 4
    expected = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ v.repeat_interleave(4, dim=1)
    torch.testing.assert_close(split_attention.attend(q, k, v, mask, name), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("of_mask", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_queries", [torch.float32, torch.bfloat16])
def test_a_mask_of_any_dtype_hides_the_same_keys(of_mask, of_queries, name):
    """Under autocast the mask has more range than the queries; over a base of 4 bits, less."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 16).to(of_queries) for heads in (4, 2, 2))
    seen = torch.ones(5, 5).tril().bool()
    seen[0] = False  # a padded row, which sees nothing
    added = torch.zeros(2, 1, 5, 5, dtype=of_mask).masked_fill(~seen, torch.finfo(of_mask).min)
    found = split_attention.attend(q, k, v, added, name)
    expected = split_attention.attend(q, k, v, seen[None, None].expand(2, 1, 5, 5), name)
    assert found.dtype == of_queries and torch.isfinite(found).all()
    torch.testing.assert_close(
        found[:, :, 1:], expected[:, :, 1:], atol=1e-2 if of_queries != torch.float32 else 1e-6, rtol=0
    )


def test_spans_of_two_rows():
    columns = Columns(
        torch.tensor([[-1, 0, 0, 1, 1, 2], [0, 0, 0, 1, 2, -1]]),
        torch.tensor([[0, 0, 1, 2, 3, 2], [0, 1, 2, 3, 3, 0]]),
    )
    description = split_attention.describe_rows(columns.segments, columns.positions)
    spans = split_attention.spans_of(description)
    assert split_attention.spans_of(description.detach()) is spans
    assert split_attention.is_description(description)
    assert not split_attention.is_description(columns.segments)
    again = split_attention.spans_of(description.clone())
    assert again is not spans
    for one in (spans, again):
        assert one.prompts.tolist() == [[1, 2, 2], [6, 7, 8]]
        assert one.prompt_lengths.tolist() == [2, 3]
        assert one.answers.tolist() == [[3, 4], [5, 5], [9, 9], [10, 10]]
        assert one.answer_lengths.tolist() == [2, 1, 1, 1]
        assert [starts.tolist() for starts in one.starts] == [[0, 2, 5], [0, 2, 3, 4, 5], [0, 4, 7, 11, 15]]
        seen = one.answer_mask(None)[:, 0].int().tolist()
        assert seen[0] == [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
        assert one.answer_mask(2)[0, 0].int().tolist() == [[0, 1, 0, 1, 0], [0, 0, 0, 1, 1]]
        assert sorted(one.outputs.tolist()) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    address = description.data_ptr()
    del description
    assert address not in split_attention._SPANS, "spans of a freed description could be taken for those of the next"


def test_without_flash_attention_the_fault_says_so(loaded):
    _, model = loaded
    flash = with_attention(copy.deepcopy(model), "flash_attention_2")
    assert packing_fault(flash) == "flash_attention_2 takes no block mask"
    patching.apply([attention_mask.PATCH, patch.PATCH])
    try:
        assert "flash_attn" in packing_fault(flash)
    finally:
        patching.undo(patch.PATCH)
        patching.undo(attention_mask.PATCH)


@pytest.mark.usefixtures("split")
def test_a_flash_attention_that_aligns_its_mask_to_the_first_key_is_found_out(loaded, monkeypatch):
    """As flash-attn before 2.1 does: an answer would not see its own token."""
    _, model = loaded
    flash = with_attention(copy.deepcopy(model), "flash_attention_2")

    def aligned_to_the_first_key(q, k, v, cu_q, cu_k, *rest, **keywords):
        lengths = zip(cu_q.tolist(), cu_k.tolist(), cu_k.tolist()[1:], cu_q.diff().tolist())
        kept = torch.cat([torch.arange(start, min(start + n, end)) for _, start, end, n in lengths])
        return exact_flash_attn_varlen_func(q, k[kept], v[kept], cu_q, cu_q, *rest, **keywords)

    assert packing_fault(flash) is None
    monkeypatch.setattr(split_attention, "flash_function", lambda: aligned_to_the_first_key)
    assert "other outputs for packed rows" in packing_fault(flash)


@pytest.mark.usefixtures("split")
def test_rows_are_packed_over_float32_weights_in_the_precision_of_the_run(loaded, monkeypatch):
    """As full fine-tuning keeps its weights without DeepSpeed: flash attention refuses float32."""
    _, model = loaded
    monkeypatch.setattr(split_attention, "flash_function", lambda: flash_attn_varlen_func)
    flash = with_attention(copy.deepcopy(model), "flash_attention_2")
    assert "only support fp16 and bf16" in packing_fault(flash)
    args = SimpleNamespace(deepspeed=None, bf16=False, fp16=False, device=torch.device("cpu"), process_index=0)
    flags = UmedFlags(umed_stage="rewarding")
    assert not can_pack(flash, flags, args)
    args.bf16 = True
    assert can_pack(flash, flags, args)


@pytest.mark.usefixtures("split")
def test_attention_dropout_is_refused(loaded, batch):
    tokenizer, model = loaded
    model = copy.deepcopy(model).train()
    for layer in model.get_model().layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UmedError, match="attention_dropout to 0"):
        model.gradient_checkpointing_enable()
        packed_run(model, embedded(model, batch), drawn_answers(tokenizer, 3, 2))


@pytest.mark.usefixtures("split")
def test_another_library_that_replaces_the_method_is_seen(loaded, monkeypatch):
    """As LLaVA's xformers attention does."""
    _, model = loaded
    assert split_attention.attends_split(model)
    attention = type(model.get_model().layers[0].self_attn)
    with monkeypatch.context() as replaced:
        replaced.setattr(attention, "forward", lambda self, *args, **keywords: None)
        assert not split_attention.attends_split(model)


@pytest.mark.parametrize(
    ("weights", "settings", "half"),
    [
        (torch.bfloat16, {}, torch.bfloat16),
        (torch.uint8, {"_pre_quantization_dtype": torch.float16}, torch.float16),
        (torch.uint8, {"torch_dtype": torch.bfloat16}, torch.bfloat16),
        (torch.float32, {"dtype": torch.float16}, torch.float16),
        (torch.float32, {}, torch.float32),
    ],
    ids=["16 bits", "4 bits", "4 bits of another release", "before DeepSpeed casts", "float32"],
)
def test_float32_queries_are_cast_for_flash_attention_to_16_bits_and_never_to_packed_ones(weights, settings, half):
    """LLaVA keeps norms in float32 over a base of 4 bits, whose weights are bytes."""
    config = SimpleNamespace(_attn_implementation="flash_attention_2", **settings)
    attention = SimpleNamespace(
        training=False, config=config, q_proj=SimpleNamespace(weight=SimpleNamespace(dtype=weights))
    )
    assert patch._kernel(attention, torch.zeros(1)).half == half
