"""The sizes of a vision tower by its config.json, in a folder or in the cache of the Hugging Face Hub."""

from __future__ import annotations

import json

import pytest
from support.towers import LARGE, cache_tower

from umed_plugin.checkpoints.tower_config import CLIP_SIZES, tower_sizes

NAME = "openai/clip-vit-large-patch14"


@pytest.mark.llava
def test_a_tower_is_found_in_a_folder_and_in_the_cache(tmp_path):
    assert tower_sizes(NAME, str(tmp_path)) is None
    file = cache_tower(tmp_path, NAME)
    expected = {**LARGE, "image_size": 224}
    assert tower_sizes(NAME, str(tmp_path)) == tower_sizes(str(file.parent)) == expected
    assert tower_sizes("../clip", str(tmp_path)) is None and tower_sizes("/no/such/folder") is None


def test_without_a_name_no_other_config_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(cache_tower(tmp_path, NAME).parent)
    assert tower_sizes("") is None


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "siglip", "vision_config": LARGE},
        {"model_type": "clip", "vision_config": {**LARGE, "image_size": [224, 224]}},
        {"model_type": "clip", "vision_config": {**LARGE, "patch_size": 0}},
        {"model_type": "clip", "vision_config": None},
        [],
    ],
)
def test_sizes_that_are_not_said_are_not_guessed(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert tower_sizes(str(tmp_path)) is None


def test_what_transformers_leaves_out_is_what_a_clip_has_by_default():
    from transformers import CLIPVisionConfig

    assert {key: getattr(CLIPVisionConfig(), key) for key in CLIP_SIZES} == CLIP_SIZES
