"""What stands around the weights of a converted checkpoint: chat template, pixels, a model trained in between, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.conversion import (
    QUESTION,
    add_tokens,
    check_both_ways,
    config_of,
    linear_projector,
    llava_logits,
    loaded_by_transformers,
    picture,
    transformers_logits,
    variant,
)
from support.taught import write_lora

from umed_plugin.checkpoints.chat_template import jinja_template
from umed_plugin.checkpoints.loading import load_checkpoint
from umed_plugin.checkpoints.prompt_templates import conversation_template, warn_of_other_family
from umed_plugin.checkpoints.to_llava import to_llava
from umed_plugin.checkpoints.to_transformers import to_transformers
from umed_plugin.cli import main
from umed_plugin.commands.doctor.examination import examine
from umed_plugin.commands.serve.dialogue import Dialogue
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.model.answerer import Answerer, AnswererSettings

TURNS = ("<image>\nWhat is it?", "A nodule at [0.1, 0.2].", "Is there more?")


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize(
    "template",
    [
        "mistral_instruct",
        "umed_mistral",
        "llava_v1",
        "umed_v1",
        "vicuna_v1",
        "llava_llama_2",
        "llava_v0",
        "chatml_direct",
    ],
)
@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_chat_templates_give_llavas_ids(family, template, system, tiny_mistral, tiny_llama, tmp_path):
    """Over several turns, for a legacy tokenizer (mistral) and one that is not (llama)."""
    from llava.mm_utils import tokenizer_image_token
    from transformers import AutoTokenizer

    checkpoint = {"mistral": tiny_mistral, "llama": tiny_llama}[family]
    conversation = conversation_template(template)
    conversation.system = conversation.system if system is None else system
    for role, text in zip(conversation.roles * 2, [*TURNS, None]):
        conversation.append_message(role, text)
    wanted = tokenizer_image_token(conversation.get_prompt(), AutoTokenizer.from_pretrained(checkpoint, use_fast=False))
    tokenizer = AutoTokenizer.from_pretrained(to_transformers(checkpoint, tmp_path / "hf", template=template))
    chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), TURNS)]
    chat = [*([{"role": "system", "content": system}] if system else []), *chat]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    found = tokenizer(prompt, add_special_tokens=False).input_ids
    assert [-200 if index == 727 else index for index in found] == wanted
    parts = [{"type": "image"}, {"type": "text", "text": TURNS[0].replace("<image>\n", "")}]
    in_parts = [{**turn, "content": parts} if turn["content"] == TURNS[0] else turn for turn in chat]
    assert tokenizer.apply_chat_template(in_parts, tokenize=False, add_generation_prompt=True) == prompt


def test_what_is_no_conversation_has_no_chat_template():
    with pytest.raises(UmedError, match="plain: is not a conversation"):
        jinja_template("plain", gap="", image="<image>")
    with pytest.raises(UsageError, match="umed_mistral"):
        jinja_template("umed_mistrl", gap="", image="<image>")


@pytest.mark.parametrize("mode", ["square", "pad"])
def test_pixels_and_greedy_answers_are_llavas(mode, tiny_mistral, tmp_path):
    from llava.mm_utils import process_images, tokenizer_image_token

    checkpoint = variant(tiny_mistral, tmp_path / "llava-mistral", {"image_aspect_ratio": mode}, dict)
    model, processor = loaded_by_transformers(to_transformers(checkpoint, tmp_path / "hf"))
    if mode == "pad" and not type(processor.image_processor).__name__.startswith("LlavaImageProcessor"):
        pytest.skip("this transformers has no image processor that pads to a square (docs/convert.md)")
    tokenizer, llava, image_processor = load_checkpoint(checkpoint, device="cpu")
    pixels = process_images([picture()], image_processor, llava.config)
    chat = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
    prompt = processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=prompt.removeprefix("<s>"), images=picture(), return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], pixels, atol=1e-6, rtol=0)
    ids = tokenizer_image_token(prompt.removeprefix("<s>"), tokenizer)
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        for token in answer:
            wanted = int(llava(input_ids=torch.tensor([ids]), images=pixels).logits[0, -1].argmax())
            assert token == wanted
            ids.append(wanted)
    back = to_llava(tmp_path / "hf", tmp_path / "llava-back")
    assert config_of(back)["image_aspect_ratio"] == mode


def trained_in_transformers_form(there: Path, out: Path):
    """Change some of every part's weights and save as transformers' Trainer does; returns the model."""
    model, processor = loaded_by_transformers(there)
    shuffle = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=shuffle)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return model, processor


def test_a_model_that_was_trained_in_between_goes_back(tiny_llama, tmp_path):
    there = to_transformers(tiny_llama, tmp_path / "hf")
    model, processor = trained_in_transformers_form(there, tmp_path / "trained")
    if not (tmp_path / "trained" / "tokenizer.model").is_file():
        with pytest.raises(UmedError, match=r"has no tokenizer\.model"):
            to_llava(tmp_path / "trained", tmp_path / "llava-none")
        shutil.copy2(there / "tokenizer.model", tmp_path / "trained")
    back = to_llava(tmp_path / "trained", tmp_path / "llava-back")
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found_ids, found = llava_logits(back, pixels, "llava_v1")
    ids, wanted = transformers_logits(model, processor, pixels)
    assert found_ids == ids
    torch.testing.assert_close(found, wanted[:, :-1], atol=1e-5, rtol=0)
    assert config_of(back)["tokenizer_model_max_length"] == config_of(tiny_llama)["tokenizer_model_max_length"]
    assert config_of(back).get("rope_theta", 10000.0) == 10000.0


def test_tensors_by_the_names_of_transformers_5_go_back(tiny_mistral, tmp_path):
    """Some programs save what is in memory, under the names that it has there."""
    there = to_transformers(tiny_mistral, tmp_path / "hf")
    plain = to_llava(there, tmp_path / "llava-plain")
    names = (
        ("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."),
        ("vision_tower.vision_model.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector."),
    )  # fmt: skip

    def renamed(name: str) -> str:
        return next(new + name[len(old) :] for old, new in names if name.startswith(old))

    tensors = {renamed(name): tensor for name, tensor in load_file(there / "model.safetensors").items()}
    save_file(tensors, there / "model.safetensors", metadata={"format": "pt"})
    back = to_llava(there, tmp_path / "llava-back")
    for file in ("model.safetensors", "vision_tower/model.safetensors"):
        ours, theirs = load_file(back / file), load_file(plain / file)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("behind", ["<pad>", "<own>"])
def test_a_folder_that_this_plugin_has_not_written(behind, tiny_llama, tmp_path):
    """As llava-hf's: without our key, and with a token behind <image>; only a padding token is taken out with it."""
    there = to_transformers(tiny_llama, tmp_path / "hf")
    config = config_of(there)
    config.pop("llava_checkpoint")
    config["text_config"]["vocab_size"] = 729
    (there / "config.json").write_text(json.dumps(config))
    add_tokens(there, "<image>", behind)
    file = there / "tokenizer_config.json"
    tokens = json.loads(file.read_text())
    file.write_text(json.dumps({**tokens, "pad_token": "<pad>" if behind == "<pad>" else "<unk>"}))
    tensors = load_file(there / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][-1:]])
    save_file(tensors, there / "model.safetensors", metadata={"format": "pt"})
    back = to_llava(there, tmp_path / "llava-back")
    assert config_of(back)["vocab_size"] == (727 if behind == "<pad>" else 729)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    wanted, found = (llava_logits(folder, pixels, "llava_v1") for folder in (tiny_llama, back))
    assert found[0] == wanted[0]
    torch.testing.assert_close(found[1][:, :727], wanted[1], atol=1e-5, rtol=0)


REFUSED = {
    "anyres": ({"image_aspect_ratio": "anyres"}, r"config\.json.*image_aspect_ratio is 'anyres'; allowed: pad, square"),
    "projector": (
        {"mm_projector_type": "mlp3x_gelu"},
        "mm_projector_type is 'mlp3x_gelu'; allowed: mlp2x_gelu, linear",
    ),
    "unpad": ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
    "moved tower": ({"mm_vision_tower": "/no/such/tower"}, "mm_vision_tower is '/no/such/tower'"),
    "no tower": ({"mm_vision_tower": None}, "mm_vision_tower is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_class_cannot_express_is_refused(name, tiny_mistral, tmp_path):
    changes, message = REFUSED[name]
    checkpoint = variant(tiny_mistral, tmp_path / "llava-mistral", changes, dict)
    with pytest.raises(UmedError, match=message):
        to_transformers(checkpoint, tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))


def test_a_tensor_without_a_place_is_refused(tiny_mistral, tmp_path):
    newline = {"model.image_newline": torch.zeros(128)}
    checkpoint = variant(tiny_mistral, tmp_path / "llava-mistral", {}, lambda tensors: {**tensors, **newline})
    with pytest.raises(UmedError, match=r"contains 'model\.image_newline'"):
        to_transformers(checkpoint, tmp_path / "hf")


def test_a_lora_folder_and_a_folder_with_something_in_it_are_refused(tiny_mistral, tmp_path):
    with pytest.raises(UmedError, match="umed merge"):
        to_transformers(write_lora(tiny_mistral, tmp_path / "llava-lora"), tmp_path / "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(UmedError, match="left as it is"):
        to_transformers(tiny_mistral, tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_what_llavas_classes_cannot_express_is_refused(tiny_mistral, tmp_path):
    there = to_transformers(tiny_mistral, tmp_path / "hf")
    config = config_of(there)
    config["text_config"]["model_type"] = "qwen2"
    (there / "config.json").write_text(json.dumps({**config, "vision_feature_layer": [-2, -5]}))
    with pytest.raises(
        UmedError, match=r"text_config\.model_type is 'qwen2'; allowed: mistral, llama; vision_feature_layer"
    ):
        to_llava(there, tmp_path / "llava-back")


@pytest.mark.parametrize("lacks", ["the file", "its ends"])
def test_where_answers_end_is_written_in_both_directions(lacks, tiny_llama, tmp_path):
    """Without generation_config.json, LLaVA takes the tokens from config.json, and the class of that has defaults."""
    checkpoint = variant(tiny_llama, tmp_path / "llava-v1", {"eos_token_id": 7}, dict)
    (checkpoint / "generation_config.json").unlink()
    if lacks == "its ends":
        (checkpoint / "generation_config.json").write_text('{"eos_token_id": null, "max_length": 99}')
    there = to_transformers(checkpoint, tmp_path / "hf")
    generation = json.loads((there / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 7)
    (there / "generation_config.json").unlink()
    config = config_of(there)
    del config["text_config"]["eos_token_id"]
    (there / "config.json").write_text(json.dumps(config))
    back = to_llava(there, tmp_path / "llava-v1-back")
    generation = json.loads((back / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_short_text_config_is_completed(family, request, tmp_path):
    """As under llava-hf: values that equal those of the class are absent."""
    checkpoint = request.getfixturevalue(f"tiny_{family}")
    there = to_transformers(checkpoint, tmp_path / "hf")
    config = config_of(there)
    for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps"):
        config["text_config"].pop(key, None)
    (there / "config.json").write_text(json.dumps(config))
    new = config_of(to_llava(there, tmp_path / f"llava-{family}-back"))
    values = {"llama": (11008, 32, 32, 1e-6), "mistral": (14336, 32, 8, 1e-6)}
    keys = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    assert tuple(new[key] for key in keys) == values[family]
    assert new["hidden_size"] == config_of(checkpoint)["hidden_size"]


SCALED = {
    "old": {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "renamed": {"rope_theta": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 2}},
    "both names": {"rope_theta": 300.0, "rope_scaling": {"factor": 2.0, "rope_type": "linear", "type": "linear"}},
    "transformers 5": {
        "rope_parameters": {"rope_theta": 300.0, "rope_type": "linear", "factor": 2.0, "type": "linear"}
    },
}


@pytest.mark.parametrize("form", SCALED)
def test_scaled_positions_come_back_in_the_form_that_llavas_pins_read(form, tiny_llama, tmp_path):
    there, back = to_transformers(tiny_llama, tmp_path / "hf"), tmp_path / "llava-v1-back"
    config = config_of(there)
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        config["text_config"].pop(key, None)
    config["text_config"].update(SCALED[form])
    (there / "config.json").write_text(json.dumps(config))
    new = config_of(to_llava(there, back))
    assert (new["rope_theta"], new["rope_scaling"]) == (300.0, {"type": "linear", "factor": 2.0})
    assert '"factor": 2.0' in (back / "config.json").read_text()
    assert "rope-scaling" not in {found.code for found in examine(back)}
    again = config_of(to_transformers(back, tmp_path / "again"))["text_config"]
    assert (again["rope_theta"], again["rope_scaling"]) == (300.0, {"type": "linear", "factor": 2.0})


def test_positions_that_llava_cannot_scale_are_refused(tiny_llama, tmp_path):
    there = to_transformers(tiny_llama, tmp_path / "hf")
    config = config_of(there)
    config["text_config"]["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    (there / "config.json").write_text(json.dumps(config))
    with pytest.raises(UmedError, match=r"rope_scaling is 'llama3'; allowed: default, linear, dynamic"):
        to_llava(there, tmp_path / "llava-v1-back")


def test_a_tower_of_a_whole_clip(tiny_mistral, tmp_path):
    """As openai/clip-vit-large-patch14-336, whose folder holds the text part too."""
    from transformers import CLIPModel

    tower = tiny_mistral / "vision_tower"
    vision = {key: value for key, value in config_of(tower).items() if key not in ("architectures", "model_type")}
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    whole = CLIPModel.config_class(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(whole).half().save_pretrained(tmp_path / "clip")
    shutil.copy2(tower / "preprocessor_config.json", tmp_path / "clip")
    changed = variant(tiny_mistral, tmp_path / "llava-mistral", {"mm_vision_tower": str(tmp_path / "clip")}, dict)
    check_both_ways(changed, "mistral_instruct", tmp_path)


def test_a_linear_projector_is_told_of(tiny_mistral, tmp_path, capsys):
    checkpoint = variant(tiny_mistral, tmp_path / "llava-mistral", {"mm_projector_type": "linear"}, linear_projector)
    assert main(["convert", str(checkpoint), "--out", str(tmp_path / "hf")]) == 0
    assert "umed: the projector is linear" in capsys.readouterr().out


def test_a_template_for_the_way_back_is_wrong_usage(tiny_mistral, tmp_path, capsys):
    assert main(["convert", str(tiny_mistral), "--out", str(tmp_path / "hf"), "--template", "umed_mistral"]) == 0
    printed = capsys.readouterr().out
    assert "chat template: umed_mistral" in printed
    assert "note:" not in printed
    command = ["convert", str(tmp_path / "hf"), "--out", str(tmp_path / "back")]
    assert main([*command, "--template", "umed_mistral"]) == 2
    assert main(command) == 0
    assert "umed: stock LLaVA chooses its loader by the folder's name" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("template", "model_type", "fits"),
    [
        ("umed_v1", "llava_mistral", False),
        ("llava_v1", "llava_mistral", False),
        ("mistral_instruct", "llava_llama", False),
        ("umed_mistral", "llava_mistral", True),
        ("vicuna_v1", "llava", True),
        (None, "llava_mistral", True),
    ],
)
def test_a_template_of_another_family_is_warned_of(template, model_type, fits, capsys):
    warn_of_other_family(template, model_type)
    said = capsys.readouterr().err
    assert (said == "") if fits else f"--template {template}: is not of the family" in said


@pytest.mark.parametrize("ask", ["convert", "answer", "serve"])
def test_whoever_asks_under_another_family_is_told(ask, tiny_mistral, tmp_path, capsys):
    if ask == "convert":
        assert main(f"convert {tiny_mistral} --template umed_v1 --out {tmp_path}/hf".split()) == 0
    elif ask == "answer":
        Answerer(tiny_mistral, AnswererSettings(template="umed_v1", device="cpu"))
    else:
        Dialogue(str(tiny_mistral), template="umed_v1")
    assert "--template umed_v1: is not of the family" in " ".join(capsys.readouterr().err.split())


def test_the_conversion_says_what_the_doctor_calls_an_error(tiny_mistral, tmp_path, capsys):
    """A padding token outside of the vocabulary, which LLaVA cannot load: the result is written, and the status says so."""
    there = to_transformers(tiny_mistral, tmp_path / "hf")
    config = json.loads((there / "config.json").read_text())
    assert main(f"convert {there} --out {tmp_path}/llava-mistral-good".split()) == 0, capsys.readouterr().err
    config["text_config"]["pad_token_id"] = 10**6
    (there / "config.json").write_text(json.dumps(config))
    assert main(f"convert {there} --out {tmp_path}/llava-mistral-out".split()) == 1
    assert "padding-token" in capsys.readouterr().err
