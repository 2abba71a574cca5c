"""The canary walk: no command runs code that lies in a file of a checkpoint, wherever it lies and of whatever kind it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.canaries import DISGUISED, KINDS, hostile
from support.records import grounded_records, write_records
from support.taught import write_lora
from support.umed_runs import reward, train

from umed_plugin import patching
from umed_plugin.checkpoints import loading
from umed_plugin.checkpoints.loading import load_checkpoint
from umed_plugin.checkpoints.to_transformers import to_transformers
from umed_plugin.cli import main
from umed_plugin.errors import UmedError
from umed_plugin.patches import STACK, torch_load
from umed_plugin.pseudo_boxes import tower


@pytest.fixture(scope="module")
def good(tiny_mistral, tmp_path_factory) -> Path:
    """A folder with a base, a LoRA folder over it, and its transformers' form."""
    folder = tmp_path_factory.mktemp("good")
    base = shutil.copytree(tiny_mistral, folder / "base-llava-mistral")
    name_tower(base, base / "vision_tower")
    to_transformers(base, folder / "hf-llava")
    write_lora(base, folder / "llava-lora")
    (folder / ALONE).mkdir()
    shutil.copy(base / "config.json", folder / ALONE)
    return folder


def name_tower(checkpoint: Path, tower: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["mm_vision_tower"] = str(tower)
    (checkpoint / "config.json").write_text(json.dumps(config))


BASE, LORA, HF, ALONE = "base-llava-mistral", "llava-lora", "hf-llava", "llava-projector"
# Where a pickle can lie, and the safetensors file that a loader would prefer to it.
PLACES = {
    "weights": (BASE, "pytorch_model.bin", "model.safetensors"),
    "tower": (BASE, "vision_tower/pytorch_model.bin", "vision_tower/model.safetensors"),
    "adapter": (LORA, "adapter_model.bin", "adapter_model.safetensors"),
    "projector": (LORA, "non_lora_trainables.bin", None),
    "alone": (ALONE, "mm_projector.bin", None),
    "hf": (HF, "pytorch_model.bin", "model.safetensors"),
}
COMMANDS = {
    "evaluate": ("evaluate {base} --benchmark vqa_rad --data-root {data} --limit 1", ("weights", "tower")),
    "evaluate-lora": ("evaluate {lora} --base {base} --benchmark vqa_rad --data-root {data}", ("adapter", "projector", "tower")),
    "serve": ("serve {base} --port 0", ("weights", "tower")),
    "serve-lora": ("serve {lora} --base {base} --port 0", ("weights", "adapter", "projector")),
    "merge": ("merge {lora} --base {base} --out {out}", ("weights", "adapter", "projector")),
    "merge-full": ("merge {base} --base {base} --out {out}", ("weights",)),
    "merge-projector": ("merge {alone} --base {base} --out {out}", ("alone",)),
    "convert": ("convert {base} --out {out}", ("weights", "tower")),
    "convert-language-model": ("convert {base} --language-model-only --out {out}", ("weights",)),
    "convert-back": ("convert {hf} --out {out}", ("hf",)),
    "doctor": ("doctor {base}", ("weights", "tower")),
    "doctor-lora": ("doctor {lora} --base {base}", ("weights", "tower", "adapter", "projector")),
    "upgrade": ("upgrade {base} --recipe {recipe} --out {out}", ("weights", "tower")),
}  # fmt: skip


def planted(good: Path, place: str, kind: str, root: Path) -> Path:
    """A copy of the good folders with one hostile file."""
    folder = shutil.copytree(good, root / "made")
    for checkpoint in (BASE, LORA, ALONE):
        name_tower(folder / checkpoint, folder / BASE / "vision_tower")
    part, name, preferred = PLACES[place]
    file, content = folder / part / name, {}
    if preferred and (folder / part / preferred).is_file():
        content = load_file(folder / part / preferred)
        (folder / part / preferred).unlink()
    elif file.is_file():
        content = torch.load(file, weights_only=True)
    hostile(kind, file, root / "canary", content)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vqa_rad")
    rows = [
        {
            "qid": "1",
            "image_name": "a.jpg",
            "question": "Is it?",
            "answer": "Yes",
            "answer_type": "CLOSED",
            "phrase_type": "test",
        }
    ]
    (folder / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows))
    (folder / "VQA_RAD Image Folder").mkdir()
    Image.new("L", (64, 48)).save(folder / "VQA_RAD Image Folder" / "a.jpg")
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_code_in_a_checkpoint(command, kind, good, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("UMED_DATA_ROOT", str(data))
    line, places = COMMANDS[command]
    for place in places:
        root = tmp_path / place
        root.mkdir()
        folder = planted(good, place, kind, root)
        words = line.format(
            base=folder / BASE,
            lora=folder / LORA,
            hf=folder / HF,
            alone=folder / ALONE,
            data=data,
            out=root / "llava-mistral-out",
            recipe="demo_studies",
        )
        assert main(words.split()) != 0, place
        told = capsys.readouterr()
        assert not (root / "canary").exists(), place
        assert Path(PLACES[place][1]).name in told.out + told.err
        assert "weights_only" not in told.err and "Traceback" not in told.err
        assert not (root / "llava-mistral-out").exists() or command == "upgrade"


@pytest.mark.parametrize("kind", [*KINDS, *DISGUISED])
def test_the_library_refuses_them_without_its_patches(kind, good, tmp_path):
    """`load_checkpoint` in a program that never called `prepare_llava`."""
    for place in ("weights", "tower"):
        (tmp_path / place).mkdir()
        folder = planted(good, place, kind, tmp_path / place)
        patching.undo_all()
        try:
            with pytest.raises(UmedError, match=r"pytorch_model\.bin: .*It was not loaded"):
                load_checkpoint(folder / BASE, device="cpu")
        finally:
            patching.apply(STACK)
        assert not (tmp_path / place / "canary").exists()
    assert patching.is_applied(torch_load.PATCH)


@pytest.mark.parametrize("place", ["weights", "tower"])
def test_the_library_loads_behind_the_door_even_where_a_check_fails(place, good, tmp_path, monkeypatch):
    """A second wall: what the check before it lets through is still loaded without running code."""
    folder = planted(good, place, "reduce", tmp_path)
    stock = patching.original(torch, "load")
    for module in (loading, tower):
        monkeypatch.setattr(module, "check_plain", lambda files: None)
    monkeypatch.setattr(loading, "tower_tensors", lambda *words: {})
    patching.undo_all()
    try:
        with pytest.raises((UmedError, OSError)):
            load_checkpoint(folder / BASE, device="cpu")
        if place == "tower":
            with pytest.raises((UmedError, OSError)):
                tower.PatchTower(folder / BASE / "vision_tower", "cpu")
        assert torch.load is stock
    finally:
        patching.apply(STACK)
    assert not (tmp_path / "canary").exists()


FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.parametrize(
    ("stage", "kind", "files", "more"),
    [
        (train, "torchscript", FILES, ()),
        (train, "reduce", FILES, ()),
        # A checkpoint in the middle of a rollout holds the rollout too.
        (reward, "tar", (*FILES, "rollout_0.pt"), ("--umed_updates_per_rollout", "2", "--max_steps", "3")),
    ],
    ids=["stage 1, torchscript", "stage 1, reduce", "stage 2, tar"],
)
def test_resuming_runs_no_code(stage, kind, files, more, tiny_mistral, tmp_path):
    """One state of the checkpoint after the other is hostile: it ends the run, and is named."""
    records = grounded_records(tmp_path / "data") if stage is reward else write_records(tmp_path / "data")
    output = tmp_path / "out"
    steps = ("--max_steps", "2", "--save_steps", "1", "--save_total_limit", "1")
    assert stage(tiny_mistral, records, output, *steps, "--num_train_epochs", "1", *more).returncode == 0
    checkpoint = next(output.glob("checkpoint-*"))
    for name in files:
        file = checkpoint / name
        assert file.is_file(), f"no {name}: {sorted(there.name for there in checkpoint.iterdir())}"
        kept = file.read_bytes()
        hostile(kind, file, tmp_path / "canary")
        run = stage(tiny_mistral, records, output, *steps[2:], *more, "--max_steps", "4")
        assert not (tmp_path / "canary").exists(), name
        assert run.returncode == 1 and f"umed: error: {file}" in run.stderr, run.stderr[-2000:]
        file.write_bytes(kept)


@pytest.mark.parametrize("place", ["weights", "tower"])
def test_training_runs_no_code(place, good, tmp_path):
    folder = planted(good, place, "torchscript", tmp_path)
    run = train(folder / BASE, write_records(tmp_path / "data"), tmp_path / "out", "--max_steps", "1")
    assert not (tmp_path / "canary").exists()
    # The flags are checked first, and with them what the files of checkpoint and tower hold.
    assert run.returncode == 2, run.stderr[-2000:]
    assert "is a TorchScript archive" in run.stderr, run.stderr[-2000:]


@pytest.fixture(params=["OwnTokenizer", None])
def own_tokenizer(good, tmp_path, monkeypatch, request) -> Path:
    """A checkpoint whose tokenizer is a class in a file of its own, and a person who says yes to whatever is asked."""
    folder = shutil.copytree(good / BASE, tmp_path / f"{request.param}-llava-mistral")
    name_tower(folder, folder / "vision_tower")
    source = f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\nfrom transformers import LlamaTokenizer\n"
    (folder / "own.py").write_text(f"{source}class OwnTokenizer(LlamaTokenizer): pass\n")
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content.update(tokenizer_class=request.param, auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]})
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    if (
        request.param is None
    ):  # transformers 4 then reads auto_map in config.json, and asks; else it knows no such class
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoTokenizer": ["own.OwnTokenizer", None]}
        (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    return folder


def test_the_tokenizer_that_a_checkpoint_brings_is_not_imported(own_tokenizer, tmp_path, capsys):
    with pytest.raises(UmedError, match="Code of a checkpoint is never run"):
        load_checkpoint(own_tokenizer, device="cpu")
    assert main(["convert", str(own_tokenizer), "--out", str(tmp_path / "hf")]) == 1
    assert f"{own_tokenizer}: its tokenizer_config.json" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "canary").exists()


def test_a_call_that_says_nothing_is_not_asked(own_tokenizer, tmp_path):
    """LLaVA's `train()` calls so. Without the patch, the yes of the person runs the code."""
    from transformers import AutoTokenizer

    refused = f"{own_tokenizer}: its tokenizer_config.json|Tokenizer class OwnTokenizer does not exist"
    with pytest.raises((UmedError, ValueError), match=refused):
        AutoTokenizer.from_pretrained(str(own_tokenizer), use_fast=False)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("own_tokenizer", [None], indirect=True)
def test_training_runs_no_tokenizer_of_a_checkpoint(own_tokenizer, tmp_path):
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text("import builtins\nbuiltins.input = lambda *words: 'y'\n")
    records = write_records(tmp_path / "data")
    run = train(own_tokenizer, records, tmp_path / "out", "--max_steps", "1", pythonpath=hook)
    assert not (tmp_path / "canary").exists()
    assert run.returncode == 1 and f"umed: error: {own_tokenizer}: its tok" in run.stderr, run.stderr[-2000:]


def test_python_that_a_checkpoint_brings_is_not_imported(good, tmp_path):
    """auto_map in config.json and tokenizer_config.json names a module of the folder; transformers would ask, or import it."""
    folder = shutil.copytree(good / BASE, tmp_path / BASE)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\nclass Own: pass\n")
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        content = json.loads((folder / name).read_text())
        value = ["own.Own", None] if key == "AutoTokenizer" else "own.Own"
        (folder / name).write_text(json.dumps({**content, "auto_map": {key: value}}))
    load_checkpoint(folder, device="cpu")
    assert main(["doctor", str(folder)]) in (0, 1)
    assert not (tmp_path / "canary").exists()
