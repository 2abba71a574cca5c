"""An exported checkpoint in stock LLaVA, in a process where the plugin cannot be imported."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.taught import ANSWERS, QUESTION, STOCK, learn_by_heart, study_records, write_lora
from support.umed_runs import python_of_llavas_pins

from umed_plugin.checkpoints.exporting import export
from umed_plugin.checkpoints.folder import TOWER
from umed_plugin.checkpoints.loading import load_checkpoint
from umed_plugin.checkpoints.merging import merge
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.evaluation.benchmarks.recipe import RECIPE, record_questions
from umed_plugin.evaluation.evaluation_run import EvaluationSettings
from umed_plugin.evaluation.evaluator import evaluate_questions
from umed_plugin.patches import tower_layout


@pytest.fixture(scope="module")
def exported(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict]]:
    """(exported checkpoint, folder of the images, records)."""
    folder = tmp_path_factory.mktemp("export")
    records = study_records(folder / "images")
    learn_by_heart(tiny_mistral, records, folder / "images", folder / "trained")
    out = export(folder / "trained", folder / "llava-mistral-umed", like=tiny_mistral, with_tower=True)
    return out, folder / "images", records


@pytest.mark.parametrize("written_by", ["merge", "export"])
def test_stock_llava_answers_with_the_tower_that_was_trained_with(written_by, tiny_mistral, tmp_path):
    """LLaVA-Med 1.5 holds a tower of its own, and its config does not say so to stock LLaVA."""
    from llava.model.builder import load_pretrained_model

    base = shutil.copytree(tiny_mistral, tmp_path / "base-llava-mistral", ignore=shutil.ignore_patterns("vision_tower"))
    name = "vision_tower.vision_model.post_layernorm.weight"
    tower = load_file(tiny_mistral / "vision_tower" / "model.safetensors")
    tensors = {TOWER + "vision_tower." + n: t.half() for n, t in tower.items()}
    tensors[TOWER + name] += 0.5
    weights = {**load_file(base / "model.safetensors"), **tensors}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    told = {"unfreeze_mm_vision_tower": True}  # by patches/vision_tower.py
    out = tmp_path / f"llava-mistral-{written_by}"
    if written_by == "merge":
        lora = write_lora(base, tmp_path / "llava-mistral-lora")
        tell(lora, told)
        merge(lora, base, out)
    else:
        trained = shutil.copytree(base, tmp_path / "trained-llava-mistral")
        tell(trained, told)
        export(trained, out, like=base)
    _, model, _, _ = load_pretrained_model(str(out), None, out.name, device="cpu")
    assert torch.equal(model.get_vision_tower().state_dict()[name].float(), tensors[TOWER + name].float())
    assert "unfreeze_mm_vision_tower" not in json.loads((base / "config.json").read_text())


LAST_NORM = "vision_tower.vision_model.post_layernorm.weight"


@pytest.fixture
def own_tower(tiny_mistral, tmp_path) -> Path:
    """A base with a tower inside that differs from the original one."""
    base = shutil.copytree(tiny_mistral, tmp_path / "base-llava-mistral", ignore=shutil.ignore_patterns("vision_tower"))
    tower = load_file(tiny_mistral / "vision_tower" / "model.safetensors")
    tensors = {f"{TOWER}vision_tower.{name}": tensor.half() for name, tensor in tower.items()}
    tensors[TOWER + LAST_NORM] += 0.5
    save_file(
        {**load_file(base / "model.safetensors"), **tensors}, base / "model.safetensors", metadata={"format": "pt"}
    )
    return base


@pytest.mark.parametrize("trained", [None, torch.tensor(2.0)], ids=["frozen", "trained"])
@pytest.mark.parametrize("original", [True, False], ids=["original", "own"])
@pytest.mark.parametrize("early", [False, True], ids=["", "unfreeze"])
def test_an_adapter_is_merged_and_loaded_with_the_tower_that_it_was_trained_with(
    early, original, trained, own_tower, tiny_mistral, tmp_path
):
    """--umed_tower_weights original leaves the base's own tower out, which the run notes; --umed_tower_lr trains it besides.

    With unfreeze_mm_vision_tower in its config.json, LLaVA builds the base with its own tower.
    """
    if early:
        tell(own_tower, {"unfreeze_mm_vision_tower": True})
    lora = write_lora(own_tower, tmp_path / "llava-mistral-lora")
    tell(lora, {"umed_tower_weights": "original"} if original else {})
    of_tower = load_file(tiny_mistral / "vision_tower" / "model.safetensors")
    expected = of_tower[LAST_NORM.removeprefix("vision_tower.")].float() + (0 if original else 0.5)
    other = LAST_NORM.replace("weight", "bias")
    if trained is not None:
        others = torch.load(lora / "non_lora_trainables.bin", weights_only=True)
        value = torch.full_like(of_tower[other.removeprefix("vision_tower.")].float(), float(trained))
        torch.save({**others, f"base_model.model.{TOWER}{other}": value}, lora / "non_lora_trainables.bin")
    out = merge(lora, own_tower, tmp_path / "llava-mistral-out")
    for arguments in ((out,), (lora, own_tower)):
        _, model, _ = load_checkpoint(*arguments, device="cpu")
        llava = model.get_base_model() if len(arguments) > 1 else model
        found = llava.get_vision_tower().state_dict()
        torch.testing.assert_close(found[LAST_NORM].float(), expected, atol=1e-3, rtol=0)
        assert trained is None or (found[other] == trained).all()
    assert "umed_tower_weights" not in json.loads((out / "config.json").read_text())


def test_an_original_tower_that_lacks_what_the_base_holds_is_refused(own_tower, tmp_path):
    lora = write_lora(own_tower, tmp_path / "llava-mistral-lora")
    tell(lora, {"umed_tower_weights": "original"})
    weights = load_file(own_tower / "model.safetensors")
    weights[f"{TOWER}vision_tower.vision_model.more.weight"] = torch.zeros(2)
    save_file(weights, own_tower / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UmedError, match=r"umed_tower_weights original, but .* lacks '.*more\.weight'"):
        merge(lora, own_tower, tmp_path / "llava-mistral-out")
    assert not (tmp_path / "llava-mistral-out").exists()


@pytest.mark.skipif(
    bool(tower_layout.PATCH.not_needed()), reason="on its pins LLaVA is not changed where nothing is trained"
)
def test_a_tower_that_a_checkpoint_lacks_is_no_tower_of_random_weights(tiny_mistral, tmp_path):
    from llava.model.builder import load_pretrained_model

    lying = shutil.copytree(tiny_mistral, tmp_path / "lying-llava-mistral")
    tell(lying, {"unfreeze_mm_vision_tower": True})
    with pytest.raises(UsageError, match="unfreeze_mm_vision_tower.*lacks "):
        load_pretrained_model(str(lying), None, lying.name, device="cpu")


def test_without_a_tower_inside_stock_llava_is_not_told_to_look_for_one(tiny_mistral, tmp_path):
    trained = shutil.copytree(tiny_mistral, tmp_path / "trained", ignore=shutil.ignore_patterns("vision_tower"))
    tell(trained, {"unfreeze_mm_vision_tower": True})
    out = export(trained, tmp_path / "llava-mistral-out", like=tiny_mistral)
    assert "unfreeze_mm_vision_tower" not in json.loads((out / "config.json").read_text())


BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.linspace(0, 1, 16),
    f"{TOWER}vision_tower.vision_model.embeddings.position_ids": torch.arange(65)[None],
}


@pytest.mark.parametrize("buffer", BUFFERS)
def test_a_buffer_that_newer_transformers_do_not_save_is_the_bases(buffer, tiny_mistral, tmp_path):
    base = shutil.copytree(tiny_mistral, tmp_path / "base-llava-mistral")
    trained = shutil.copytree(tiny_mistral, tmp_path / "trained-llava-mistral")
    weights = {**load_file(base / "model.safetensors"), buffer: BUFFERS[buffer]}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    out = export(trained, tmp_path / "llava-mistral-out", like=base)
    written = load_file(out / "model.safetensors")
    assert torch.equal(written[buffer], BUFFERS[buffer])
    assert set(written) == set(weights)


@pytest.mark.parametrize("buffer", BUFFERS)
def test_a_buffer_that_only_the_training_saved_is_left_out(buffer, tiny_mistral, tmp_path):
    trained = shutil.copytree(tiny_mistral, tmp_path / "trained-llava-mistral")
    weights = load_file(trained / "model.safetensors")
    save_file({**weights, buffer: BUFFERS[buffer]}, trained / "model.safetensors", metadata={"format": "pt"})
    out = export(trained, tmp_path / "llava-mistral-out", like=tiny_mistral)
    assert set(load_file(out / "model.safetensors")) == set(weights)


def tell(folder: Path, values: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_stock_llava_gives_the_answers_that_the_plugin_gives(exported, tmp_path):
    python = python_of_llavas_pins()
    if python is None:
        pytest.skip("LLaVA runs as it is on its pins alone: UMED_OTHER_PYTHON names a Python that has them")
    checkpoint, images, records = exported
    settings = EvaluationSettings(template="mistral_instruct", max_new_tokens=200)
    ours = evaluate_questions(checkpoint, RECIPE, record_questions(records, images), settings)
    lines = [{"question_id": r["id"], "image": r["image"], "text": QUESTION} for r in records]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = {
        "model_path": str(checkpoint),
        "image_folder": str(images),
        "question_file": str(tmp_path / "questions.jsonl"),
        "answers_file": str(tmp_path / "answers.jsonl"),
    }
    # -I leaves out PYTHONPATH and the working folder, from which the plugin could come.
    done = subprocess.run(
        [python, "-I", str(STOCK), json.dumps(arguments)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stock = [json.loads(line)["text"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert stock == [prediction.answer for prediction in ours.predictions]
    assert stock == list(ANSWERS), "the model has learnt its three answers, so the comparison says something"
