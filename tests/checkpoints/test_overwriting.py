"""What ``--overwrite`` refuses to delete: inputs, what holds them, and folders of another kind, whichever way they are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.taught import write_lora

from umed_plugin.checkpoints.to_transformers import to_transformers
from umed_plugin.cli import main


@pytest.fixture
def parent(tiny_mistral, tmp_path) -> Path:
    """A folder with a base, a LoRA folder over it and its transformers' form."""
    folder = tmp_path / "parent"
    base = shutil.copytree(tiny_mistral, folder / "base-llava-mistral")
    to_transformers(base, folder / "hf-llava")
    write_lora(base, folder / "llava-lora")
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


COMMANDS = {
    "merge": "merge {p}/llava-lora --base {p}/base-llava-mistral",
    "merge-full": "merge {p}/base-llava-mistral --base {p}/base-llava-mistral",
    "convert": "convert {p}/base-llava-mistral",
    "convert-back": "convert {p}/hf-llava",
}
OUTS = (
    "{p}",
    "{p}/base-llava-mistral",
    "{p}/../parent",
    "{p}/base-llava-mistral/vision_tower",
    "{t}/link",
    "{t}/inner",
)


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_deletes_its_input(command, out, parent, tmp_path, capsys):
    (tmp_path / "link").symlink_to(parent)
    (tmp_path / "inner").symlink_to(parent / "base-llava-mistral")
    for link in (parent / "config.json",):  # the parent looks like a checkpoint
        shutil.copy(parent / "base-llava-mistral" / "config.json", link)
    if command == "convert-back":
        out = out.replace("base-llava-mistral", "hf-llava")
        (tmp_path / "inner").unlink()
        (tmp_path / "inner").symlink_to(parent / "hf-llava")
        (parent / "hf-llava" / "vision_tower").mkdir()
    before = files_of(parent)
    line = f"{COMMANDS[command]} --out {out} --overwrite".format(p=parent, t=tmp_path)
    assert main(line.split()) == 1
    assert "the input" in (told := capsys.readouterr().err) and "Traceback" not in told, told
    assert files_of(parent) == before
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".partial", ".lock"))]


def test_a_tower_or_weights_inside_the_output_are_inputs_too(parent, tiny_mistral, tmp_path, capsys):
    """The base names the tower of the folder that would be replaced; another base links into it, as the Hub's cache has."""
    out = shutil.copytree(tiny_mistral, tmp_path / "llava-mistral-out")
    linked = parent / "linked-llava-mistral"
    linked.mkdir()
    for file in out.iterdir():
        (linked / file.name).symlink_to(file)
    assert main(f"convert {linked} --out {out} --overwrite".split()) == 1
    assert "holds the input" in capsys.readouterr().err
    base = shutil.copytree(tiny_mistral, tmp_path / "base-llava-mistral")
    config = (base / "config.json").read_text().replace(str(tiny_mistral / "vision_tower"), str(out / "vision_tower"))
    (base / "config.json").write_text(config)
    assert main(f"merge {parent}/llava-lora --base {base} --out {out} --overwrite".split()) == 1
    assert "holds the input" in capsys.readouterr().err
    assert (out / "vision_tower" / "config.json").is_file()


def test_folders_of_another_kind_are_left_alone(parent, tiny_mistral, tmp_path, capsys):
    cases = {
        "run": "trainer_state.json",
        "resumable": "checkpoint-5/optimizer.pt",
        "home": "letters/a.txt",
        "repo": ".git/HEAD",
    }
    for name, inside in cases.items():
        folder = shutil.copytree(tiny_mistral, tmp_path / name)
        (folder / inside).parent.mkdir(exist_ok=True)
        (folder / inside).write_text("mine")
        assert main(f"merge {parent}/llava-lora --out {folder} --overwrite".split()) == 1
        assert "is left as it is, in spite of --overwrite" in capsys.readouterr().err
        assert (folder / inside).read_text() == "mine"
    shutil.copytree(parent / "llava-lora", tmp_path / "other-lora")
    assert main(f"merge {parent}/llava-lora --out {tmp_path}/other-lora --overwrite".split()) == 1
    assert "the output of a training run" in capsys.readouterr().err


def test_a_link_to_a_checkpoint_is_followed(parent, tmp_path):
    place = tmp_path / "disk" / "llava-mistral-merged"
    (tmp_path / "llava-mistral-merged").symlink_to(place)
    for more in ("", " --overwrite"):
        assert main(f"merge {parent}/llava-lora --out {tmp_path}/llava-mistral-merged{more}".split()) == 0
        assert (place / "model.safetensors").is_file() and (tmp_path / "llava-mistral-merged").is_symlink()
        assert [path.name for path in place.parent.iterdir()] == [place.name]
