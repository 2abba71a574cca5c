"""The benchmarks of probes, descriptions and similar cases: each whole way, on a few studies."""

from __future__ import annotations

import json
import shlex
import subprocess
from types import SimpleNamespace

import looks
import probing
import pytest
import similar_cases
from support import forked

from umed_plugin.commands import processes

pytestmark = pytest.mark.one_stack


@pytest.fixture(autouse=True)
def _forked(monkeypatch):
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=forked.popen, STDOUT=subprocess.STDOUT))


@pytest.mark.run
def test_probing_trains_with_and_without_probes_and_compares(tmp_path, capsys):
    small = ["--studies", "16", "--test", "12", "--epochs", "1", "--limit", "2", "--processes", "1", "--share", "0.5"]
    probing.main([str(tmp_path), *small])
    rows = json.loads((tmp_path / "results.json").read_text())["0"]
    assert [row["metric"] for row in rows[:1]] == ["balanced_accuracy"] and len(rows) == 8
    assert "| balanced_accuracy/suggestion |" in capsys.readouterr().out
    trained = json.loads((tmp_path / "seed0/data/with_probes.json").read_text())
    assert len(trained) == 24 and sum(record["answer_type"] == "probe" for record in trained) == 8
    probing.main([str(tmp_path), *small])  # nothing is done again
    assert json.loads((tmp_path / "results.json").read_text())["0"] == rows


@pytest.mark.run
def test_descriptions_of_unseen_classes_are_compared_with_bare_names(tmp_path, capsys):
    looks.main([str(tmp_path), *["--studies", "16", "--test", "6", "--epochs", "1", "--processes", "1"]])
    found = json.loads((tmp_path / "results.json").read_text())["0"]
    assert found["unseen"]["mean_iou/bare"]["n"] == found["unseen"]["mean_iou/described"]["n"] == 6
    asked = {one["conversations"][0]["value"] for one in json.loads((tmp_path / "seed0/data/train.json").read_text())}
    unseen = {looks.NAMES[kind] for kind in looks.UNSEEN}
    assert not any(name in text for name in unseen for text in asked) and any("that is a " in text for text in asked)


@pytest.mark.run
def test_similar_cases_are_compared_with_none(tmp_path, capsys):
    similar_cases.main([str(tmp_path), *shlex.split("--sites 4 --of-each 3 --epochs 1 --similar 2 --processes 1")])
    found = json.loads((tmp_path / "results.json").read_text())["0"]
    assert found["difference"]["n"] == 4 and set(found) == {"without", "asked without", "with", "difference"}
    said = json.loads((tmp_path / "seed0/runs/with-llava-mistral/umed_data/similar-train.json").read_text())["said"]
    assert len(said) == 12 and any(said) and not all(said), "half is under the stock template"
