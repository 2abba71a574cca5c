"""`benchmarks/rollout_server.py` without its trainings, on a few of the demo's studies."""

from __future__ import annotations

import json
import os

import pytest

from umed_plugin.commands.demo.pipeline import DemoRun, DemoSettings
from umed_plugin.commands.demo.prior import corpus
from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint
from umed_plugin.terminal.console import console
from umed_plugin.terminal.progress import Steps

PYTHON = os.environ.get("UMED_ENGINE_PYTHON")


@pytest.mark.engine
@pytest.mark.run
@pytest.mark.llava
@pytest.mark.skipif(PYTHON is None, reason="UMED_ENGINE_PYTHON names no environment with vLLM: make test-engine")
def test_the_benchmark_prints_what_is_equal_and_shared(tmp_path, capsys):
    import rollout_server

    sizes = DemoSettings(tuning=4, rewarding=4, val=2, test=12)
    with Steps(console(wide_in_pipes=True)) as steps:
        demo = DemoRun(tmp_path, 0, sizes, steps)
        demo.records()
    make_checkpoint(demo.tiny, corpus=corpus(0))
    arguments = [str(tmp_path), "--python", PYTHON, "--steps", "0", "--checkpoint", str(demo.tiny)]
    assert rollout_server.main(arguments) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    found = {name: value for line in printed for name, value in line.items()}
    for name in ("greedy", "greedy with adapter"):
        assert found[name]["equal"] == found[name]["of"] == 12 and found[name]["largest_difference"] < 1e-4
    shared = found["prefill of K answers"]
    assert shared["full_blocks"] <= shared["hits"] <= shared["full_blocks"] + 12 * 32
