"""The chat page's answers equal those of the evaluation, with and without cached features and KV caches."""

from __future__ import annotations

import base64
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.speaking import BOX01, SENTENCE, teach
from support.taught import write_lora

from umed_plugin.commands.serve import dialogue as module
from umed_plugin.commands.serve.dialogue import Dialogue
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.model.answerer import prompt_ids
from umed_plugin.model.attention import AttentionSettings, attention_on_lesion
from umed_plugin.model.forward import Candidates, embed_prompts
from umed_plugin.model.sampling import SamplingSettings, generate

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
QUESTIONS = ("What abnormality can be seen in this image?", "Where does it lie?", "Is it a nodule?")


def silent(text: str) -> None:
    """Ignore the text."""


@pytest.fixture(params=["tiny_mistral", "tiny_llama"])
def dialogue(request):
    return Dialogue(request.getfixturevalue(request.param), most_tokens=12)


def columns_of(dialogue, work):
    """The result of ``work``, and the number of prompt and answer columns that the model computes during it."""
    seen = []
    layer = dialogue.llava.get_model().layers[0].self_attn.q_proj
    handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[1]))
    try:
        return work(), sum(seen)
    finally:
        handle.remove()


def test_an_answer_is_the_evaluations(dialogue):
    heard = []
    answer = dialogue.answer("a", PICTURE, [], QUESTIONS[0], heard.append)
    ids = prompt_ids(QUESTIONS[0], dialogue.template, dialogue.tokenizer, dialogue.llava.config)
    assert answer.prompt_ids.tolist() == ids.tolist()
    prompts = embed_prompts(dialogue.model, [ids], answer.features)
    expected = generate(
        dialogue.model,
        prompts,
        SamplingSettings(max_new_tokens=12, temperature=0, eos_token_id=dialogue.tokenizer.eos_token_id),
    )
    assert answer.token_ids == expected.answers()[0]
    assert len(heard) == 12 and heard[-1] == answer.text and answer.cut == 12


def test_further_questions_cost_their_own_tokens_and_are_answered_the_same(dialogue):
    turns, patches = [], 0
    for number, question in enumerate(QUESTIONS):
        answer, columns = columns_of(
            dialogue,
            lambda turns=tuple(turns), question=question: dialogue.answer("a", PICTURE, turns, question, silent),
        )
        patches = answer.features.shape[1]
        length = len(answer.prompt_ids) - 1 + patches
        assert columns <= (length if number == 0 else length - patches) + len(answer.token_ids)
        fresh = Dialogue.__new__(Dialogue)
        fresh.__dict__.update(
            {**dialogue.__dict__, "_held": type(dialogue._held)(), "_features": type(dialogue._held)()}
        )
        alone = fresh.answer("b", PICTURE, turns, question, silent)
        assert alone.token_ids == answer.token_ids and alone.prompt_ids.tolist() == answer.prompt_ids.tolist()
        turns.append((question, answer.text))
    assert len(turns) == 3


def test_another_question_without_the_turns_before_goes_back_to_the_picture(dialogue):
    first = dialogue.answer("a", PICTURE, [], QUESTIONS[0], silent)
    dialogue.answer("a", PICTURE, [(QUESTIONS[0], first.text)], QUESTIONS[1], silent)
    again, columns = columns_of(dialogue, lambda: dialogue.answer("a", PICTURE, [], QUESTIONS[0], silent))
    assert again.token_ids == first.token_ids
    assert columns < first.features.shape[1]


def test_an_answer_that_was_stopped_leaves_nothing_behind(dialogue):
    expected = dialogue.answer("a", PICTURE, [], QUESTIONS[0], silent).token_ids

    heard = []

    def stop(text: str) -> None:
        heard.append(text)
        if len(heard) == 3:
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        dialogue.answer("a", PICTURE, [], QUESTIONS[2], stop)
    assert dialogue.answer("a", PICTURE, [], QUESTIONS[0], silent).token_ids == expected


def test_pictures_and_conversations_that_are_kept_are_bounded(tiny_mistral, monkeypatch):
    monkeypatch.setattr(module, "MOST_PICTURES", 3)
    asked = Dialogue(tiny_mistral, most_tokens=2)
    for key in range(5):
        asked.answer(key, PICTURE, [], QUESTIONS[0], silent)
    assert list(asked._features) == [2, 3, 4]
    assert list(asked._held) == [3, 4] and module.MOST_CONVERSATIONS == 2


def test_what_is_forgotten_is_not_kept(tiny_mistral):
    asked = Dialogue(tiny_mistral, most_tokens=2)
    for key in ("mine", "other"):
        asked.answer(key, PICTURE, [], QUESTIONS[0], silent)
    asked.forget(lambda key: key == "mine")
    assert list(asked._features) == list(asked._held) == ["other"]
    asked.answer("mine", PICTURE, [], QUESTIONS[0], silent)


def test_a_lora_folder_over_its_base_is_asked_with_its_adapter(tiny_mistral, tmp_path):
    lora = write_lora(tiny_mistral, tmp_path / "tiny-llava-mistral-lora")
    adapted, plain = Dialogue(lora, tiny_mistral, most_tokens=8), Dialogue(tiny_mistral, most_tokens=8)
    answers = [asked.answer("a", PICTURE, [], QUESTIONS[0], silent) for asked in (adapted, plain)]
    assert answers[0].token_ids != answers[1].token_ids
    prompts = embed_prompts(adapted.model, [answers[0].prompt_ids], answers[0].features)
    expected = generate(adapted.model, prompts, SamplingSettings(max_new_tokens=8, temperature=0, eos_token_id=-1))
    assert answers[0].token_ids == expected.answers()[0]
    assert adapted.attention(answers[0])["grid"] == 8


def test_an_answer_ends_at_its_templates_separator(tiny_mistral, tmp_path):
    """LLaVA's MPT template ends a turn with text; what follows is the model's own next question."""
    taught = teach(tiny_mistral, tmp_path, "A cyst.<|im_end|>Where", template="mpt")
    asked = Dialogue(taught, template="mpt", most_tokens=60)
    answer = asked.answer("a", PICTURE, [], "What is it?", silent)
    assert answer.text == "A cyst." and "Where" not in asked._shown(answer.token_ids)


def test_what_does_not_fit_is_left_out_from_the_beginning_and_told(tiny_mistral):
    asked = Dialogue(tiny_mistral, most_tokens=8)
    turns = [("word " * 100, "word " * 100)] * 4
    answer = asked.answer("a", PICTURE, turns, QUESTIONS[0], silent)
    assert 0 < answer.forgotten < 4
    assert len(answer.prompt_ids) - 1 + answer.features.shape[1] + 8 <= asked.llava.config.max_position_embeddings
    with pytest.raises(UmedError, match=r"too long: \d+ tokens\. This model has room for \d+\. Shorten it"):
        asked.answer("a", PICTURE, [], "word " * 2000, silent)


def test_a_question_with_an_image_token_has_one_picture(dialogue):
    answer = dialogue.answer("a", PICTURE, [("<image>?", "<image>!")], "<image>\nWhat?", silent)
    assert int((answer.prompt_ids == -200).sum()) == 1


def test_boxes_are_in_pixels_of_the_picture_and_words_have_maps(speaking):
    asked = Dialogue(speaking, most_tokens=60)
    answer = asked.answer("a", PICTURE, [], QUESTIONS[0], silent)
    assert answer.text == SENTENCE
    # 60 x 40 is padded to 60 x 60, with 10 rows above and below; the box reaches into those below.
    x1, y1, x2, y2 = (60 * value for value in BOX01)
    assert answer.boxes == [pytest.approx((x1, y1 - 10, x2, 40))] and y2 - 10 > 40
    assert answer.cut is None

    attended = asked.attention(answer)
    words = attended["words"]
    assert [word["text"] for word in words if word["is_name"]] == ["nodule"] and words[0]["is_name"]
    assert [word["text"] for word in words[1:]] == ["The", "finding", "is", "a", "at"]
    assert attended["grid"] == 8 and attended["place"] == pytest.approx((0, -10, 60, 50))
    values = np.frombuffer(base64.b64decode(words[0]["map"]), np.uint8)
    assert len(values) == 64 and values.max() == 255

    # The map's share on a lesion equals the attention that the reward scores.
    geometry = ImageGeometry(60, 40, "pad", 64, 8)
    cover = torch.from_numpy(geometry.patch_cover([(0, 0, 30, 40)]))
    token = asked.tokenizer.convert_ids_to_tokens(answer.token_ids).index("\u2581nodule")
    tokens = torch.tensor([answer.token_ids])
    prompts = embed_prompts(asked.model, [answer.prompt_ids], answer.features)
    layers = range(asked.llava.config.num_hidden_layers)
    share, _ = attention_on_lesion(
        asked.model,
        prompts,
        Candidates(tokens, torch.ones_like(tokens)),
        [[token]],
        cover[None],
        AttentionSettings(layers),
    )
    assert (values / values.sum() * cover.numpy()).sum() == pytest.approx(float(share), abs=0.01)


def test_a_malformed_box_has_no_place(tiny_mistral, tmp_path):
    taught = teach(tiny_mistral, tmp_path, "It is located at (687,430;125 951).")
    assert Dialogue(taught, most_tokens=60).answer("a", PICTURE, [], QUESTIONS[0], silent).boxes == [None]


def test_what_cannot_be_shown_is_refused_at_the_start(tiny_mistral, tmp_path):
    with pytest.raises(UsageError, match="umed_mistral"):
        Dialogue(tiny_mistral, template="umed_mistrl")
    config = json.loads((tiny_mistral / "config.json").read_text())
    tiles = shutil.copytree(tiny_mistral, tmp_path / "tiles")
    (tiles / "config.json").write_text(json.dumps({**config, "image_aspect_ratio": "anyres"}))
    with pytest.raises(UmedError, match="anyres"):
        Dialogue(tiles)
    with pytest.raises(UmedError, match="no such folder"):
        Dialogue(tmp_path / "none")
