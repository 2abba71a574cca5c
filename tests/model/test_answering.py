"""Questions that share an image are answered as if asked one by one; a run that is killed goes on and ends the same."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.kept_answers import KeptAnswers
from umed_plugin.model.answerer import Answerer, AnswererSettings, ImageQuestion, ModelImages
from umed_plugin.model.forward import AnswerPass, Candidates, answer_log_probs, answer_pass, embed_prompts
from umed_plugin.model.shared_prefix import split_at_image

QUESTIONS = (
    "Is this normal?",
    "What is it and where does it lie in the image, if it lies anywhere at all?",
    "CT?",
    "Describe the lesion.",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return [str(folder / f"{index}.png") for index in range(3)]


@pytest.fixture(scope="module", params=["tiny_mistral", "tiny_llama"])
def answerer(request):
    """Its random attention is made sharp: answers then hang on the question and on the image, as a trained model's do."""
    made = Answerer(request.getfixturevalue(request.param), AnswererSettings(device="cpu", max_new_tokens=12))
    with torch.no_grad():
        for layer in made.llava.get_model().layers:
            layer.self_attn.q_proj.weight *= 12
            layer.self_attn.v_proj.weight *= 6
            layer.self_attn.o_proj.weight *= 6
    return made


def asks(images):
    """Nine questions about three images, not in the images' order, of different length."""
    pairs = [(image, text) for text in QUESTIONS for image in images]
    return [ImageQuestion(image, text) for image, text in pairs[:9]]


def test_answers_that_share_a_prefix_are_those_of_questions_asked_alone(answerer, images):
    together = answerer.answer(asks(images))
    alone = [answerer.answer([one])[0] for one in asks(images)]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({answer.text for answer in together}) >= 7, "the answers depend on the image and on the question"


def test_they_are_those_that_stock_llava_generates(answerer, images):
    """LLaVA's own `generate`, one question at a time, without any cache of ours."""
    from umed_plugin.model.answerer import prompt_ids

    model, tokenizer = answerer.model, answerer.tokenizer
    for ask, found in list(zip(asks(images), answerer.answer(asks(images))))[::4]:
        ids = prompt_ids(ask.text, answerer.template, tokenizer, model.config)[None]
        pixels = answerer.images.pixels([ask.image], [None])
        with torch.inference_mode():
            stock = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=12, use_cache=True)
        assert tokenizer.batch_decode(stock, skip_special_tokens=True)[0].strip() == found.text


def test_likelihoods_of_options_are_those_of_a_plain_pass(answerer, images):
    """Several options of several questions in one batch, in the template and bare, against one pass for each."""
    wanted = [
        ImageQuestion(images[0], QUESTIONS[0], options=("yes", "no", "there is a nodule at the left")),
        ImageQuestion(images[1], None, options=("CT", "MRI"), options_after="Question: What is it? The answer is"),
        ImageQuestion(images[0], QUESTIONS[1], options=("a cyst",)),
    ]
    for ask, answer in zip(wanted, answerer.answer(wanted)):
        assert (answer.text == "") == (ask.text is None)
        assert len(answer.losses) == len(ask.options)
        for option, loss in zip(ask.options, answer.losses):
            one = answerer._continuation(0, ask, option)
            prompts = embed_prompts(answerer.model, [one.prompt_ids], answerer.features([ask.image], [None]))
            ids = one.full_ids[-one.text_tokens :][None]
            candidates = Candidates(ids, torch.ones_like(ids))
            with torch.no_grad():
                passed: AnswerPass = answer_pass(answerer.model, prompts, candidates)
            expected = -answer_log_probs(passed.logits, candidates).log_probs.mean()
            assert loss == pytest.approx(float(expected), abs=1e-4)
            assert answerer.tokenizer.decode(one.full_ids[-one.text_tokens :]).strip().endswith(f"{option}.")


def test_an_image_and_its_prefix_are_computed_once(answerer, images, monkeypatch):
    from umed_plugin.model import forward, shared_prefix

    seen, prefilled = [], []
    encode, prefill = forward.encode_images, shared_prefix.prefill
    monkeypatch.setattr(
        forward, "encode_images", lambda model, pixels: seen.append(len(pixels)) or encode(model, pixels)
    )
    monkeypatch.setattr(
        shared_prefix,
        "prefill",
        lambda model, prompts, cache: prefilled.append(len(prompts.mask)) or prefill(model, prompts, cache),
    )
    answerer.answer(asks(images))
    assert seen == [3] and prefilled == [3], "nine questions about three images"


@pytest.mark.parametrize("question", [{"text": "CT?"}, {"text": "CT?", "write": False, "options": ("yes", "no")}])
def test_a_checkpoint_that_computes_no_numbers_is_named(question, tiny_mistral, images):
    broken = Answerer(tiny_mistral, AnswererSettings(device="cpu", max_new_tokens=2))
    broken.llava.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(UmedError, match=f"{tiny_mistral}: .* NaN.*umed doctor"):
        broken.answer([ImageQuestion(images[0], **question)])


@pytest.mark.parametrize("edge", [64, 73])
def test_an_image_processor_that_moves_boxes_is_said(edge, tmp_path, capsys):
    processor = CLIPImageProcessor(size={"shortest_edge": edge}, crop_size={"height": 64, "width": 64})
    ModelImages(tmp_path, processor, SimpleNamespace(image_aspect_ratio="pad"), None, 0)
    assert ("boxes are off" in capsys.readouterr().err) == (edge == 73)


def test_an_image_processor_without_a_size_is_refused_where_it_prepares_no_image(tmp_path):
    """transformers 5 keeps null; older ones have a default."""
    processor = CLIPImageProcessor(size=None, crop_size={"height": 224, "width": 224})
    keeps_null = processor.to_dict()["size"] is None
    expected = pytest.raises(UmedError, match="can prepare no image: size is null. Give size and crop_size")
    with expected if keeps_null else nullcontext():
        ModelImages(tmp_path, processor, SimpleNamespace(image_aspect_ratio="pad"), None, 0)


def test_prompts_without_one_image_or_a_question_are_refused():
    with pytest.raises(UmedError, match="0 image tokens"):
        split_at_image([torch.tensor([1, 2, 3])])
    with pytest.raises(UmedError, match="a question after it"):
        split_at_image([torch.tensor([1, -200])])
    with pytest.raises(UmedError, match="differs from the first one before the image"):
        split_at_image([torch.tensor([1, -200, 3]), torch.tensor([2, -200, 3])])


def test_kept_answers_survive_a_torn_line_and_refuse_other_settings(tmp_path):
    kept = KeptAnswers(tmp_path, "p.jsonl", {"model": "a"})
    kept.add([{"id": "1", "answer": "x"}, {"id": "2", "answer": "Größe"}])
    with (tmp_path / "p.jsonl").open("ab") as stream:
        stream.write(b'{"id": "3", "ans')
    again = KeptAnswers(tmp_path, "p.jsonl", {"model": "a"})
    assert list(again.lines) == ["1", "2"] and again.lines["2"]["answer"] == "Größe"
    again.keep_only(["2"])
    again.add([{"id": "4"}])
    assert [json.loads(line)["id"] for line in (tmp_path / "p.jsonl").read_text().splitlines()] == ["2", "4"]
    with pytest.raises(UmedError, match="model: 'a' there, 'b' now"):
        KeptAnswers(tmp_path, "p.jsonl", {"model": "b"})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UmedError, match=r"no settings.json that says under which settings"):
        KeptAnswers(tmp_path, "p.jsonl", {"model": "a"})
    (tmp_path / "p.jsonl").unlink()
    KeptAnswers(tmp_path, "p.jsonl", {"model": "a"})
    (tmp_path / "p.jsonl").write_text('{"id": 1}\nnot json\n')
    with pytest.raises(UmedError, match="line 2 is not JSON"):
        KeptAnswers(tmp_path, "p.jsonl", {"model": "a"})
