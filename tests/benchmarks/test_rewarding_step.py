"""The benchmark of a step runs, at a small size, and its figures are of both sides. Its timings are not tested."""

from __future__ import annotations

import json
import sys

import pytest
from support.umed_runs import ROOT, environment, run_command

pytestmark = pytest.mark.llava  # images are read through MONAI, which needs torch

SMALL = {"layers": 1, "width": 64, "vocabulary": 300, "image-size": 28, "prompt-tokens": 10, "answer-tokens": 4}


@pytest.mark.run
@pytest.mark.timeout(1000)  # that of the suite would come before that of the command
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_small_step_is_measured_on_both_sides(precision, tmp_path):
    file = tmp_path / "step.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "rewarding_step.py"),
        "--candidates",
        "3",
        "--repetitions",
        "2",
        "--accumulation",
        "2",
        "--threads",
        "1",
        "--precision",
        precision,
    ]
    command += [f"--{name}={size}" for name, size in SMALL.items()]
    command += ["--json", str(file)]
    run = run_command(command, env=environment(), timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    figures = json.loads(file.read_text())
    assert figures["prefix_tokens"] == 14
    assert figures["token_limit"] == pytest.approx(3 * 18 / 26)
    assert set(figures["phases"]) == {"sampling", "scoring", "update", "scoring + update", "whole step"}
    assert all(row["slow_s"] > 0 and row["fast_s"] > 0 for row in figures["phases"].values())
    assert figures["same_log_probs"] < (1e-4 if precision == "float32" else 0.1)
    assert all(size > 0 for size in figures["step_bytes"].values())
    assert figures["update_flops"]["plain"] > figures["update_flops"]["packed"] > 0
    assert "of limit" in run.stdout
    accumulated = figures["accumulated_sampling"]
    assert all(seconds > 0 for seconds in accumulated["s_per_question"].values()) and accumulated["ratio"] > 0
    assert "Sampling with 2 micro-batches a step" in run.stdout
    assert all(figures[name]["fast_s"] > 0 for name in ("relevance_from_sampling", "adapter"))
    assert "against sampling's KV cache" in run.stdout and f"Sampling in {precision}" in run.stdout
