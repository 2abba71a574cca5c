"""The benchmark for a bare GPU machine runs with torch and transformers 5 alone, on a CPU too. Timings are not tested."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
from support.umed_runs import ROOT, environment

pytest.importorskip("transformers", minversion="5.0", reason="LLaVA's pins have no transformers 5")
pytestmark = [pytest.mark.llava, pytest.mark.run]

SIZES = (
    "--device cpu --layers 2 --hidden 256 --tower-layers 2 --image-size 28 --vocabulary 300 --prompt-tokens 10 --answer-tokens 4"
    " --batch 2 --questions 2 --candidates 3 --lora-rank 4 --repetitions 1 --attention sdpa eager"
)
# Not to be had on a bare machine; an import of one of them fails.
WITHOUT = shlex.split(
    "llava peft trl monai accelerate deepspeed datasets scipy rich pydantic sentencepiece openai nibabel pydicom"
)


def test_both_stages_are_measured_under_every_attention_with_torch_and_transformers_alone(tmp_path):
    script, file = ROOT / "benchmarks" / "gpu.py", tmp_path / "gpu.json"
    bare = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({WITHOUT})); sys.path.insert(0, {str(script.parent)!r});"
        f"sys.argv = ['gpu.py', *{SIZES.split()}, '--json', {str(file)!r}]; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", bare], env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(file.read_text())
    assert figures["matrix_rate"] > 0
    assert set(figures["attention"]) == {"sdpa", "eager"}
    for found in figures["attention"].values():
        assert found["packing_fault"] is None
        phases = {"sampling", "scoring", "reference", "update", "optimizer", "step"}
        assert set(found["stage_2"]["plain"]) == set(found["stage_2"]["packed"]) == phases
        plain, packed = (found["stage_2"][side]["update"]["operations"] for side in ("plain", "packed"))
        # Per question 3 rows of 14 + 4 tokens against one of 14 + 3 * 4; the output layer sees all against the answers' alone.
        assert plain > packed * 1.5
        assert found["stage_1"]["step"]["tokens_per_s"] > 0
        assert found["log_probs_differ_by"] < 0.1
    sdpa, eager = (found["vision_relevance"]["mean"] for found in figures["attention"].values())
    assert sdpa == pytest.approx(eager, abs=0.01) and 0 < sdpa < 1
    assert "stage 2" in done.stdout and "not the whole model" in done.stdout
