"""The value network's layer: float32, blind to the token it is asked about, its gradient in the trunk, and its file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from umed_plugin import patching
from umed_plugin.errors import UmedError
from umed_plugin.patches import attention_mask
from umed_plugin.training.value_head import VALUE_HEAD, ValueHead


@pytest.fixture
def patched():
    """A model takes the block mask of packed rows."""
    patching.apply([attention_mask.PATCH])
    yield
    patching.undo(attention_mask.PATCH)


def learnt(hidden_size):
    """A head that has left its zeros."""
    head = ValueHead(hidden_size)
    torch.manual_seed(0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


def test_values_begin_at_zero_and_the_gradient_moves_the_head_first():
    head, hidden = ValueHead(8), torch.randn(2, 3, 8, requires_grad=True)
    values = head(hidden)
    assert values.shape == (2, 3) and values.eq(0).all()
    (values - 1).square().sum().backward()
    assert head.linear.weight.grad.abs().sum() > 0
    assert hidden.grad.eq(0).all(), "a head of zeros hands no gradient on"


def test_it_begins_at_a_constant_once():
    head = ValueHead(8)
    assert head.is_new()
    head.begin_at(-1.5)
    assert not head.is_new() and head(torch.randn(2, 3, 8)).eq(-1.5).all()


def test_values_are_float32_under_autocast_too():
    head, hidden = learnt(64), torch.randn(2, 3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(hidden)
    assert values.dtype == torch.float32
    assert torch.equal(values, head(hidden))
    assert head(hidden.bfloat16()).dtype == torch.float32


def test_what_was_saved_is_loaded_and_anything_else_refused(tmp_path):
    head, other = learnt(8), ValueHead(8)
    head.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [VALUE_HEAD]
    other.load(tmp_path)
    assert torch.equal(other.linear.weight, head.linear.weight) and torch.equal(other.linear.bias, head.linear.bias)
    with pytest.raises(UmedError, match="written by another --umed_algorithm than ppo, or with --save_only_model"):
        other.load(tmp_path / "elsewhere")
    with pytest.raises(UmedError, match=r"\(1, 8\).*\(1, 9\)"):
        ValueHead(9).load(tmp_path)
    save_file({"weight": torch.zeros(8)}, tmp_path / VALUE_HEAD)
    with pytest.raises(UmedError, match="this model's value head"):
        other.load(tmp_path)


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("packed", [False, True])
def test_a_value_knows_the_tokens_before_it_and_not_its_own(packed, tiny_llama):
    """Shifted by one, the value would know what it is to predict, and no answer would have an advantage."""
    from umed_plugin.checkpoints.loading import load_checkpoint
    from umed_plugin.model.forward import IMAGE_TOKEN_INDEX, Candidates, answer_pass, embed_prompts

    tokenizer, model, _ = load_checkpoint(tiny_llama, device="cpu")
    torch.manual_seed(0)
    prompt = torch.tensor([tokenizer.bos_token_id, IMAGE_TOKEN_INDEX, 10, 11, 12])
    features = torch.randn(1, model.get_vision_tower().num_patches, model.config.mm_hidden_size)
    head, ids = learnt(model.config.hidden_size), torch.randint(20, 200, (2, 6))
    ids[1] = ids[0]
    changed = 3
    ids[1, changed] += 1
    model.requires_grad_(True)
    prompts = embed_prompts(model, [prompt], features)
    values = head(answer_pass(model, prompts, Candidates(ids, torch.ones_like(ids)), packed=packed).hidden)
    torch.testing.assert_close(values[0, : changed + 1], values[1, : changed + 1], atol=1e-4, rtol=1e-4)
    assert (values[0, changed + 1 :] - values[1, changed + 1 :]).abs().min() > 1e-3
    values.sum().backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0, "the trunk learns from the value loss too"
    assert model.lm_head.weight.grad is None or model.lm_head.weight.grad.eq(0).all()
