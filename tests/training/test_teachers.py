"""Teachers that are found unfit only when they are loaded, and the flags around them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support.llava_args import llava_args
from support.llava_models import load

from umed_plugin.errors import UmedError
from umed_plugin.flags.checks import find_faults
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.flags.rules import KeepWeights
from umed_plugin.training.keeping import CheckpointTeacher

TUNING = "instruction_tuning"


def test_a_vocabulary_of_unequal_size_is_refused(tiny_mistral, tmp_path):
    _, model = load(tiny_mistral)
    teacher = shutil.copytree(tiny_mistral, tmp_path / "llava-mistral-larger")
    model.resize_token_embeddings(model.config.vocab_size + 8)
    rows = model.get_output_embeddings().out_features
    model.save_pretrained(teacher)
    _, own = load(tiny_mistral)
    with pytest.raises(UmedError, match=f"predicts {rows} tokens, but the model that learns {rows - 8}"):
        CheckpointTeacher(str(teacher), own, torch.float32)


def test_a_tower_that_takes_other_pixels_is_refused(tiny_mistral, tmp_path):
    teacher = shutil.copytree(tiny_mistral, tmp_path / "llava-mistral-other")
    for name in ("config.json", "vision_tower/preprocessor_config.json"):
        content = json.loads((teacher / name).read_text())
        changed = (
            {"mm_vision_tower": str(teacher / "vision_tower")} if name == "config.json" else {"image_mean": [0.5] * 3}
        )
        (teacher / name).write_text(json.dumps({**content, **changed}))
    with pytest.raises(UmedError, match=r"reads images otherwise \(image_mean: \[0.5, 0.5, 0.5\] instead of"):
        CheckpointTeacher(str(teacher), load(tiny_mistral)[1], torch.float32)


@pytest.mark.parametrize(
    ("flags", "llava", "words"),
    [
        ({"umed_keep": "-1"}, {}, "must be a weight of 0 or more, such as 0.1, or clinkd"),
        ({"umed_keep": "much"}, {}, "must be a weight of 0 or more"),
        ({"umed_teacher": "."}, {}, "no effect without --umed_keep above 0"),
        ({"umed_teacher": "nowhere", "umed_keep": "1"}, {}, "there is no such folder"),
        ({"umed_distill_temperature": 2.0}, {}, "no effect without --umed_keep above 0"),
        ({"umed_tower_teacher": "vit.pth"}, {}, "no effect without --umed_tower_lr, which trains the vision tower"),
        ({"umed_tower_lr": 1e-5}, {"tune_mm_mlp_adapter": True}, "LLaVA then saves the projector alone"),
        ({"umed_tower_lr": 1e-5}, {"fsdp": ["full_shard"]}, "does not work with --fsdp"),
        ({"umed_val_every": 5}, {"fsdp": ["full_shard"]}, "answers need the full weights on every rank"),
        ({"umed_replay": 0.1}, {"group_by_length": True}, "--group_by_modality_length works with it"),
        ({"umed_keep": "0.1"}, {"deepspeed": {"zero_optimization": {"stage": 3}}}, "does not work with ZeRO-3"),
        ({"umed_logit_rows": 8}, {}, "no effect without stage 2 or --umed_keep"),
        ({"umed_feature_cache": "cache"}, {}, "has no effect in --umed_stage instruction_tuning, only in rewarding"),
    ],
)
def test_each_fault_is_named(flags, llava, words):
    (fault,) = find_faults(UmedFlags(umed_stage=TUNING, **flags), *llava_args(**llava))
    assert words in fault and f"--{next(iter(flags))}" in fault


def test_stage_2_says_what_holds_the_policy_there():
    (fault,) = find_faults(UmedFlags(umed_stage="rewarding", umed_keep="0.1"), *llava_args())
    assert fault.endswith("only in instruction_tuning. There --umed_kl_coef holds the policy near its start.")


def test_weights_are_read():
    assert UmedFlags(umed_keep="0.1").keep_weights() == KeepWeights(0.1, 1.0, 1.0)
    assert UmedFlags(umed_keep="clinkd").keep_weights() == KeepWeights(0.5, 1.5, 0.5)
    assert UmedFlags(umed_keep="clinkd", umed_distill_temperature=2.0).keep_weights().temperature == 2
    assert not UmedFlags(umed_keep="0").keeps() and UmedFlags(umed_keep="clinkd").keeps()
