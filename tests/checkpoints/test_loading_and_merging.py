"""Loading by model_type, merging a LoRA folder into its base, and exporting in the layout of the original."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.taught import write_lora
from support.umed_runs import TESTS, environment

from umed_plugin.checkpoints.adapter_folder import find_base
from umed_plugin.checkpoints.exporting import export
from umed_plugin.checkpoints.folder import TOWER, read_tensors, weight_files
from umed_plugin.checkpoints.language_model import to_language_model
from umed_plugin.checkpoints.loading import load_checkpoint
from umed_plugin.checkpoints.merging import merge
from umed_plugin.checkpoints.to_llava import to_llava
from umed_plugin.checkpoints.to_transformers import to_transformers
from umed_plugin.checkpoints.tower_weights import bare_tower_name, whole_tower
from umed_plugin.checkpoints.trained_on import weights_digest
from umed_plugin.checkpoints.writing import stock_name_fault
from umed_plugin.cli import main
from umed_plugin.commands.doctor.examination import examine
from umed_plugin.errors import UmedError
from umed_plugin.files import replacing_folder
from umed_plugin.training.run_settings import settings_of


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(checkpoint) for name, tensor in read_tensors(file).items()}


def layout(checkpoint: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors_of(checkpoint).items()}


def logits(checkpoint: Path, base: Path | None = None) -> torch.Tensor:
    tokenizer, model, _ = load_checkpoint(checkpoint, base, device="cpu")
    prompt = tokenizer("[INST] Where is it?").input_ids
    ids = torch.tensor([prompt[:1] + [-200] + prompt[1:]])
    image = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.no_grad():
        return model(input_ids=ids, images=image).logits


@dataclasses.dataclass
class BeganWith:
    model_name_or_path: str


def holed(source: Path, folder: Path, lost: str) -> Path:
    """A checkpoint or a tower without one of its weights."""
    if folder != source:
        shutil.copytree(source, folder)
    tensors = tensors_of(folder)
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def float32_base(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float32") / "base-llava-mistral"
    shutil.copytree(tiny_mistral, folder, ignore=shutil.ignore_patterns("vision_tower"))
    tokenizer, model, _ = load_checkpoint(tiny_mistral, device="cpu")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(float32_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(float32_base, tmp_path_factory.mktemp("lora") / "llava-mistral-lora")


@pytest.mark.parametrize("family", ["tiny_mistral", "tiny_llama"])
def test_a_checkpoint_is_loaded_by_what_it_is_and_not_by_its_name(family, request, tmp_path):
    source = request.getfixturevalue(family)
    misnamed = shutil.copytree(source, tmp_path / "my-mpt-lora", ignore=shutil.ignore_patterns("vision_tower"))
    tokenizer, model, processor = load_checkpoint(misnamed, device="cpu")
    assert (
        type(model).__name__
        == {"tiny_mistral": "LlavaMistralForCausalLM", "tiny_llama": "LlavaLlamaForCausalLM"}[family]
    )
    assert processor.crop_size == {"height": 64, "width": 64}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


def test_the_merged_model_answers_as_the_model_with_its_adapter(lora, float32_base, tmp_path):
    merged = merge(lora, float32_base, tmp_path / "llava-mistral-merged")
    adapted = logits(lora, float32_base)
    assert torch.allclose(logits(merged), adapted, atol=1e-4, rtol=1e-4)
    assert (logits(float32_base) - adapted).abs().max() > 0.1


def test_the_adapter_names_its_base_when_none_is_given(lora, float32_base):
    named = json.loads((lora / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == float32_base
    assert torch.equal(logits(lora), logits(lora, float32_base))


@pytest.mark.parametrize("shards", ["safetensors", "bin"])
def test_a_merged_checkpoint_has_the_layout_of_its_base(lora, tiny_mistral, tmp_path, shards):
    base = tmp_path / "base-llava-mistral"
    shutil.copytree(tiny_mistral, base, ignore=shutil.ignore_patterns("vision_tower"))
    (base / "umed.json").write_text("{}")
    if shards == "bin":
        tokenizer, model, _ = load_checkpoint(tiny_mistral, device="cpu", dtype=torch.float16)
        (base / "model.safetensors").unlink()
        model.save_pretrained(base, safe_serialization=False, max_shard_size="400KB")
    merged = merge(lora, base, tmp_path / "llava-mistral-merged")
    assert layout(merged) == layout(base)
    assert {tensor.dtype for tensor in tensors_of(merged).values()} == {torch.float16}
    assert [file.name for file in weight_files(merged)] == [file.name for file in weight_files(base)]
    assert json.loads((merged / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert (merged / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert not (merged / "adapter_config.json").exists()
    assert not (merged / "umed.json").exists()
    changed = [n for n, t in tensors_of(merged).items() if not torch.equal(t, tensors_of(base)[n])]
    assert "model.mm_projector.0.weight" in changed
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert "lm_head.weight" not in changed


def test_tower_weights_inside_a_checkpoint_are_used_and_stay_inside(float32_base, lora, tmp_path):
    base = shutil.copytree(float32_base, tmp_path / "base-llava-mistral")
    tensors = tensors_of(base)
    name = TOWER + "vision_tower.vision_model.embeddings.class_embedding"
    assert name in tensors, "a full checkpoint that was saved with its tower holds the tower's tensors"
    tensors[name] = tensors[name] + 1.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    _, model, _ = load_checkpoint(base, device="cpu")
    found = model.get_vision_tower().vision_tower.vision_model.embeddings.class_embedding
    assert torch.equal(found.detach(), tensors[name])
    merged = merge(lora, base, tmp_path / "llava-mistral-merged")
    assert torch.equal(tensors_of(merged)[name], tensors[name])


def test_an_export_holds_what_the_original_held(tiny_mistral, float32_base, tmp_path):
    (float32_base / "trainer_state.json").write_text("{}")
    out = export(float32_base, tmp_path / "llava-mistral-out", like=tiny_mistral, with_tower=True)
    assert layout(out) == layout(tiny_mistral)
    assert not (out / "trainer_state.json").exists()
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (out, tiny_mistral))
    assert config.pop("mm_vision_tower") == str(out / "vision_tower")
    original.pop("mm_vision_tower")
    assert config == original
    assert (out / "vision_tower" / "preprocessor_config.json").is_file()


def test_an_adapter_is_used_over_the_weights_of_its_training_alone(lora, float32_base, tmp_path, capsys):
    """Another base of the same shapes fits, and answers differently. A copy with another config.json is the same one."""
    copy, other = (
        shutil.copytree(float32_base, tmp_path / name) for name in ("copy-llava-mistral", "other-llava-mistral")
    )
    tensors = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in tensors_of(other).items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "another"}))
    trained = shutil.copytree(lora, tmp_path / "llava-lora")
    assert find_base(trained, copy) == copy, "a copy of the base that it names"
    assert "warning" not in capsys.readouterr().err
    assert find_base(trained, other) == other, "nothing says for certain that it is another one"
    assert f"names {float32_base} as its base, and is used over {other}" in capsys.readouterr().err

    began = settings_of(BeganWith(str(float32_base)))
    (trained / "umed.json").write_text(json.dumps({"settings": began}))
    assert find_base(trained, copy) == copy
    said = f"{other} has other weights than {float32_base}, on which {trained} was trained"
    for do in (
        lambda: load_checkpoint(trained, other, device="cpu"),
        lambda: merge(trained, other, tmp_path / "out"),
    ):
        with pytest.raises(UmedError, match=re.escape(said)):
            do()
    assert [each.found for each in examine(trained, other) if each.code == "base-mismatch"] == [said]
    assert "base-mismatch" not in {each.code for each in examine(trained, copy)}

    del began["model_name_or_path"]["weights_sha256"]  # as earlier versions wrote it
    (trained / "umed.json").write_text(json.dumps({"settings": began}))
    capsys.readouterr()
    for base in (float32_base, other):
        find_base(trained, base)
        assert ("If only config.json was changed, this is no fault." in capsys.readouterr().err) == (base == other)


def test_a_large_file_that_differs_in_a_projector_has_another_digest(tmp_path):
    """A projector of 7 billion parameters is about 40 MB, in a shard of 5 GB of which parts are read."""
    for name, at in (("a", None), ("b", 101 * 2**20)):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "model.safetensors", "wb") as file:
            file.truncate(400 * 2**20)
            if at is not None:
                file.seek(at)
                file.write(bytes([1]) * (16 * 2**20))
    assert weights_digest(tmp_path / "a") != weights_digest(tmp_path / "b")


def test_an_existing_folder_is_replaced_only_when_asked(lora, float32_base, tmp_path):
    out = tmp_path / "llava-mistral-merged"
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(UmedError, match="exists already.*--overwrite"):
        merge(lora, float32_base, out)
    assert (out / "mine").read_text() == "keep"
    with pytest.raises(UmedError, match="in spite of --overwrite: it is not a LLaVA checkpoint"):
        merge(lora, float32_base, out, overwrite=True)
    assert (out / "mine").read_text() == "keep"
    shutil.copy(float32_base / "config.json", out)
    merge(lora, float32_base, out, overwrite=True)
    assert not (out / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava-mistral-merged"]


def test_what_was_there_comes_back_when_the_result_cannot_take_its_place(tmp_path, monkeypatch):
    out = tmp_path / "llava-mistral-merged"
    out.mkdir()
    (out / "mine").write_text("keep")
    stock = os.replace

    def full_disk(source, target):
        if Path(source).name.endswith(".partial"):
            raise OSError("no space left")
        stock(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"), replacing_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert (out / "mine").read_text() == "keep"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava-mistral-merged"]


def without_its_tensors(lora, tmp_path):
    """(a copy of a LoRA folder without the adapter's tensors, these); a test saves what it has made of them."""
    other = shutil.copytree(lora, tmp_path / "llava-lora")
    (file,) = other.glob("adapter_model.*")  # newer versions of PEFT write safetensors
    adapter = read_tensors(file)
    file.unlink()
    return other, adapter


def with_other_settings(lora, tmp_path, changes):
    """A copy of a LoRA folder whose ``adapter_config.json`` has other values."""
    other = shutil.copytree(lora, tmp_path / "llava-lora")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return other


@pytest.mark.parametrize(
    "name", ["layers.0.self_attn.q_proj.bias", "embed_tokens.lora_embedding_A", "layers.0.self_attn.q_proj.lora_B.bias"]
)
def test_an_adapter_that_holds_more_than_low_rank_matrices_is_refused(lora, float32_base, tmp_path, name):
    other, adapter = without_its_tensors(lora, tmp_path)
    torch.save({**adapter, f"base_model.model.model.{name}": torch.ones(4)}, other / "adapter_model.bin")
    with pytest.raises(UmedError, match=rf"{name}.*--lora_bias none"):
        merge(other, float32_base, tmp_path / "llava-mistral-merged")


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_an_adapter_that_lacks_half_a_change_is_refused(lora, float32_base, tmp_path, half):
    """peft would leave the layer as it was, without a word."""
    other, adapter = without_its_tensors(lora, tmp_path)
    gone = next(name for name in adapter if half in name)
    torch.save({name: t for name, t in adapter.items() if name != gone}, other / "adapter_model.bin")
    expected = rf"adapter_model.bin: lacks '{re.escape(gone)}' \(1 such in all\).*not whole"
    with pytest.raises(UmedError, match=expected):
        merge(other, float32_base, tmp_path / "llava-mistral-merged")
    with pytest.raises(UmedError, match=expected):
        load_checkpoint(other, float32_base, device="cpu")
    (found,) = [finding for finding in examine(other, float32_base) if finding.code == "base-mismatch"]
    assert found.found.startswith(f"1 tensors do not fit: the adapter lacks {gone}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("megatron_config", {"hidden_size": 1}),
    ],
)
def test_an_adapter_that_is_no_plain_change_of_its_base_is_refused(lora, float32_base, tmp_path, key, value):
    """PiSSA and OLoRA take a part out of the base when training begins, so the adapter is a change of another base."""
    other = with_other_settings(lora, tmp_path, {key: value})
    refused_everywhere(other, float32_base, rf"peft_type 'LORA' with {key}.*Only plain LoRA", "adapter-not-plain")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3", "feedforward_modules": []}, "peft_type 'IA3'"),
        # PEFT would load a tokenizer from the path.
        ({"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "/there"}, "PROMPT"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": "("}, r"target_modules is '\('"),
    ],
)
def test_settings_of_another_adapter_are_refused_before_peft_reads_them(lora, float32_base, tmp_path, changes, said):
    other = with_other_settings(lora, tmp_path, changes)
    refused_everywhere(other, float32_base, f"adapter_config.json: .*{said}", "adapter-not-plain")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": ["q_proj"]}, r"contains '.*_proj.*no layer of the target_modules"),
        ({"r": 2}, r"has shape \(4, .*but r is 2"),
    ],
)
def test_tensors_that_the_settings_do_not_name_are_refused(lora, float32_base, tmp_path, changes, said):
    """PEFT would leave them out without a word, and merging would not."""
    other = with_other_settings(lora, tmp_path, changes)
    refused_everywhere(other, float32_base, said, "adapter-tensors")


@pytest.mark.parametrize("fault", ["one more prefix", "a layer less"])
def test_an_adapter_that_would_leave_layers_untrained_is_refused(lora, float32_base, tmp_path, fault):
    other, adapter = without_its_tensors(lora, tmp_path)
    if fault == "a layer less":
        adapter = {name: tensor for name, tensor in adapter.items() if "layers.1.self_attn.q_proj" not in name}
    else:
        adapter = {f"base_model.model.{name}": tensor for name, tensor in adapter.items()}
    torch.save(adapter, other / "adapter_model.bin")
    for do in (load_checkpoint, lambda *paths: merge(*paths, tmp_path / "merged")):
        with pytest.raises(UmedError, match="which the base does not have|lacks the matrices of 'model.layers"):
            do(other, float32_base)


def test_an_adapter_that_was_saved_under_its_name_in_peft_is_loaded_too(lora, float32_base, tmp_path):
    other, adapter = without_its_tensors(lora, tmp_path)
    torch.save(
        {name.replace(".weight", ".default.weight"): t for name, t in adapter.items()}, other / "adapter_model.bin"
    )
    assert torch.equal(logits(other, float32_base), logits(lora, float32_base))


def retargeted(lora: Path, folder: Path, targets: list[str] | str, layer: str) -> Path:
    """A copy of an adapter with other ``target_modules``, and the matrices of layers with ``layer`` in their names alone."""
    shutil.copytree(lora, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
    (file,) = folder.glob("adapter_model.*")
    kept = {name: tensor for name, tensor in read_tensors(file).items() if layer in name}
    file.unlink()
    if targets == "all-linear":  # it names the projector too
        for name, weight in read_tensors(folder / "non_lora_trainables.bin").items():
            if name.endswith(".weight"):
                half = name.replace(".weight", ".lora_{}.weight").format
                kept |= {half("A"): torch.ones(4, weight.shape[1]), half("B"): torch.ones(weight.shape[0], 4) / 100}
    torch.save(kept, folder / "adapter_model.bin")
    return folder


@pytest.mark.parametrize(("targets", "layer"), [(["attn.q_proj"], ".q_proj."), ("all-linear", "")])
def test_target_modules_are_read_as_every_peft_reads_them(lora, float32_base, tmp_path, targets, layer):
    """PEFT of LLaVA's pins takes the end of a name, and has no all-linear. Today's leaves lm_head out of all-linear."""
    other = retargeted(lora, tmp_path / "llava-lora", targets, layer)
    merged = logits(merge(other, float32_base, tmp_path / "llava-mistral-merged"))
    try:
        torch.testing.assert_close(merged, logits(other, float32_base), atol=1e-4, rtol=1e-4)
    except UmedError as refused:
        assert re.search("adapter_config.json: PEFT .* cannot use its settings", str(refused))


PLAIN_SCRIPT = """
import sys, torch
from umed_plugin import load_checkpoint

tokenizer, model, _ = load_checkpoint(sys.argv[1], sys.argv[2], device="cpu")
prompt = tokenizer("[INST] Where is it?").input_ids
ids = torch.tensor([prompt[:1] + [-200] + prompt[1:]])
image = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
with torch.no_grad():
    torch.save(model(input_ids=ids, images=image).logits, sys.argv[3])
"""


@pytest.mark.parametrize("trained", [False, True])
def test_a_plain_script_loads_an_adapter_on_the_tower_too(lora, float32_base, tmp_path, trained):
    """Without the patches that commands apply, transformers 5 builds a tower of other names than checkpoints have."""
    other, adapter = without_its_tensors(lora, tmp_path)
    on_tower = [name for name in adapter if ".vision_tower." in name and ".lora_B." in name]
    assert on_tower
    for name in on_tower:
        adapter[name] = adapter[name] + (0.1 if trained else 0)
    torch.save(adapter, other / "adapter_model.bin")
    here = logits(other, float32_base)
    assert torch.equal(here, logits(lora, float32_base)) != trained
    command = [sys.executable, "-c", PLAIN_SCRIPT, str(other), str(float32_base), str(tmp_path / "logits.bin")]
    done = subprocess.run(command, env=environment(TESTS), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits.bin"), here, atol=1e-4, rtol=1e-4)


def refused_everywhere(lora: Path, base: Path, said: str, code: str) -> None:
    """Loading and merging refuse an adapter in the same words, and the doctor finds it."""
    for do in (load_checkpoint, lambda *paths: merge(*paths, lora / "merged")):
        with pytest.raises(UmedError, match=said):
            do(lora, base)
    assert code in {finding.code for finding in examine(lora, base)}


def test_tower_weights_that_do_not_fit_are_refused(float32_base, tmp_path):
    base = shutil.copytree(float32_base, tmp_path / "base-llava-mistral")
    tensors = tensors_of(base)
    gone = next(name for name in tensors if name.startswith(TOWER) and "position_ids" not in name)
    tensors[TOWER + "unknown"] = tensors.pop(gone)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UmedError, match="1 tensors are missing, 1 are unknown, 0 have another shape"):
        load_checkpoint(base, device="cpu")


@pytest.mark.parametrize(
    "lost", ["model.layers.2.mlp.down_proj.weight", "model.mm_projector.2.weight", "model.norm.weight"]
)
def test_a_checkpoint_that_lacks_a_weight_is_neither_loaded_nor_written_anew(lost, float32_base, lora, tmp_path):
    """transformers would give it random values, other ones at each load."""
    base = holed(float32_base, tmp_path / "holed-llava-mistral", lost)
    said = rf"holed-llava-mistral: its weight files, or their index, lack '{lost}' \(1 such in all\)"
    for do in (
        lambda: load_checkpoint(base, device="cpu"),
        lambda: load_checkpoint(lora, base, device="cpu"),
        lambda: merge(lora, base, tmp_path / "out"),
        lambda: export(base, tmp_path / "out", like=base),
        lambda: to_transformers(base, tmp_path / "out"),
    ):
        with pytest.raises(UmedError, match=said):
            do()
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**9, "quantization_config": {}},
        {"mm_projector_type": f"mlp{10**9}x_gelu"},
        {"mm_projector_type": f"mlp{'9' * 5000}x_gelu"},
    ],
)
def test_more_layers_than_any_model_has_are_refused_at_once(changes, float32_base, tmp_path):
    base = shutil.copytree(float32_base, tmp_path / "base-llava-mistral")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))
    for do in (lambda: load_checkpoint(base, device="cpu"), lambda: to_transformers(base, tmp_path / "out")):
        with pytest.raises(UmedError, match="its weight files, or their index, lack|cannot express this model"):
            do()
    assert [finding for finding in examine(base) if finding.severity != "note"]


@pytest.mark.parametrize(
    "lost",
    [
        "language_model.model.norm.weight",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    ],
)
def test_transformers_form_that_lacks_a_weight_is_not_converted(lost, tiny_mistral, tmp_path):
    there = to_transformers(tiny_mistral, tmp_path / "there")
    with pytest.raises(
        UmedError, match=rf"lack '.*{re.escape(lost.partition('layers')[2] or lost.partition('.')[2])}'"
    ):
        to_llava(holed(there, there, lost), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tower_that_lacks_a_weight_is_not_loaded(tiny_mistral, tmp_path):
    base = shutil.copytree(tiny_mistral, tmp_path / "base-llava-mistral")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(base / "vision_tower")}))
    load_checkpoint(base, device="cpu")
    unused = next(name for name in tensors_of(base / "vision_tower") if "post_layernorm.weight" in name)
    holed(base / "vision_tower", base / "vision_tower", unused)
    load_checkpoint(base, device="cpu")
    with pytest.raises(UmedError, match=r"lack 'post_layernorm.weight'"):  # transformers' class has it
        to_transformers(base, tmp_path / "out")
    whole = whole_tower({}, {"mm_vision_tower": str(base / "vision_tower")}, base)
    assert whole[f"{TOWER}vision_tower.{unused}"].eq(1).all()
    lost = next(name for name in tensors_of(base / "vision_tower") if "layers.0.mlp.fc1.weight" in name)
    holed(base / "vision_tower", base / "vision_tower", lost)
    for do in (lambda: load_checkpoint(base, device="cpu"), lambda: to_transformers(base, tmp_path / "out")):
        with pytest.raises(
            UmedError, match=r"vision_tower: its weight files, or their index, lack '.*layers.0.mlp.fc1.weight'"
        ):
            do()


@pytest.mark.parametrize("prefix", ["vision_model.", ""], ids=["usual", "transformers 5"])
def test_a_whole_tower_is_made_of_a_folder_by_either_names(prefix, tiny_mistral, tmp_path):
    """transformers 5 saves a tower without ``vision_model``. A whole CLIP has a text model beside it."""
    tensors = {bare_tower_name(name): tensor for name, tensor in tensors_of(tiny_mistral / "vision_tower").items()}
    saved = {prefix + name: tensor for name, tensor in tensors.items()}
    save_file({**saved, "text_model.final_layer_norm.bias": torch.ones(1)}, tmp_path / "model.safetensors")
    trained = {f"{TOWER}vision_tower.vision_model.pre_layrnorm.bias": torch.full((1,), 7.0)}
    whole = whole_tower(trained, {"mm_vision_tower": str(tmp_path)}, tmp_path)
    assert set(whole) == {f"{TOWER}vision_tower.vision_model.{name}" for name in tensors}
    assert whole[next(iter(trained))].item() == 7


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (
            float("nan"),
            None,
            "llava-lora: 512 of .* values of model.layers.0.self_attn.q_proj.weight are NaN.*diverged",
        ),
        (1e6, "float16", "llava-lora, written as float16: .* are NaN or infinite. Write it with --dtype bfloat16"),
    ],
)
def test_weights_that_are_not_finite_are_not_merged(value, dtype, said, lora, float32_base, tmp_path, capsys):
    other, adapter = without_its_tensors(lora, tmp_path)
    name = next(name for name in adapter if name.endswith("layers.0.self_attn.q_proj.lora_B.weight"))
    adapter[name][:4] = value
    torch.save(adapter, other / "adapter_model.bin")
    more = [] if dtype is None else ["--dtype", dtype]
    out = tmp_path / "llava-mistral-out"
    assert main(["merge", str(other), "--base", str(float32_base), "--out", str(out), *more]) == 1
    assert re.search(said, capsys.readouterr().err.replace("\n", " "))
    assert not out.exists()


def test_weights_that_are_not_finite_are_neither_exported_nor_converted(tiny_mistral, tmp_path):
    trained = shutil.copytree(tiny_mistral, tmp_path / "trained-llava-mistral")
    there = to_transformers(tiny_mistral, tmp_path / "there")
    for folder in (trained, there):
        tensors = tensors_of(folder)
        next(tensor for name, tensor in tensors.items() if name.endswith("model.norm.weight"))[0] = float("inf")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for do in (
        lambda: export(trained, tmp_path / "out", like=tiny_mistral),
        lambda: to_transformers(trained, tmp_path / "out"),
        lambda: to_language_model(trained, tmp_path / "out"),
        lambda: to_llava(there, tmp_path / "out"),
    ):
        with pytest.raises(UmedError, match=r"1 of 128 values of .*model.norm.weight are NaN or infinite"):
            do()
    assert not (tmp_path / "out").exists()


def test_a_weight_that_the_index_does_not_name_is_missing(tiny_mistral, tmp_path):
    """transformers does not read it."""
    base = shutil.copytree(tiny_mistral, tmp_path / "base-llava-mistral")
    (base / "model.safetensors").rename(base / "model-00001.safetensors")
    places = dict.fromkeys(tensors_of(tiny_mistral), "model-00001.safetensors")
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    load_checkpoint(base, device="cpu")
    del places["model.norm.weight"]
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    with pytest.raises(UmedError, match=r"lack 'model.norm.weight' \(1 such in all\)"):
        load_checkpoint(base, device="cpu")


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_embeddings_are_loaded_by_either_name(kept, tiny_mistral, tmp_path):
    base = shutil.copytree(tiny_mistral, tmp_path / "base-llava-mistral")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = tensors_of(tiny_mistral)
    head, embedding = tensors.pop("lm_head.weight"), tensors.pop("model.embed_tokens.weight")
    tensors[kept] = head
    assert not torch.equal(head, embedding)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    _, model, _ = load_checkpoint(base, device="cpu")
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert torch.equal(layer.weight, head.float())


def test_a_tower_that_is_promised_inside_and_is_not_is_refused(tiny_mistral, tmp_path):
    base = shutil.copytree(tiny_mistral, tmp_path / "base-llava-mistral")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "unfreeze_mm_vision_tower": True}))
    with pytest.raises(UmedError, match="sets unfreeze_mm_vision_tower, but its weight files hold no vision tower"):
        load_checkpoint(base, device="cpu")


def test_a_merge_that_fails_leaves_nothing_behind(lora, float32_base, tmp_path):
    from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint

    narrow = make_checkpoint(tmp_path / "narrow-llava-mistral", hidden_size=64)
    with pytest.raises(UmedError, match="Is --base the checkpoint on which it was trained"):
        merge(lora, narrow, tmp_path / "out" / "llava-mistral-merged")
    assert not (tmp_path / "out").exists(), "nor the folder that was made for it"
    (tmp_path / "out").mkdir()
    with pytest.raises(UmedError, match="Is --base the checkpoint on which it was trained"):
        merge(lora, narrow, tmp_path / "out" / "llava-mistral-merged")
    assert list((tmp_path / "out").iterdir()) == [], "a folder that was there before stays"


def test_what_is_no_llava_checkpoint_is_refused_with_what_was_found(tmp_path, tiny_mistral, lora):
    with pytest.raises(UmedError, match="no such folder"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_mistrl"}))
    with pytest.raises(UmedError, match="Did you mean 'llava_mistral'"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {}}))
    with pytest.raises(UmedError, match="transformers form of LLaVA"):
        load_checkpoint(tmp_path)
    with pytest.raises(UmedError, match="is not a LoRA folder"):
        merge(tiny_mistral, None, tmp_path / "out")
    with pytest.raises(UmedError, match="Merge it first"):
        merge(lora, lora, tmp_path / "out")


def test_a_lora_folder_without_the_projector_is_refused(lora, float32_base, tmp_path):
    unfinished = shutil.copytree(lora, tmp_path / "checkpoint-10")
    (unfinished / "non_lora_trainables.bin").unlink()
    with pytest.raises(UmedError, match="at the end of training only"):
        load_checkpoint(unfinished, float32_base)


class Harmful:
    """What a harmful checkpoint holds: unpickling it would run a command."""

    def __reduce__(self):
        return os.system, ("true",)


def test_a_pickle_that_holds_more_than_tensors_is_not_loaded(lora, float32_base, tmp_path):
    harmful = shutil.copytree(lora, tmp_path / "llava-lora")
    torch.save({"x": Harmful()}, harmful / "non_lora_trainables.bin")
    with pytest.raises(UmedError, match="non_lora_trainables.bin: holds more than plain tensors .*system"):
        load_checkpoint(harmful, float32_base)


@pytest.mark.parametrize(
    ("path", "model_type", "right"),
    [
        ("runs/llava-mistral-umed", "llava_mistral", True),
        ("runs/LLaVA-Med-v1.5-Mistral-7b", "llava_mistral", True),
        ("runs/llava-umed", "llava_mistral", False),
        ("runs/checkpoint", "llava_mistral", False),
        ("runs/llava-mistral-lora", "llava_mistral", False),
        ("llava-mistral/checkpoint-20", "llava_mistral", True),
        ("runs/llava-v1.5-7b", "llava_llama", True),
        ("runs/llava-mistral", "llava_llama", False),
        ("runs/llava-mpt", "llava_llama", False),
    ],
)
def test_the_name_that_stock_llava_needs(path, model_type, right):
    assert (stock_name_fault(path, model_type) is None) == right


def test_the_merge_command(lora, float32_base, tmp_path, capsys):
    out = tmp_path / "umed"
    assert main(["merge", str(lora), "--base", str(float32_base), "--out", str(out)]) == 0
    assert "llava and mistral" in capsys.readouterr().out
    assert main(["merge", str(lora), "--base", str(float32_base), "--out", str(out)]) == 1
    assert "--overwrite" in capsys.readouterr().err
