"""Whatever a checkpoint answers with changes its hash, and nothing else does; weights are not read."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from umed_plugin.checkpoints.state import checkpoint_hash, checkpoint_hashes


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a tower in a folder, without real weights: they are not opened."""
    folder = tmp_path / "llava"
    (folder / "tower").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"mm_vision_tower": str(folder / "tower")}))
    for name in ("model.safetensors", "tokenizer.model", "tower/model.safetensors", "tower/preprocessor_config.json"):
        (folder / name).write_text("first")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer.json",
        "tower/model.safetensors",
        "tower/preprocessor_config.json",
    ],
)
def test_a_file_that_answers_depend_on_changes_the_hash(checkpoint, name):
    before, config = checkpoint_hash(checkpoint), (checkpoint / "config.json").read_text()
    assert checkpoint_hash(checkpoint) == before
    (checkpoint / name).write_text(f"{config} " if name == "config.json" else "other")
    os.utime(checkpoint / name, ns=(1, 1))
    assert checkpoint_hash(checkpoint) != before


def test_other_files_do_not(checkpoint):
    before = checkpoint_hash(checkpoint)
    (checkpoint / "README.md").write_text("read me")
    (checkpoint / "trainer_state.json").write_text("{}")
    assert checkpoint_hash(checkpoint) == before


def test_weights_of_any_size_are_not_read(checkpoint):
    with (checkpoint / "model.safetensors").open("wb") as stream:
        stream.truncate(15 * 2**40)  # a hole: reading it would take hours
    assert len(checkpoint_hash(checkpoint)) == 16


def test_a_folder_of_lora_counts_with_the_base_that_its_adapter_names(checkpoint, tmp_path):
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(checkpoint)}))
    before = checkpoint_hashes(lora)
    assert before == checkpoint_hashes(lora, checkpoint) == [checkpoint_hash(lora), checkpoint_hash(checkpoint)]
    moved = shutil.copytree(checkpoint, tmp_path / "moved", copy_function=shutil.copy2)
    assert checkpoint_hashes(lora, moved) == before, "a folder may be moved"
    (checkpoint / "tower/model.safetensors").write_text("another tower")
    assert checkpoint_hashes(lora)[0] == before[0] and checkpoint_hashes(lora)[1] != before[1]
