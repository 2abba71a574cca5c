"""The benchmark beside TRL's trainer runs at a small size, with answers of one length on both sides. Timings are not tested."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.umed_runs import ROOT, environment

pytest.importorskip("trl", minversion="1.0", reason="needs TRL 1.x, which runs on the current stack alone")
pytestmark = [pytest.mark.llava, pytest.mark.run]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_small_step_of_both_trainers_is_measured(tuning, tmp_path):
    sizes = "--layers 1 --width 64 --image-size 28 --prompt-tokens 16 --answer-tokens 4 --candidates 2 --questions 2"
    command = [sys.executable, str(ROOT / "benchmarks" / "trl_step.py"), *sizes.split(), "--repetitions", "2"]
    command += ["--tuning", tuning, "--gradient-checkpointing", str(int(tuning == "lora")), "--threads", "1"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "trl.json")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "trl.json").read_text())
    assert figures["prompt_tokens"] == 4 + 16
    assert figures["slow_s"] > 0 and figures["fast_s"] > 0
    # Ours makes a first pass with its own weights, so both models are of one distribution: nearly even over 768 tokens.
    assert figures["entropy"]["ours"] == pytest.approx(figures["entropy"]["trl"], abs=0.02)
    assert "times faster" in done.stdout
