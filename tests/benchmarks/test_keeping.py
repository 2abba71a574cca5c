"""The benchmark of what stage 1 keeps, on a tiny demo."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import keeping
import pytest
from support import forked

from umed_plugin.commands import processes
from umed_plugin.evaluation.metrics.metric import Row

pytestmark = pytest.mark.one_stack


@pytest.mark.run
def test_a_tiny_run_prints_captions_boxes_and_cosine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=forked.popen, STDOUT=subprocess.STDOUT))
    arguments = [str(tmp_path), "--seeds", "0", "--studies", "16", "--test", "4", "--rows", "tower and teacher"]
    keeping.main([*arguments, "--processes", "1", "--epochs", "1"])
    table = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["base", "plain", "tower and teacher"]
    base, plain, taught = json.loads((tmp_path / "results.json").read_text())
    assert plain["captions_difference"] == 0 and base["captions"] > 0 and -1 <= taught["teacher"] <= 1
    log = (tmp_path / "seed0" / "logs" / "tower-and-teacher.log").read_text()
    assert "--umed_tower_teacher" in log and "LVM-Med's" in log


def test_differences_are_paired_with_stage_1_without_options():
    plain = [Row(str(i), f"p{i}", {"captions": 3.0 + i, "mean_iou": 0.4, "teacher": 0.1}) for i in range(12)]
    kept = [Row(str(i), f"p{i}", {"captions": 1.0 + i + i % 2, "mean_iou": 0.4, "teacher": 0.1}) for i in range(12)]
    entry = keeping.line("keep 0.1", [(plain, kept)])
    assert entry["captions_difference"] == pytest.approx(-1.5) and entry["captions_ci95"][1] < 0
    assert "| keep 0.1 | 7.000 (-1.500 [" in keeping.markdown([entry])
