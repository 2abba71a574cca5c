"""Vision relevance against ``output_attentions=True`` in eager mode, with padding, grouped key heads and several rows."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from support.llava_models import embedded

from umed_plugin import patching
from umed_plugin.model.attention import AttentionSettings, attention_on_lesion
from umed_plugin.model.forward import answer_pass, base_llava, repeated_inputs, uses_packed_pass
from umed_plugin.model.heat_map import attention_maps
from umed_plugin.model.patch_attention import attention_sinks
from umed_plugin.model.sampling import SamplingSettings, generate
from umed_plugin.model.token_spans import decode_with_offsets, naming_tokens, tokens_in_spans
from umed_plugin.patches import attention_mask

TERMS = {"nodule": ["nodule", "nodular lesion"], "cyst": ["cyst"]}


@pytest.fixture(scope="module")
def sampled(loaded, batch):
    tokenizer, model = loaded
    prompts = embedded(model, batch)
    torch.manual_seed(1)
    candidates = generate(
        model, prompts, SamplingSettings(num_candidates=2, max_new_tokens=8, temperature=1.0, eos_token_id=-1)
    )
    rows = [[0, 3], [5], [], [1, 2, 7], [7], [4]]
    cover = torch.rand(len(prompts.mask), prompts.n_patches, generator=torch.Generator().manual_seed(0))
    return model, prompts, candidates, rows, cover


def from_output_attentions(model, prompts, candidates, rows, cover, layers, heads=slice(None), sink_ratio=0.0):
    """The same value, the slow way: attention weights of every layer, renormalised over the image patches that are no sinks."""
    inputs = repeated_inputs(model, prompts, candidates)
    chosen = model.config._attn_implementation
    model.config._attn_implementation = "eager"  # the one that gives the weights
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    model.config._attn_implementation = chosen
    attentions, sinks = output.attentions, []
    for states in output.hidden_states[:-1]:
        ratio = states.abs().amax(-1) / states.square().mean(-1).sqrt()
        sinks.append(ratio >= sink_ratio if sink_ratio else torch.zeros_like(ratio, dtype=torch.bool))
    length, values = prompts.mask.shape[1], []
    for n, tokens in enumerate(rows):
        q = n // 2
        patches = slice(int(prompts.image_start[q]), int(prompts.image_start[q]) + prompts.n_patches)
        shares = []
        for layer in layers:
            for token in tokens:
                weights = attentions[layer][n, heads, length + token, patches] * ~sinks[layer][n, patches]
                shares.append(((weights / weights.sum(-1, keepdim=True)) * cover[q]).sum(-1).mean())
        values.append(torch.stack(shares).mean() if shares else torch.tensor(0.0))
    return torch.stack(values)


@contextmanager
def rows_shared(model, packed):
    """Answers share a row with their prompt where gradient checkpointing keeps no cache."""
    if packed:
        model.train()
        model.gradient_checkpointing_enable()
    assert uses_packed_pass(model, packed) == packed
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


@pytest.fixture
def patched():
    patching.apply([attention_mask.PATCH])
    yield
    patching.undo(attention_mask.PATCH)


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [1, 3]])
def test_equals_the_value_from_output_attentions(sampled, layers, packed):
    model, prompts, candidates, rows, cover = sampled
    with torch.no_grad():
        expected = from_output_attentions(model, prompts, candidates, rows, cover, layers)
    with rows_shared(model, packed):
        value, _ = attention_on_lesion(
            model, prompts, candidates, rows, cover, AttentionSettings(layers), packed=packed
        )
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)
    assert value[2] == 0
    assert value.max() - value[value > 0].min() > 1e-3, (
        "random covers must give different values, or nothing was compared"
    )


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("packed", [False, True])
def test_heads_and_sinks_equal_the_value_from_output_attentions(sampled, packed):
    model, prompts, candidates, rows, cover = sampled

    def value(**options):
        with rows_shared(model, packed):
            settings = AttentionSettings([1, 3], **options)
            return attention_on_lesion(model, prompts, candidates, rows, cover, settings, packed=packed)[0]

    plain = value()
    # A small model has no sinks at the published ratio: this one makes sinks of some of its patches.
    for heads, ratio in (([0], 0.0), ([1, 2], 2.6), (None, 2.6)):
        with torch.no_grad():
            chosen = slice(None) if heads is None else heads
            expected = from_output_attentions(model, prompts, candidates, rows, cover, [1, 3], chosen, ratio)
        found = value(heads=heads, sink_ratio=ratio)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert (found - plain).abs().max() > 1e-3
    assert torch.equal(value(sink_ratio=20.0), plain)
    # Where all patches are sinks, masking them would leave nothing.
    torch.testing.assert_close(value(sink_ratio=1.01), plain)


def test_a_sink_is_a_value_far_above_the_root_mean_square():
    states = torch.ones(3, 1024)
    states[1, 7], states[2, 7] = 40.0, 10.0  # root mean squares 1.6 and 1.05: ratios 25 and 9.5
    weight = torch.linspace(0.1, 2.0, 1024)
    normed = states / states.square().mean(-1, keepdim=True).sqrt() * weight
    assert attention_sinks(normed, weight, 20.0).tolist() == [False, True, False]
    assert attention_sinks(normed, weight, 9.0).tolist() == [False, True, True]
    weight[3] = 0.0
    assert attention_sinks(normed * (weight > 0), weight, 20.0).tolist() == [False, True, False]


def test_returns_the_logits_of_the_plain_pass_and_leaves_no_hook(sampled):
    model, prompts, candidates, rows, cover = sampled
    with torch.no_grad():
        plain = answer_pass(model, prompts, candidates)
    before = hooks_of(model)  # transformers 5 has hooks of its own
    _, passed = attention_on_lesion(model, prompts, candidates, rows, cover, AttentionSettings([0]))
    torch.testing.assert_close(passed.logits, plain.logits)
    torch.testing.assert_close(passed.hidden, plain.hidden)
    assert hooks_of(model) == before


def hooks_of(model) -> list:
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def test_whole_cover_is_one_and_no_cover_is_zero(sampled):
    model, prompts, candidates, rows, cover = sampled
    ones, _ = attention_on_lesion(model, prompts, candidates, rows, torch.ones_like(cover), AttentionSettings([0, 2]))
    named = torch.tensor([bool(tokens) for tokens in rows])
    torch.testing.assert_close(ones, named.float())
    zeros, _ = attention_on_lesion(model, prompts, candidates, rows, torch.zeros_like(cover), AttentionSettings([0, 2]))
    assert zeros.eq(0).all()


def test_in_bfloat16_far_tokens_keep_their_angles(sampled):
    """A cast to bfloat16 rounds the model's own inverse frequencies; 600 positions on, that is half a radian."""
    model, prompts, candidates, rows, cover = sampled
    far = replace(prompts, embeds=torch.cat([prompts.embeds] * 6, dim=1), mask=torch.cat([prompts.mask] * 6, dim=1))
    settings = AttentionSettings([0, 3])
    value, _ = attention_on_lesion(model, far, candidates, rows, cover, settings)
    half = copy.deepcopy(model).to(torch.bfloat16)
    rounded, _ = attention_on_lesion(
        half, replace(far, embeds=far.embeds.bfloat16()), candidates, rows, cover, settings
    )
    torch.testing.assert_close(rounded, value, atol=2e-3, rtol=0)


def test_a_longer_name_of_another_class_is_not_this_ones(loaded):
    tokenizer, _ = loaded
    terms = {"nodule": ["nodule"], "calcified": ["calcified nodule"]}
    token_ids = tokenizer("a calcified nodule", add_special_tokens=False).input_ids
    assert naming_tokens(tokenizer, token_ids, terms, ["nodule"]) == []
    assert naming_tokens(tokenizer, token_ids, terms, ["calcified"]) != []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("It is consistent with a nodule.", "nodule"),
        ("Two nodules and a NODULAR  LESION", "nodulesNODULARLESION"),
        ("No nodule is seen; a cyst is.", "cyst"),
        ("a nodulectomy", ""),
    ],
)
def test_rows_cover_exactly_the_pieces_of_a_name(loaded, text, named):
    tokenizer, _ = loaded
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    rows = naming_tokens(tokenizer, token_ids, TERMS, TERMS)
    pieces = tokenizer.convert_ids_to_tokens([token_ids[row] for row in rows])
    assert "".join(pieces).replace("\u2581", "") == named


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE as GPT-2, Llama 3 and Qwen have it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    made = ByteLevelBPETokenizer()
    corpus = ["It is consistent with a nodule.", "a nodular lesion and a small cyst", "an \u00d6dem of the lung"] * 20
    made.train_from_iterator(corpus, vocab_size=330, min_frequency=2)
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer)


@pytest.fixture(scope="module")
def sentencepiece_with_bytes(tmp_path_factory):
    """A sentencepiece BPE that falls back to bytes, as Llama 2 and Mistral have it; it knows no umlaut and no line break."""
    from support.tuning import make_tokenizer

    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_with_bytes"])
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("It is consistent with a nodule.", ["nodule"]),
        ("nodule", ["nodule"]),
        ("Finding:\nnodule\nand a cyst", ["nodule", "cyst"]),
        ("Two NODULES, one\tnodular lesion", ["NODULES", "nodular lesion"]),
        ("an \u00d6dem, and \u00e9tat du cyst", ["\u00d6dem", "cyst"]),
        ("No nodule is seen; a nodulectomy was done.", []),
    ],
)
def test_names_are_found_across_pieces_of_both_kinds_of_tokenizer(kind, text, named, request):
    tokenizer = request.getfixturevalue(kind)
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    rows = naming_tokens(tokenizer, token_ids, TERMS | {"oedema": ["\u00f6dem"]}, [*TERMS, "oedema"])
    if kind == "byte_level":  # it knows itself which characters a token stands for
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        places = [(text.index(name), text.index(name) + len(name)) for name in named]
        assert rows == [t for t, (a, b) in enumerate(offsets) if any(a < end and b > start for start, end in places)]
    else:
        shown = tokenizer.decode([token_ids[row] for row in rows], clean_up_tokenization_spaces=False)
        # The first of the two bytes of a character is not yet a character.
        assert "".join(shown.split()).replace("\ufffd", "") == "".join("".join(named).split()).replace("\u00d6", "")


def test_tokens_of_a_stretch_of_the_text(loaded):
    tokenizer, _ = loaded
    token_ids = tokenizer("It is a nodule.", add_special_tokens=False).input_ids
    text, ends = decode_with_offsets(tokenizer, token_ids)
    start = text.index("nodule")
    rows = tokens_in_spans(ends, [(start, start + len("nodule"))])
    assert tokenizer.decode([token_ids[row] for row in rows]) == "nodule"
    assert ends[-1] == len(text) and text.strip() == "It is a nodule."


def test_a_class_token_before_the_patches_is_no_patch(sampled, batch, monkeypatch):
    """Of a checkpoint with mm_vision_select_feature cls_patch."""
    model, _, candidates, rows, cover = sampled
    monkeypatch.setattr(base_llava(model).get_vision_tower(), "select_feature", "cls_patch")
    prompts = embedded(model, batch)
    assert prompts.n_patches == cover.shape[1] and len(prompts.embeds[0]) == len(sampled[1].embeds[0]) + 1
    values, _ = attention_on_lesion(model, prompts, candidates, rows, cover, AttentionSettings([0, 2]))
    torch.testing.assert_close(values, from_output_attentions(model, prompts, candidates, rows, cover, [0, 2]))


def test_the_map_of_a_candidate_weighed_by_the_lesion_is_its_vision_relevance(sampled):
    model, prompts, candidates, rows, cover = sampled
    layers = [0, 2]
    maps = attention_maps(model, prompts, candidates, rows, layers)
    values, _ = attention_on_lesion(model, prompts, candidates, rows, cover, AttentionSettings(layers))
    assert maps.shape == (len(rows), prompts.n_patches)
    shares = (maps * cover.to(maps)[torch.arange(len(rows)) // 2]).sum(-1)
    torch.testing.assert_close(shares, values)
    torch.testing.assert_close(maps.sum(-1), torch.tensor([float(bool(row)) for row in rows]))
