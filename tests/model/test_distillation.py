"""The KL to a teacher's answers: by hand, in parts, and where it acts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from scipy.special import rel_entr, softmax

from umed_plugin.errors import UmedError
from umed_plugin.model.distillation import AnswerStates, Head, answer_kl, answer_states, head_of, record_losses
from umed_plugin.model.forward import IMAGE_TOKEN_INDEX

IDENTITY = Head(torch.eye(4))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_three_tokens_by_hand(temperature, rows):
    shuffle = torch.Generator().manual_seed(0)
    now, teacher = torch.randn(2, 3, 4, generator=shuffle, dtype=torch.float32)
    p, q = (softmax(logits.double().numpy() / temperature, axis=-1) for logits in (teacher, now))
    expected = rel_entr(p, q).sum(axis=-1).mean()
    found = answer_kl(now, IDENTITY, teacher, IDENTITY, temperature=temperature, rows=rows)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_the_same_in_parts_and_that_of_the_formula():
    shuffle = torch.Generator().manual_seed(1)
    now, teacher = torch.randn(2, 5, 4, generator=shuffle)
    weight = torch.randn(6, 4, generator=shuffle)
    gradients = []
    for rows in (0, 2):
        states, own = now.clone().requires_grad_(), weight.clone().requires_grad_()
        answer_kl(states, Head(own), teacher, Head(weight), temperature=0.5, rows=rows).backward()
        gradients.append((states.grad, own.grad))
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    p, q = ((states @ weight.T / 0.5).softmax(-1) for states in (teacher, now))
    torch.testing.assert_close(gradients[0][0], (q - p) / 0.5 @ weight / 5, rtol=1e-4, atol=1e-6)


def test_a_teacher_that_knows_one_token_moves_that_token_only():
    now = torch.randn(4, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    teacher = now.detach().clone()
    teacher[2, 3] += 5
    answer_kl(now, IDENTITY, teacher, IDENTITY).backward()
    moved = now.grad.abs().sum(dim=-1) > 1e-6
    assert moved.tolist() == [False, False, True, False] and now.grad[2, 3] < 0


@pytest.fixture
def training_batch(loaded):
    """Inputs of two records of different lengths, with labels, an image each, and padding."""
    tokenizer, model = loaded
    texts = [[1, IMAGE_TOKEN_INDEX, 20, 21, 30, 31, 2], [1, 22, IMAGE_TOKEN_INDEX, 40, 2, 0, 0]]
    labels = [[-100] * 4 + [30, 31, 2], [-100] * 3 + [40, 2, -100, -100]]
    size = model.get_vision_tower().config.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2]).bool()
    return {"input_ids": torch.tensor(texts), "attention_mask": mask, "labels": torch.tensor(labels), "images": images}


def test_the_states_predict_the_supervised_tokens(loaded, training_batch):
    """Their cross-entropy is the model's own loss, so no label is off by one."""
    _, model = loaded
    with answer_states(model) as found, torch.no_grad():
        outputs = model(**training_batch)
    (seen,) = found
    assert seen.labels.tolist() == [30, 31, 2, 40, 2] and seen.records.tolist() == [0, 0, 0, 1, 1]
    losses = torch.nn.functional.cross_entropy(head_of(model)(seen.states), seen.labels, reduction="none")
    assert losses.mean().item() == pytest.approx(outputs.loss.item(), rel=1e-5)
    by_record = record_losses(seen, head_of(model), 2, rows=2)
    torch.testing.assert_close(by_record, torch.stack([losses[:3].mean(), losses[3:].mean()]))
    assert math.isnan(record_losses(seen, head_of(model), 3)[2]), "a record without an answer has no loss"

    with answer_states(model, without_logits=True) as again, torch.no_grad():
        short = model(**training_batch)
    assert short.loss is None and short.logits.shape[:2] == (1, 1), "a teacher's pass makes no logits"
    assert torch.equal(again[0].states, seen.states) and torch.equal(again[0].labels, seen.labels)
    assert model(**training_batch).loss.item() == outputs.loss.item(), "nothing stays behind"


def test_the_model_itself_as_teacher_costs_nothing_and_turns_nothing(loaded, training_batch):
    model = copy.deepcopy(loaded[1])
    with answer_states(model, without_logits=True) as start, torch.no_grad():
        model(**training_batch)
    directions = []
    for weight in (0.0, 0.5):
        model.zero_grad()
        with answer_states(model) as found:
            cross_entropy = model(**training_batch).loss
        head = head_of(model)
        kl = answer_kl(found[0].states, head, start[0].states, Head(head.weight.detach()), rows=2)
        assert (cross_entropy + weight * kl).item() == cross_entropy.item(), "to the bit"
        (cross_entropy + weight * kl).backward()
        flat = torch.cat([p.grad.flatten() for p in model.get_model().layers.parameters()]).double()
        directions.append(flat / flat.norm())
    assert (directions[0] @ directions[1]).item() == pytest.approx(1, abs=1e-6)


def test_a_model_that_hides_its_output_layer_is_refused(loaded):
    with pytest.raises(UmedError, match="pretraining_tp"), answer_states(loaded[1]):
        pass


def test_no_answer_no_kl():
    none = torch.zeros(0, 4, requires_grad=True)
    kl = answer_kl(none, IDENTITY, none.detach(), IDENTITY)
    kl.backward()
    assert kl.item() == 0 and AnswerStates(none, none[:, 0], none[:, 0]).labels.numel() == 0
