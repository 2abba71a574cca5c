"""Records of phrases and reports beside diagnoses in real runs of both stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.records import grounded_records
from support.umed_runs import train, train_flags, umed_run, weights


def mixed(folder: Path) -> Path:
    """Nine records: diagnoses, phrases with one and two boxes, and a report; the file of `grounded_records` written anew."""
    file = grounded_records(folder)
    records = json.loads(file.read_text())
    for record in records:
        boxes = record["objects"]["bbox"]
        if len(boxes) == 1:
            record |= {"answer_type": "phrase", "phrase": "small nodule"}
            record["conversations"][0]["value"] = "<image>\nWhere is this: small nodule?"
        elif not boxes:
            record |= {"answer_type": "report", "objects": {"ref": ["cyst"], "bbox": [], "bbox_type": "real"}}
            record["conversations"][1]["value"] = "A cyst is seen in the left lung."
    file.write_text(json.dumps(records))
    return file


@pytest.mark.run
def test_stage_1_trains_on_them_also_with_the_attention_loss(tiny_mistral, tmp_path):
    records, output = mixed(tmp_path / "data"), tmp_path / "lora-llava-mistral"
    flags = ["--lora_enable", "True", "--max_steps", "2", "--umed_attention_loss", "0.1"]
    done = train(tiny_mistral, records, output, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert weights(output)


@pytest.mark.run
def test_stage_2_says_what_does_not_apply_and_refuses_what_would_teach_nothing(tiny_mistral, tmp_path):
    records = mixed(tmp_path / "data")

    def reward(name: str, rewards: str):
        more = [
            "--umed_stage",
            "rewarding",
            "--umed_num_candidates",
            "2",
            "--umed_max_new_tokens",
            "6",
            "--max_steps",
            "2",
        ]
        flags = train_flags(tiny_mistral, records, tmp_path / name, *more, "--umed_rewards", rewards)
        return umed_run(["python", "-m", "llava.train.train_mem", *flags])

    done = reward("a-llava-mistral", "relevance,localization,vision_relevance,format")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 of 9 training records looked at are phrases; relevance, format do not apply to them." in done.stdout
    assert "are reports; localization, vision_relevance, format do not apply to them." in done.stdout
    refused = reward("b-llava-mistral", "localization")
    assert refused.returncode != 0
    assert "3 of 9 training records looked at are reports, and none of the rewards (localization)" in refused.stderr
