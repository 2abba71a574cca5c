"""The benchmark of pseudo-boxes at a small size."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from support import forked
from support.umed_runs import ROOT

from umed_plugin.commands import processes
from umed_plugin.commands.demo.pipeline import DemoSettings

pytestmark = [pytest.mark.llava, pytest.mark.run, pytest.mark.one_stack]


@pytest.fixture
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_pseudo_boxes", ROOT / "benchmarks" / "pseudo_boxes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_controls_and_the_choice_of_a_rule_are_printed(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [str(tmp_path), "--seeds", "3", "--studies", "160", "--steps", "4"]
    benchmark.main(small)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 3: ")]
    assert [row[0] for row in rows] == ["| 3: trained", "| 3: 0 steps", "| 3: nothing drawn"]
    assert all(0 <= float(cell) <= 1 for row in rows for cell in row[3:5])
    assert all(row[2] == "nan" or 0 <= float(row[2]) <= 1 for row in rows), "few studies have no lesion"
    benchmark.main([*small, "--choose"])
    (head,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| seed")]
    assert all(f"IoU at {share}" in head for share in benchmark.SHARES)


def test_stage_1_takes_as_many_steps_on_pseudo_boxes_as_on_true_ones(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=forked.popen, STDOUT=subprocess.STDOUT))
    sizes = {"tuning": 160, "rewarding": 0, "val": 0, "test": 8, "prior_epochs": 1, "tuning_epochs": 1}
    found = benchmark.stage_1(tmp_path, 3, DemoSettings(**sizes, max_new_tokens=8, processes=1), 4)
    assert 0 < found["pseudo-boxes"] < 160 and {"true", "pseudo"} <= set(found)
    states = [tmp_path / f"runs/{name}-llava-mistral/trainer_state.json" for name in ("true", "pseudo")]
    assert [json.loads(file.read_text())["global_step"] for file in states] == [10, 10]


def test_auroc_counts_pairs(benchmark: ModuleType) -> None:
    assert benchmark.auroc([0.9, 0.5], [0.5, 0.1]) == 0.875
