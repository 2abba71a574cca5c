"""A vision tower by its name on the hub and as a local copy: the same, another one, or the same under another name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from umed_plugin.flags.checkpoint_settings import find_contradictions, find_departures
from umed_plugin.flags.tower_names import sizes_of

HUB = "openai/clip-vit-large-patch14-336"
SIZES = {"hidden_size": 1024, "patch_size": 14, "image_size": 336}


def copy_of_it(folder: Path, **changes: int) -> str:
    """A folder of the hub's last name, with a configuration as Hugging Face has it: that of the whole CLIP."""
    place = folder / "clip-vit-large-patch14-336"
    place.mkdir(parents=True)
    content = {"model_type": "clip", "hidden_size": 5, "vision_config": {**SIZES, **changes}}
    (place / "config.json").write_text(json.dumps(content))
    return str(place)


def said(stored: str, given: str, **config: object) -> tuple[list[str], list[str]]:
    """(faults, warnings) of a training with a tower on a checkpoint that names another, or the same."""
    args = SimpleNamespace(vision_tower=given)
    config = {"mm_vision_tower": stored, "mm_hidden_size": 1024, **config}
    return find_contradictions(config, args), find_departures(config, args, args)


def test_a_local_copy_of_the_hubs_tower_is_a_warning_that_names_what_is_loaded_and_saved(tmp_path):
    copy = copy_of_it(tmp_path)
    faults, (warning,) = said(HUB, copy)
    assert faults == []
    assert "hidden_size 1024, patch_size 14, image_size 336 are equal" in warning
    assert f"loads {HUB}" in warning and f"will name {copy}" in warning
    assert f"To keep the checkpoint's: --vision_tower {HUB}" in warning
    faults, (warning,) = said(copy, HUB)
    assert faults == [] and f"loads {copy}" in warning and f"will name {HUB}" in warning


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 224}, "It has image_size 224 instead of 336."),
        ({"patch_size": 16}, "It has patch_size 16 instead of 14."),
        ({"hidden_size": 768}, "It has hidden_size 768 instead of 1024."),
    ],
)
def test_a_folder_of_the_same_name_and_another_size_is_refused(changes, words, tmp_path):
    (fault,) = said(HUB, copy_of_it(tmp_path, **changes))[0]
    assert words in fault and f"Use --vision_tower {HUB}" in fault
    (fault,) = said(copy_of_it(tmp_path / "other", **changes), copy_of_it(tmp_path / "third"))[0]
    assert f"instead of {next(iter(changes.values()))}" in fault


def test_the_same_tower_says_nothing_also_through_a_link(tmp_path):
    copy = copy_of_it(tmp_path / "disk")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    linked = str(tmp_path / "link" / Path(copy).name)
    for stored, given in ((HUB, HUB), (copy, copy), (copy, linked)):
        assert said(stored, given) == ([], [])


def test_what_cannot_be_compared_is_said(tmp_path):
    copy = copy_of_it(tmp_path)
    (Path(copy) / "config.json").write_text("{half")
    faults, (warning,) = said(HUB, copy)
    assert faults == [] and "nothing else could be compared" in warning
    # Several scales (S2): LLaVA stores a multiple of the tower's width.
    assert said(HUB, copy_of_it(tmp_path / "s2"), mm_hidden_size=3072, s2=True)[0] == []


@pytest.mark.parametrize(
    ("tower", "sizes"),
    [
        (HUB, {"patch_size": 14, "image_size": 336}),
        ("openai/clip-vit-base-patch16", {"patch_size": 16, "image_size": 224}),
        ("laion/CLIP-ViT-H-14", {}),
        ("/nowhere/clip-vit-large-patch14", {"patch_size": 14}),
    ],
)
def test_a_name_says_its_sizes(tower, sizes):
    assert sizes_of(tower) == sizes
