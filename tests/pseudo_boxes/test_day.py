"""A day in the life: from labels alone to a checkpoint that is measured on true boxes, by one `umed upgrade`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import labels_day
import pytest
from support.umed_runs import environment, run_command

from umed_plugin.data.records import load_records
from umed_plugin.evaluation.results import Evaluation

pytestmark = pytest.mark.one_stack


@pytest.mark.run
@pytest.mark.llava
def test_from_labels_alone_to_an_evaluation_on_true_boxes_by_one_command(tmp_path: Path) -> None:
    """The command of the benchmark, with fewer images and steps."""
    sizes = argparse.Namespace(labelled=24, normal=8, test=8, seed=0, map_steps=20, steps=[6, 2])
    command = labels_day.command(tmp_path, sizes)
    done = run_command(command, env=environment(), forks_too=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    run = tmp_path / "run"
    records = load_records(run / "data" / "records.json")
    assert {record["provenance"].get("boxes") for record in records if record["objects"]["bbox"]} == {"pseudo"}
    measured = Evaluation.load(run / "evaluation" / "rewarding")
    assert len(measured.predictions) == 8
    assert {prediction.groups["source"] for prediction in measured.predictions} == {"demo_studies"}
    log = (run / "logs" / "stage_1_instruction_tuning.log").read_text()
    assert "have pseudo-boxes, which an anomaly map drew and no person" in log
    result = run / "checkpoint" / "llava-mistral-tiny-umed"
    manifest = json.loads((result / "umed_manifest.json").read_text())
    assert manifest["settings"]["evaluation"]["recipe"] == "demo_studies"
    assert (run / "report.html").is_file()
