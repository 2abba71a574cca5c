"""What matters on an accelerator and can be seen on a CPU: how often sampling waits for the device, and half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from support.llava_models import drawn_answers, embedded
from torch.utils._python_dispatch import TorchDispatchMode

from umed_plugin.model import sampling
from umed_plugin.model.forward import answer_log_probs, answer_pass
from umed_plugin.model.packing import packing_fault
from umed_plugin.model.sampling import SamplingSettings, generate

EOS = 7


@pytest.fixture
def ending(loaded):
    """The model, whose answers end after some ten tokens."""
    model = copy.deepcopy(loaded[1])

    def favour_the_end(_module, _inputs, logits):
        logits = logits.clone()
        logits[..., EOS] = logits.logsumexp(dim=-1) - 2.2
        return logits

    model.get_output_embeddings().register_forward_hook(favour_the_end)
    return model


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("packed", [False, True])
def test_rare_looks_compute_on_in_vain_and_change_no_answer(ending, batch, packed, monkeypatch):
    prompts, seen = embedded(ending, batch), []
    draw = sampling._next_token
    monkeypatch.setattr(sampling, "_next_token", lambda logits, *how: seen.append(logits) or draw(logits, *how))
    settings = {"num_candidates": 4, "max_new_tokens": 24, "temperature": 1.0, "eos_token_id": EOS, "packed": packed}
    torch.manual_seed(0)
    found = generate(ending, prompts, SamplingSettings(**settings, check_every=5))
    drawn = list(seen)
    lengths = found.mask.sum(dim=1)
    assert len(set(lengths.tolist())) > 3, "answers of one length would test nothing"
    assert found.mask.shape[1] == lengths.max()
    for ids, mask, length in zip(found.token_ids, found.mask, lengths):
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert not ids[: length - 1].eq(EOS).any() and ids[length:].eq(EOS).all()
    # Between two looks no answer leaves the rows.
    assert [len(logits) for logits in drawn[:5]] == [12] * 5
    assert 0 < len(drawn[5]) < 12 and len(drawn[9]) == len(drawn[5])
    with torch.no_grad():
        expected = answer_pass(ending, prompts, found).logits
    for step, logits in enumerate(drawn[: found.mask.shape[1]]):
        living = expected[found.mask[:, step].bool(), step]
        assert torch.cdist(living, logits.float()).min(dim=1).values.max() < 1e-2


class Waits(TorchDispatchMode):
    """Counts what makes the processor wait for an accelerator: sizes and numbers that depend on what a tensor holds."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        by_mask = name.startswith(("aten.index.", "aten.index_put")) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += by_mask or name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.equal"))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("patched")
def test_packed_sampling_does_not_wait_at_every_token(loaded, batch):
    _, model = loaded

    def waits(tokens, **how):
        prompts = embedded(model, batch)
        with Waits() as found:
            generate(
                model,
                prompts,
                SamplingSettings(
                    num_candidates=3, max_new_tokens=tokens, temperature=1.0, eos_token_id=-1, packed=True, **how
                ),
            )
        return found.count

    assert waits(17, check_every=16) - waits(15, check_every=16) <= 4  # one look
    assert waits(15, check_every=16) == waits(5, check_every=16)
    assert waits(15, check_every=1) > waits(5, check_every=1) + 10


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_in_bfloat16_samples_and_scores_as_in_float32(loaded, batch, packed):
    tokenizer, model = loaded
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert packing_fault(half) is None
    prompts = embedded(half, batch)
    assert prompts.embeds.dtype == torch.bfloat16
    settings = {"num_candidates": 3, "max_new_tokens": 8, "temperature": 1.0, "eos_token_id": tokenizer.eos_token_id}
    generate(half, prompts, SamplingSettings(**settings, packed=packed))
    answers = drawn_answers(tokenizer, 3, 3)
    kept = answers.mask.bool()
    found = []
    for one in (half, model):
        one = copy.deepcopy(one).train()
        one.gradient_checkpointing_enable()  # then packed answers stand in one row
        with torch.no_grad():
            passed = answer_pass(one, embedded(one, batch), answers, packed=packed)
        assert passed.logits.dtype == passed.hidden.dtype == torch.float32
        found.append(answer_log_probs(passed.logits, answers))
    torch.testing.assert_close(found[0].log_probs[kept], found[1].log_probs[kept], atol=0.1, rtol=0)
    assert (found[0].log_probs - found[1].log_probs).abs().max() > 0
