"""Merging what other trainings write: added tokens, tied embeddings, a plain language model as base, a projector alone."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.taught import write_lora

from umed_plugin.checkpoints.exporting import export
from umed_plugin.checkpoints.folder import read_tensors, weight_files
from umed_plugin.checkpoints.loading import load_checkpoint
from umed_plugin.checkpoints.merging import merge
from umed_plugin.checkpoints.stored import StoredTensor
from umed_plugin.checkpoints.to_llava import to_llava
from umed_plugin.checkpoints.to_transformers import to_transformers
from umed_plugin.cli import main
from umed_plugin.commands.doctor.examination import examine, examine_files
from umed_plugin.errors import UmedError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edit(folder: Path, **values: object) -> None:
    content = {**json.loads((folder / "config.json").read_text()), **values}
    (folder / "config.json").write_text(json.dumps(content))


def errors_of(folder: Path) -> set[str]:
    return {f.code for f in examine(folder) if f.severity == "error"}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in read_tensors(file).items()}


def with_two_tokens(checkpoint: Path, folder: Path) -> Path:
    """What full fine-tuning with ``--mm_use_im_start_end True`` saves."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        tensors[name] = torch.cat([tensors[name], tensors[name].mean(0, keepdim=True).repeat(2, 1)]).float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, vocab_size=len(tensors[EMBEDDING]), mm_use_im_start_end=True)
    tokenizer, *_ = load_checkpoint(checkpoint, device="cpu")
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def test_full_training_with_added_tokens_is_exported_with_them(tiny_mistral, tmp_path, capsys):
    trained = with_two_tokens(tiny_mistral, tmp_path / "trained")
    out = tmp_path / "llava-mistral-out"
    assert main(f"merge {trained} --base {tiny_mistral} --out {out}".split()) == 0, capsys.readouterr().err
    rows = len(load_file(tiny_mistral / "model.safetensors")[EMBEDDING])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows + 2
    assert len(tensors_of(out)[EMBEDDING]) == len(tensors_of(out)[HEAD]) == rows + 2
    assert tensors_of(out)[HEAD].dtype == torch.float16
    assert errors_of(out) == set()
    tokenizer, model, _ = load_checkpoint(out, device="cpu")
    assert tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]) == [rows, rows + 1]
    assert model.get_input_embeddings().num_embeddings == rows + 2


def test_rows_without_their_tokenizer_and_other_shapes_are_refused(tiny_mistral, tmp_path):
    trained, out = with_two_tokens(tiny_mistral, tmp_path / "trained"), tmp_path / "llava-mistral-out"
    for file in {*trained.glob("*token*"), *trained.glob("special*")}:
        file.unlink()
    with pytest.raises(UmedError, match="rows for added tokens, but it has no tokenizer"):
        export(trained, out, like=tiny_mistral)
    for name, said in (
        ("model.mm_projector.0.bias", r"mm_projector\.0\.bias has shape \(3,\)"),
        ("model.image_newline", "trained 'model.image_newline'"),
    ):
        tensors = {**load_file(trained / "model.safetensors"), name: torch.zeros(3)}
        save_file(tensors, trained / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UmedError, match=said):
            export(trained, out, like=tiny_mistral)
    assert not out.exists()


def test_lora_with_added_tokens_is_refused(tiny_mistral, tmp_path, capsys):
    lora = write_lora(tiny_mistral, tmp_path / "llava-lora")
    for flag in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        edit(lora, **{"mm_use_im_start_end": False, "mm_use_im_patch_token": False, flag: True})
        assert main(f"merge {lora} --base {tiny_mistral} --out {tmp_path}/llava-mistral-out".split()) == 1
        assert f"--{flag} True, which added tokens" in capsys.readouterr().err
    assert not (tmp_path / "llava-mistral-out").exists()


def test_tied_embeddings_are_exported(tiny_mistral, tmp_path):
    """transformers saves one of two tied tensors."""
    trained = shutil.copytree(tiny_mistral, tmp_path / "trained")
    tensors = load_file(trained / "model.safetensors")
    tensors[EMBEDDING] = tensors[EMBEDDING].float() + 1
    del tensors[HEAD]
    save_file(tensors, trained / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UmedError, match=r"lacks 'lm_head\.weight'"):
        export(trained, tmp_path / "llava-mistral-not", like=tiny_mistral)
    edit(trained, tie_word_embeddings=True)
    out = export(trained, tmp_path / "llava-mistral-out", like=tiny_mistral)
    assert torch.equal(tensors_of(out)[HEAD], tensors[EMBEDDING].half())
    assert torch.equal(tensors_of(out)[EMBEDDING], tensors[EMBEDDING].half())


def plain_language_model(checkpoint: Path, folder: Path, sharded: bool) -> Path:
    """The language model inside a checkpoint, as Vicuna and Mistral are published."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("vision_tower", "model.safetensors"))
    tensors = {n: t for n, t in load_file(checkpoint / "model.safetensors").items() if "mm_projector" not in n}
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if "mm_" not in key and key != "image_aspect_ratio"}
    kind = config["model_type"].removeprefix("llava_")
    kept.update(model_type=kind, architectures=[f"{kind.title()}ForCausalLM"])
    (folder / "config.json").write_text(json.dumps(kept))
    if not sharded:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        places.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_lora_over_a_plain_language_model(family, sharded, request, tmp_path, capsys):
    """As LLaVA publishes its own: the projector is in the LoRA folder alone."""
    checkpoint = request.getfixturevalue(f"tiny_{family}")
    lora = write_lora(checkpoint, tmp_path / "llava-lora")
    vicuna = plain_language_model(checkpoint, tmp_path / "vicuna", sharded)
    out = tmp_path / ("llava-mistral-out" if family == "mistral" else "llava-out")
    assert main(f"merge {lora} --base {vicuna} --out {out}".split()) == 0, capsys.readouterr().err
    expected, found = tensors_of(merge(lora, checkpoint, tmp_path / "llava-expected")), tensors_of(out)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert json.loads((out / "config.json").read_text())["model_type"] == f"llava_{family}"
    assert errors_of(out) == set()
    load_checkpoint(out, device="cpu")
    with pytest.raises(UmedError, match="plain language model.*umed merge") as told:
        load_checkpoint(lora, vicuna, device="cpu")
    assert "Did you mean" not in str(told.value)


def test_an_adapter_of_transformers_form_is_sent_to_peft(tiny_mistral, tmp_path, capsys):
    lora = write_lora(tiny_mistral, tmp_path / "llava-lora")
    weights = next(iter(lora.glob("adapter_model.*")))
    old, new = "base_model.model.", "base_model.model.language_model."
    tensors = {name.replace(old, new): tensor for name, tensor in read_tensors(weights).items()}
    weights.unlink()
    save_file(tensors, lora / "adapter_model.safetensors")
    for missing in ("non_lora_trainables.bin", "config.json"):  # peft and TRL write neither
        (lora / missing).unlink()
        assert main(f"merge {lora} --base {tiny_mistral} --out {tmp_path}/llava-mistral-out".split()) == 1
        assert "transformers' form" in (told := capsys.readouterr().err) and "merge_and_unload" in told
        with pytest.raises(UmedError, match="merge_and_unload"):
            load_checkpoint(lora, tiny_mistral, device="cpu")
        assert "adapter-of-transformers" in errors_of(lora)


@pytest.mark.parametrize("plain", [False, True])
def test_a_projector_alone_is_merged(plain, tiny_llama, tmp_path, capsys):
    """``--tune_mm_mlp_adapter True`` writes config.json and mm_projector.bin."""
    base = plain_language_model(tiny_llama, tmp_path / "vicuna", False) if plain else tiny_llama
    trained = tmp_path / "projector"
    trained.mkdir()
    shutil.copy(tiny_llama / "config.json", trained)
    old = load_file(tiny_llama / "model.safetensors")
    tensors = {name: tensor.float() + 1 for name, tensor in old.items() if "mm_projector" in name}
    torch.save(tensors, trained / "mm_projector.bin")
    assert main(f"merge {trained} --out {tmp_path}/llava-out".split()) == 1
    assert "--base" in capsys.readouterr().err
    assert main(f"merge {trained} --base {base} --out {tmp_path}/llava-out".split()) == 0, capsys.readouterr().err
    found = tensors_of(tmp_path / "llava-out")
    assert set(found) == set(old)
    for name, tensor in old.items():
        assert torch.equal(found[name], tensors.get(name, tensor).half()), name


def test_the_merge_says_what_the_doctor_calls_an_error(tiny_mistral, tmp_path, capsys):
    """A tokenizer that does not fit, in the base that is given: the result is written, and the status says that it is wrong."""
    base = shutil.copytree(tiny_mistral, tmp_path / "llava-mistral-base")
    trained = with_two_tokens(tiny_mistral, tmp_path / "trained")
    tensors = {
        name: tensor[:-1] if name in (EMBEDDING, HEAD) else tensor for name, tensor in tensors_of(trained).items()
    }
    save_file(tensors, trained / "model.safetensors", metadata={"format": "pt"})
    assert main(f"merge {trained} --base {base} --out {tmp_path}/llava-mistral-out".split()) == 1
    assert "tokens-without-rows" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["merge", "export", "convert", "convert back"])
def test_few_tensors_are_in_memory_at_a_time(command, tiny_mistral, tmp_path, monkeypatch):
    """The largest are in memory with their change and the trained value; a shard, or the whole checkpoint, never is."""
    alive, most, stock = weakref.WeakSet(), [0], StoredTensor.read

    def read(self):
        tensor = stock(self)
        alive.add(tensor)
        most[0] = max(most[0], sum(each.numel() * each.element_size() for each in alive))
        return tensor

    lora, hf, out = write_lora(tiny_mistral, tmp_path / "llava-lora"), tmp_path / "hf", tmp_path / "llava-mistral-out"
    to_transformers(tiny_mistral, hf)
    monkeypatch.setattr(StoredTensor, "read", read)
    {
        "merge": lambda: merge(lora, tiny_mistral, out),
        "export": lambda: export(tiny_mistral, out, like=tiny_mistral),
        "convert": lambda: to_transformers(tiny_mistral, out),
        "convert back": lambda: to_llava(hf, out),
    }[command]()
    whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(tiny_mistral).values())
    assert 0 < most[0] < whole / 2


def projector_of(checkpoint: Path, folder: Path, change: float) -> Path:
    """What ``--tune_mm_mlp_adapter True`` saves."""
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    tensors = {name: tensor + change for name, tensor in tensors_of(checkpoint).items() if "mm_projector" in name}
    torch.save(tensors, folder / "mm_projector.bin")
    return folder


@pytest.mark.parametrize("with_tower", [True, False])
def test_a_tower_inside_the_base_is_found_from_the_result(with_tower, tiny_mistral, tmp_path, monkeypatch):
    """A relative name is the base's, which the result does not lie in."""
    monkeypatch.chdir(tmp_path)
    base = shutil.copytree(tiny_mistral, tmp_path / "base-llava-mistral")
    edit(base, mm_vision_tower="vision_tower")
    out = tmp_path / "made" / "llava-mistral-out"
    merge(projector_of(base, tmp_path / "projector", 1.0), base, out, with_tower=with_tower)
    tower = (out if with_tower else base) / "vision_tower"
    assert json.loads((out / "config.json").read_text())["mm_vision_tower"] == str(tower)
    assert (tower / "config.json").is_file() and errors_of(out) == set()


def test_a_tower_that_is_not_here_is_told(tiny_mistral, tmp_path, capsys):
    base = shutil.copytree(tiny_mistral, tmp_path / "base-llava-mistral")
    edit(base, mm_vision_tower="../clip")
    projector = projector_of(tiny_mistral, tmp_path / "projector", 1.0)
    merge(projector, base, tmp_path / "llava-mistral-out", with_tower=True)
    assert "--with-tower has no effect: mm_vision_tower is '../clip'" in " ".join(capsys.readouterr().err.split())
    assert "tower-moved" in {found.code for found in examine_files(tmp_path / "llava-mistral-out")}
    with pytest.raises(UmedError, match="mm_vision_tower is ../clip, which does not exist in the working folder"):
        load_checkpoint(tmp_path / "llava-mistral-out", device="cpu")
