"""The attention loss against autograd through the weights of eager attention, in every way that stage 1 runs the model."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from support.llava_models import ids
from support.packed import with_lora

from umed_plugin.model.attention import AttentionSettings
from umed_plugin.model.attention_loss import AttentionLoss, LesionTokens
from umed_plugin.model.forward import IMAGE_TOKEN_INDEX, base_llava

WEIGHT = 50.0  # so that the attention's part of the gradient is as large as the rest
# Indices in the answers of the tokens that are watched; the second record has none.
WATCHED = [[0, 4, 5], [], [2]]
LENGTHS = [6, 3, 8]


@pytest.fixture(scope="module")
def rows(loaded, batch):
    """A batch as LLaVA's collator makes it, the tokens to watch, and covers that are not even."""
    tokenizer, model = loaded
    shuffle = torch.Generator().manual_seed(3)
    answers = [ids(length, tokenizer, shuffle) for length in LENGTHS]
    whole = [torch.cat(parts) for parts in zip(batch[0], answers)]
    longest = max(map(len, whole))
    input_ids = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in whole])
    mask = torch.stack([(torch.arange(longest) < len(row)).long() for row in whole])
    starts = torch.tensor([len(prompt) for prompt in batch[0]])
    labels = torch.where((torch.arange(longest) >= starts[:, None]) & mask.bool(), input_ids, -100)
    tokens = [start + torch.tensor(watched, dtype=torch.long) for start, watched in zip(starts, WATCHED)]
    patches = model.get_vision_tower().num_patches
    cover = torch.rand(len(whole), patches, generator=shuffle) ** 4
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "images": batch[1]}
    return inputs, tokens, cover


def settings_of(**options):
    return AttentionSettings(options.pop("layers", [0, 1, 2, 3]), **options)


def from_eager_weights(model, rows, settings):
    """The same loss from ``output_attentions``; columns are counted here by hand."""
    inputs, tokens, cover = rows
    llava = base_llava(model)
    chosen = llava.config._attn_implementation
    llava.config._attn_implementation = "eager"
    entering = {}
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda _, x, __, n=n: entering.update({n: x[0]}))
        for n, layer in enumerate(llava.get_model().layers)
    ]
    output = model(**inputs, output_attentions=True)
    for hook in hooks:
        hook.remove()
    llava.config._attn_implementation = chosen
    lengths = inputs["attention_mask"].sum(1) + cover.shape[1] - 1
    total = 0.0
    for b, watched in enumerate(tokens):
        image = int((inputs["input_ids"][b] == IMAGE_TOKEN_INDEX).nonzero())
        shift = int(lengths.max() - lengths[b]) if llava.config.tokenizer_padding_side == "left" else 0
        patches = slice(image + shift, image + shift + cover.shape[1])
        losses = []
        for token in watched.tolist():
            shares = []
            for layer in settings.layers:
                states = entering[layer][b, patches]
                ratio = states.abs().amax(-1) / states.square().mean(-1).sqrt()
                kept = ratio < (settings.sink_ratio or float("inf"))
                heads = slice(None) if settings.heads is None else list(settings.heads)
                weights = output.attentions[layer][b, heads, token + cover.shape[1] - 1 + shift, patches] * kept
                shares.append((weights * cover[b]).sum(-1) / weights.sum(-1))
            losses.append((1 - torch.stack(shares).mean()) ** 2)
        total = total + (sum(losses) / len(losses) if losses else 0.0)
    return output.loss + WEIGHT * total / len(tokens), total


def gradients_of(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def hooked(model, rows, settings, scale=1.0):
    """Loss and what was measured; the gradient is in the model."""
    inputs, tokens, cover = rows
    llava = base_llava(model)
    lesions = LesionTokens.of(llava.config, inputs["input_ids"], inputs["attention_mask"], tokens, cover)
    attention_loss = AttentionLoss(llava, settings, WEIGHT)
    with attention_loss.watching(lesions):
        loss, measured = attention_loss.added_to(model(**inputs).loss)
        (scale * loss).backward()
    return loss, measured


def prepared(model, way):
    """A copy of the model as stage 1 trains it."""
    if "lora" in way:
        model = with_lora(model, "q_proj", "v_proj")
        base_llava(model).enable_input_require_grads()
    else:
        model = copy.deepcopy(model)
        model.get_vision_tower().requires_grad_(False)
    base_llava(model).config.tokenizer_padding_side = "left" if "left" in way else "right"
    if "checkpointing" in way:
        keywords = {"use_reentrant": "reentrant" in way}
        base_llava(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
    return model.train()


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("full", {}),
        ("full, left", {"layers": [1, 3], "heads": [0, 2], "sink_ratio": 2.6}),
        ("full, checkpointing, reentrant", {"sink_ratio": 2.6}),
        ("full, checkpointing", {}),
        ("lora, checkpointing, reentrant", {"layers": [0, 2]}),
    ],
)
def test_the_gradient_is_that_of_autograd_through_eager_attentions_weights(loaded, rows, way, options):
    model, settings = prepared(loaded[1], way), settings_of(**options)
    llava = base_llava(model)
    checkpointed = llava.is_gradient_checkpointing
    llava.gradient_checkpointing_disable()
    with (
        torch.no_grad()
    ):  # on transformers 5 the tower gives LLaVA another layer's features from the first such call on
        from_eager_weights(model, rows, settings)
    expected, total = from_eager_weights(model, rows, settings)
    expected.backward()
    theirs = gradients_of(model)
    model(**rows[0]).loss.backward()
    without = gradients_of(model)
    if checkpointed:
        llava.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": "reentrant" in way})
    loss, measured = hooked(model, rows, settings)
    ours = gradients_of(model)

    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    assert (measured.records, measured.contributing) == (3, 2)
    assert measured.loss == pytest.approx(float(total.detach()), abs=1e-5)
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, atol=1e-4 * gradient.abs().max().clamp(min=1e-3).item(), rtol=0
        )
    moved = max(float((theirs[name] - without[name]).abs().max()) for name in theirs)
    assert moved > 0.01, "the attention's part must show in the gradient"
    hooked(model, rows, settings, scale=0.25)
    for name, gradient in gradients_of(model).items():  # accumulation and fp16 scale the loss
        torch.testing.assert_close(gradient, 0.25 * ours[name], atol=1e-6, rtol=1e-4)
    assert not [hook for layer in llava.get_model().layers for hook in layer.self_attn.k_proj._forward_hooks.values()]


def test_a_batch_without_lesions_has_the_models_own_loss(loaded, rows):
    model = prepared(loaded[1], "full")
    none = [torch.zeros(0, dtype=torch.long)] * 3
    own = model(**rows[0]).loss
    loss, measured = hooked(model, (rows[0], none, rows[2]), settings_of())
    assert torch.equal(loss, own) and (measured.records, measured.contributing) == (3, 0)
    with pytest.raises(RuntimeError, match="watching"):
        AttentionLoss(model, settings_of(), 1.0).added_to(own)


def test_under_autocast_the_gradient_is_that_of_float32_up_to_rounding(loaded, rows):
    model = prepared(loaded[1], "full, checkpointing, reentrant")
    hooked(model, rows, settings_of())
    exact = gradients_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hooked(model, rows, settings_of())
    for name, gradient in gradients_of(model).items():
        if "q_proj" in name or "k_proj" in name:
            assert torch.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0) > 0.98, name


def test_tokens_and_patches_are_found_where_llava_puts_them():
    """P = 4 patches in place of one token; 9 is padding, also inside a row, where LLaVA drops it."""
    image = IMAGE_TOKEN_INDEX
    input_ids = torch.tensor(
        [[1, 2, image, 3, 4, 5], [1, image, 9, 3, 4, 9], [1, 2, 3, 4, 9, 9], [1, 2, 3, image, 4, 5]]
    )
    mask, cover = input_ids.ne(9).long(), torch.ones(4, 4)
    tokens = [torch.tensor(indices) for indices in ([1, 4, 5], [3, 4], [2], [4])]

    def found(tokens=tokens, cover=cover, **config):
        lesions = LesionTokens.of(SimpleNamespace(**config), input_ids, mask, tokens, cover)
        columns = [lesions.columns[lesions.owners == owner].tolist() for owner in range(len(lesions.rows))]
        return dict(zip(lesions.rows.tolist(), zip(lesions.patches[:, 0].tolist(), columns)))

    assert found() == {0: (2, [1, 7, 8]), 1: (1, [5, 6]), 3: (3, [7])}
    assert found(tokenizer_padding_side="left") == {0: (2, [1, 7, 8]), 1: (3, [7, 8]), 3: (3, [7])}
    assert found(tokenizer_model_max_length=7) == {0: (2, [1]), 1: (1, [5, 6])}, "cut off, tokens and patches alike"
    # LLaVA's collator cuts the text itself, and the tokens count in the uncut one.
    uncut = [torch.tensor([1, 4, 5, 6, 90]), *tokens[1:]]
    assert found(tokens=uncut) == found()
    cover = torch.ones(4, 4)
    cover[1] = 0  # cropped away
    assert list(found(cover=cover)) == [0, 3]
