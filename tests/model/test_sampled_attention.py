"""Vision relevance from sampling's KV cache, against the pass over all prompts and answers."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from support.llava_models import embedded

from umed_plugin import patching
from umed_plugin.model import sampled_attention, sampling
from umed_plugin.model.attention import AttentionSettings, attention_on_lesion
from umed_plugin.model.kv_cache import PreallocatedCache
from umed_plugin.model.sampled_attention import generate_with_attention
from umed_plugin.model.sampling import SamplingSettings, generate
from umed_plugin.patches import attention_mask, split_attention

TOKENS, K, END = 10, 3, 2
# Of three answers to each of three queries: a row ends after 3 tokens, one after 7, and one is cut off.
LENGTHS = [2, 3, 2, 11, 5, 10, 7, 4, 7]


@pytest.fixture(params=["split", "mask"])
def packs(request):
    """Packed rows, by split attention and by a mask alone."""
    applied = [attention_mask.PATCH] + ([split_attention.PATCH] if request.param == "split" else [])
    patching.apply(applied)
    yield
    for patch in reversed(applied):
        patching.undo(patch)


@pytest.fixture
def query(loaded, batch, monkeypatch):
    """A model, prompts of several lengths, the cover of their patches, and settings; answers have the `LENGTHS`."""
    _, model = loaded
    prompts = embedded(model, batch)
    cover = torch.rand(len(prompts.mask), prompts.n_patches, generator=torch.Generator().manual_seed(0))
    settings = SamplingSettings(TOKENS, eos_token_id=END, temperature=1.0, num_candidates=K, packed=True, check_every=1)
    steps = itertools.cycle(range(TOKENS))

    def next_token(logits, _settings):
        step = next(steps)
        lengths = torch.tensor([length for length in LENGTHS if length > step])
        assert len(lengths) == len(logits)
        logits = logits.float().index_fill(-1, torch.tensor(END), -1e9)
        drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=torch.Generator().manual_seed(step))[:, 0]
        return torch.where(lengths == step + 1, END, drawn)

    monkeypatch.setattr(sampling, "_next_token", next_token)
    return model, prompts, cover, settings


def some_tokens(candidates):
    """The second token and the last of each answer, also where it is the last that was drawn; none of the first answer."""
    lengths = candidates.mask.sum(dim=1).tolist()
    return [[], *(sorted({min(1, length - 1), length - 1}) for length in lengths[1:])]


def both(query, settings):
    """Candidates, and their values from the cache and from a whole pass."""
    model, prompts, cover, sampling_settings = query
    candidates, values = generate_with_attention(model, prompts, sampling_settings, some_tokens, cover, settings)
    whole, _ = attention_on_lesion(model, prompts, candidates, some_tokens(candidates), cover, settings, packed=True)
    return candidates, values, whole


@pytest.mark.usefixtures("packs")
@pytest.mark.parametrize(
    "settings",
    [
        AttentionSettings([0, 1, 2, 3]),
        AttentionSettings([1, 3], heads=[1, 2]),
        AttentionSettings([1, 3], sink_ratio=2.6),
    ],
    ids=["all", "some-heads", "without-sinks"],
)
def test_equals_the_whole_pass(query, settings, monkeypatch):
    groups = []
    passed = sampled_attention._pass_of_named
    monkeypatch.setattr(sampled_attention, "_pass_of_named", lambda *args: groups.append(args[4]) or passed(*args))
    candidates, values, whole = both(query, settings)
    torch.testing.assert_close(values, whole, atol=1e-5, rtol=0)
    assert values[0] == 0 and values[1:].min() > 0 and values[1:].std() > 1e-4
    # The cut-off answer's last token is in no cache.
    assert [group.queries.tolist() for group in groups] == [[0], [2], [1]]
    assert candidates.mask.sum(dim=1).tolist() == [min(length, TOKENS) for length in LENGTHS]


@pytest.mark.usefixtures("packs")
def test_samples_what_generate_samples_and_leaves_no_hook(query):
    model, prompts, _, settings = query
    plain = generate(model, prompts, settings)
    before = [len(module._forward_hooks) for module in model.modules()]
    candidates, _, _ = both(query, AttentionSettings([0]))
    assert torch.equal(plain.token_ids, candidates.token_ids) and torch.equal(plain.mask, candidates.mask)
    assert [len(module._forward_hooks) for module in model.modules()] == before


@pytest.mark.usefixtures("packs")
def test_a_window_bounds_what_named_tokens_see(query, monkeypatch):
    model = query[0]
    if "mistral" not in model.config.model_type:
        pytest.skip("Llama has no sliding window")
    prompts, plain = query[1], []
    for window in (None, 6):
        monkeypatch.setattr(model.config, "sliding_window", window)
        with torch.no_grad():
            plain.append(model(inputs_embeds=prompts.embeds, attention_mask=prompts.mask).logits)
    if torch.equal(*plain):
        pytest.skip("the sdpa of transformers 4.37 knows no sliding window")
    _, values, whole = both(query, AttentionSettings([2, 3]))
    torch.testing.assert_close(values, whole, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("packs")
def test_no_named_token_needs_no_pass(query, monkeypatch):
    model, prompts, cover, settings = query
    monkeypatch.setattr(sampled_attention, "_pass_of_named", None)
    candidates, values = generate_with_attention(
        model, prompts, settings, lambda found: [[]] * len(found.mask), cover, AttentionSettings([0, 1])
    )
    assert torch.equal(values, torch.zeros(len(candidates.mask)))


@pytest.mark.usefixtures("packs")
def test_in_bfloat16_differs_as_two_passes_do(query):
    model, prompts, cover, settings = query
    half = copy.deepcopy(model).to(torch.bfloat16)
    rounded = replace(prompts, embeds=prompts.embeds.bfloat16())
    _, values, whole = both((half, rounded, cover, settings), AttentionSettings([0, 1, 2, 3]))
    torch.testing.assert_close(values, whole, atol=5e-3, rtol=0)


@pytest.mark.usefixtures("packs")
def test_finished_rows_take_no_more_than_sampling_did_at_its_start(query, monkeypatch):
    model, prompts, cover, settings = query
    caches, finished = [], []
    made, passed = sampled_attention.empty_cache, sampled_attention._pass_of_named
    monkeypatch.setattr(sampled_attention, "empty_cache", lambda found: caches.append(made(found)) or caches[-1])
    monkeypatch.setattr(sampled_attention, "_pass_of_named", lambda *args: finished.append(args[4]) or passed(*args))
    started = []
    monkeypatch.setattr(PreallocatedCache, "take_rows", counting(PreallocatedCache.take_rows, started))
    both(query, AttentionSettings([0]))
    held = sum(rows.cache.numel() for rows in finished)
    assert 0 < held <= started[0]


def counting(take_rows, sizes):
    """The method, noting how many values the buffers have before it."""

    def counted(self, rows):
        sizes.append(sum(keys.numel() + values.numel() for keys, values in self._buffers))
        take_rows(self, rows)

    return counted


@pytest.mark.usefixtures("packs")
def test_nothing_is_set_aside_unless_it_is_asked_for(query, monkeypatch):
    model, prompts, _, settings = query
    monkeypatch.setattr(PreallocatedCache, "finished", None)
    assert len(generate(model, prompts, settings).mask) == K * len(prompts.mask)
