"""What stage 2 of an earlier version left on disk (commit 6baa41d) is read by this one.

``tests/support/old/stage2`` was written by that version: a PPO run of 5 steps with a checkpoint at step 3, between the updates of
a rollout, and a feature cache. The model's own files were left out, and the rollout's image features cut to 2 of 64 patches.
Cache entries hold counted numbers. Absolute paths were replaced by ``/data/run``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import TrainerState

from umed_plugin.commands.report.gallery import candidate_cards
from umed_plugin.commands.report.run_folder import read_run
from umed_plugin.errors import UmedError
from umed_plugin.rewards.running import load_reward_states
from umed_plugin.rewards.terms.localization_curriculum import LocalizationCurriculum
from umed_plugin.training.candidate_log import log_candidates
from umed_plugin.training.experience import Experience
from umed_plugin.training.feature_cache import FORMAT, FeatureCache, FeatureShape, open_feature_cache
from umed_plugin.training.rewarding_state import STATE, load_further, load_kl_coef, load_rewards, rollout_file
from umed_plugin.training.value_head import ValueHead

OLD = Path(__file__).resolve().parents[1] / "support" / "old" / "stage2"
CHECKPOINT = OLD / "checkpoint-3"


def test_algorithm_and_weight_of_the_kl():
    assert load_kl_coef(CHECKPOINT, "ppo", needed=True) == pytest.approx(0.0984)
    with pytest.raises(UmedError, match="was written by --umed_algorithm ppo, but this run has grpo"):
        load_kl_coef(CHECKPOINT, "grpo", needed=False)


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"kl_coef": "0.1"}, "kl_coef"),
        ({"kl_coef": float("nan")}, "kl_coef"),
        ({"umed_algorithm": 3}, "umed_algorithm"),
        ({"rewards": ["localization"]}, "rewards"),
        ({"further_queries": -2}, "further_queries"),
    ],
)
def test_a_damaged_state_is_named_with_its_file_and_key(state, found, tmp_path):
    (tmp_path / STATE).write_text(json.dumps({"umed_algorithm": "ppo", **state}))
    for read in (load_rewards, load_further, lambda folder: load_kl_coef(folder, "ppo", needed=True)):
        with pytest.raises(UmedError, match=rf"rewarding_state\.json: {found}"):
            read(tmp_path)


@pytest.mark.parametrize("state", [{}, {"threshold": "high", "window": []}, {"threshold": 0.5, "window": 3}, None])
def test_a_reward_that_cannot_read_its_state_is_named(state):
    with pytest.raises(UmedError, match="reward 'localization_curriculum': its state in the checkpoint cannot be read"):
        load_reward_states({"localization_curriculum": LocalizationCurriculum()}, {"localization_curriculum": state})


def test_value_head():
    head = ValueHead(128)
    head.load(CHECKPOINT)
    assert head.linear.bias.item() == pytest.approx(1.5044, abs=1e-4)
    assert head.linear.weight[0, :3].tolist() == pytest.approx([-0.0162, 0.0179, -0.0161], abs=1e-4)


def test_rollout_between_two_updates():
    experience = Experience.load(rollout_file(CHECKPOINT, 0), "cpu")
    samples = experience.samples
    assert samples.image_features.shape == (2, 2, 96) and [len(ids) for ids in samples.prompt_ids] == [23, 23]
    assert samples.token_ids[:, 0].tolist() == [153, 578, 649, 161] and samples.mask.sum() == 24
    assert samples.rewards.flatten().tolist() == pytest.approx([2.6875, 2.8346, 0.2778, 0.2647], abs=1e-4)
    for tensor in (samples.log_probs, samples.reference_log_probs, samples.values, experience.advantages):
        assert tensor.shape == (4, 6) and tensor.isfinite().all() and tensor.abs().sum() > 0
    assert experience.returns[:, -1].tolist() == pytest.approx(samples.rewards.flatten().tolist(), abs=1e-4)
    assert experience.kl_coef == 0.1
    second = experience.minibatch([1])
    assert torch.equal(second.samples.token_ids, samples.token_ids[2:])


def test_steps_and_stage():
    state = TrainerState.load_from_json(str(CHECKPOINT / "trainer_state.json"))
    assert state.global_step == 3 and [line["step"] for line in state.log_history] == [1, 2, 3]
    assert "value_loss" in state.log_history[0] and "kl_per_answer" in state.log_history[0]
    assert json.loads((CHECKPOINT / "umed.json").read_text()) == {"umed_stage": "rewarding"}


def test_feature_cache_entry_is_found_by_the_state_of_its_image(monkeypatch):
    monkeypatch.setattr(
        "umed_plugin.training.feature_cache.file_states", lambda path: [("scan.png", 141, 1_000_000_000_000_000_000)]
    )
    (folder,) = (OLD / "feature_cache").iterdir()
    cache = FeatureCache(folder, FeatureShape(4, 8, torch.float16))
    names = [cache.name_of("/data/scan.png", reading) for reading in (None, {"slice": 3, "window": [40, 400]})]
    expected = torch.arange(32).reshape(4, 8).half() / 8, torch.zeros(4, 8).half()
    for name, features in zip(names, expected):
        assert torch.equal(cache.read(name), features)


def test_feature_cache_folder_is_named_by_the_same_description(tiny_mistral, tmp_path):
    """A key more or less would encode every image again."""
    from umed_plugin.checkpoints.loading import load_checkpoint

    tower = load_checkpoint(tiny_mistral, device="cpu")[1].get_vision_tower()
    own = json.loads(
        (open_feature_cache(tmp_path, tower, tower.image_processor, "pad").folder / "made_of.json").read_text()
    )
    (folder,) = (OLD / "feature_cache").iterdir()
    old = json.loads((folder / "made_of.json").read_text())
    assert own.keys() == old.keys() and own["format"] == old["format"] == FORMAT
    for key in ("tower", "select_layer", "select_feature", "dtype", "image_aspect_ratio"):
        assert own[key] == old[key], key


def test_candidates_are_reported_and_written_the_same_way_again(tmp_path):
    run = read_run(OLD)
    assert [training.steps for training in run.trainings] == [3]
    assert [line["step"] for line in run.candidates] == [0, 0, 4, 4]
    assert len(candidate_cards(run.candidates, run.folder)) == 4
    for line in run.candidates:
        study, group = line["study"], line["candidates"]
        record = {
            "id": line["id"],
            "objects": line["true"],
            **{name: study[name] for name in ("source", "modality", "terms")},
            "provenance": {"image_aspect_ratio": study["image_aspect_ratio"]},
            "conversations": [{"from": "human", "value": f"<image>\n{study['question']}"}],
        }
        terms = {name: [row[name] for row in group] for name in group[0] if name not in ("text", "reward")}
        texts, rewards = [row["text"] for row in group], [row["reward"] for row in group]
        log_candidates(line["step"], record, texts, rewards, terms, tmp_path, [], study["image"])
    assert (tmp_path / "candidates.jsonl").read_bytes() == (OLD / "candidates.jsonl").read_bytes()
