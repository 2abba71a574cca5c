"""Presets of `umed upgrade`: listed, applied, outdone by what is given, and the adapter that one of them leads to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from support.records import write_records
from support.umed_runs import train, weights

from umed_plugin import cli
from umed_plugin.checkpoints.loading import read_tensors, weight_files
from umed_plugin.commands.upgrade.presets import preset_file, presets
from umed_plugin.commands.upgrade.settings import Settings
from umed_plugin.commands.upgrade.settings_file import read_settings
from umed_plugin.errors import UsageError


def of(preset: str, file: Path | None = None, **changes: object) -> Settings:
    given = {} if file is not None else {"checkpoint": "/nowhere", "recipe": "demo_studies"}
    return read_settings(file, {**given, **changes}, preset)


def test_all_presets_are_listed_and_set_known_keys(capsys):
    assert cli.main(["upgrade", "--presets"]) == 0
    listed = capsys.readouterr().out
    for name, about in presets().items():
        assert f"{name}: {about}" in listed and len(about) > 30
        of(name)
        content = yaml.safe_load(preset_file(name).read_text())
        assert {"checkpoint", "recipe", "data_root"}.isdisjoint(content), "a preset is for any checkpoint and data"
    with pytest.raises(UsageError, match="unknown preset 'pfmgv'.*Did you mean 'pfmvg'"):
        preset_file("pfmgv")


def test_pfmvg_is_stage_1_of_rank_64_on_two_projections(capsys):
    settings = of("pfmvg")
    lora = settings.lora
    assert (settings.stages, settings.method) == (("instruction_tuning",), "lora")
    assert (lora.r, lora.alpha, lora.dropout, lora.targets) == (64, 16, 0.05, ["q_proj", "v_proj"])
    assert capsys.readouterr().out == "", "nothing was given that differs"


def test_what_is_given_wins_over_a_preset_and_is_said(tmp_path, capsys):
    own = tmp_path / "own.yaml"
    own.write_text("checkpoint: /nowhere\nrecipe: demo_studies\nlora: {r: 8, alpha: 16}\n")
    settings = of("pfmvg", own, **{"lora.alpha": 32, "lora.dropout": 0.05})
    assert (settings.lora.r, settings.lora.alpha, settings.lora.targets) == (8, 32, ["q_proj", "v_proj"])
    told = capsys.readouterr().out
    assert f"--preset pfmvg would set lora.r to 64; {own} sets it to 8, and that counts." in told
    assert "would set lora.alpha to 16; the command line sets it to 32" in told
    assert "lora.dropout" not in told, "it is the same"
    mine = tmp_path / "mine.yaml"
    mine.write_text("# Mine.\nrewarding: {candidates: 5}\n")
    assert of(str(mine)).rewarding.candidates == 5


@pytest.mark.llava
def test_the_dry_run_of_pfmvg_names_its_numbers(tiny_mistral, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call = ["upgrade", str(tiny_mistral), "--recipe", "demo_studies", "--preset", "pfmvg", "--dry-run"]
    assert cli.main(call) == 0
    out = capsys.readouterr().out
    for flag in ("lora_r 64", "lora_alpha 16", "lora_dropout 0.05", "umed_lora_targets q_proj,v_proj"):
        assert f"--{flag} " in out
    assert "--freeze_mm_mlp_adapter False" in out and "--umed_stage rewarding" not in out
    assert (
        "# instruction tuning trains a LoRA adapter of rank 64, alpha 16, dropout 0.05 on q_proj and v_proj, with the "
        "projector; the vision tower is frozen." in out
    )
    assert f"--out {tmp_path}/umed-upgrade-{tiny_mistral.name}/checkpoint/" in out, "the result is that of stage 1"
    assert cli.main([*call, "--set", "lora.targets=[q_prj]", "--set", "method=full"]) == 1
    assert "lora: has no effect with method full" in capsys.readouterr().err


@pytest.mark.run
def test_the_adapter_has_rank_64_on_the_named_layers_alone(tiny_mistral, tmp_path):
    records, output = write_records(tmp_path / "data"), tmp_path / "lora-llava-mistral"
    lora = [
        "--lora_enable",
        "True",
        "--lora_r",
        "64",
        "--lora_alpha",
        "16",
        "--lora_dropout",
        "0.05",
        "--max_steps",
        "1",
    ]
    done = train(tiny_mistral, records, output, *lora, "--umed_lora_targets", "q_proj,v_proj")
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (64, 16, 0.05)
    adapters = {name: tensor for name, tensor in weights(output).items() if "lora_" in name}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapters} == {"q_proj", "v_proj"}
    assert all(tensor.shape[0] == 64 for name, tensor in adapters.items() if "lora_A" in name)
    assert all("vision_tower" not in name for name in adapters)


@pytest.mark.run
def test_stage_a_of_reports_trains_the_tower_and_leaves_the_language_model(tiny_mistral, tmp_path):
    content = yaml.safe_load(preset_file("report_tower").read_text())
    tuning = content["instruction_tuning"]
    assert tuning["flags"]["umed_tower_lr"] == pytest.approx(0.01 * tuning["learning_rate"])
    records, output = write_records(tmp_path / "data"), tmp_path / "full-llava-mistral"
    more = ["--max_steps", "2", "--freeze_backbone", "True", "--umed_tower_lr", "1e-3"]
    done = train(tiny_mistral, records, output, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    before = {name: value for file in weight_files(tiny_mistral) for name, value in read_tensors(file).items()}
    after = weights(output)
    moved = {name for name, value in after.items() if name in before and not torch.equal(value, before[name])}
    assert any("mm_projector" in name for name in moved)
    assert not [name for name in moved if "self_attn" in name or "embed_tokens" in name]
    tower = [name for name in after if "vision_tower" in name]
    assert tower, "the trained tower is in the checkpoint"


@pytest.mark.run
def test_layers_that_are_not_there_and_a_full_training_are_refused(tiny_mistral, tmp_path):
    records = write_records(tmp_path / "data")
    more = ["--max_steps", "1", "--umed_lora_targets", "q_prj"]
    wrong = train(tiny_mistral, records, tmp_path / "a-llava-mistral", "--lora_enable", "True", *more)
    assert wrong.returncode != 0 and "--umed_lora_targets: unknown layer 'q_prj'" in wrong.stderr
    full = train(tiny_mistral, records, tmp_path / "b-llava-mistral", *more)
    assert full.returncode != 0 and "--umed_lora_targets has no effect without --lora_enable True" in full.stderr
