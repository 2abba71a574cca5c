"""Two stacks, the same numbers: this Python and the one that ``UMED_OTHER_PYTHON`` names compute from the same files.

``.ci/run`` sets it: the tests on the `current` stack are compared with LLaVA's pins. By hand:
``UMED_OTHER_PYTHON=$PWD/.venv/bin/python make test STACK=current PYTEST_ARGS=tests/patches/test_stacks.py``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.records import write_records
from support.umed_runs import TESTS, environment, other_python

pytestmark = [pytest.mark.run, pytest.mark.timeout(1800)]  # two stacks, one after the other

FACTS = TESTS / "support" / "stack_facts.py"
FAMILIES = ("mistral", "llama")


def run(python: str, *words: object) -> dict:
    """What `stack_facts.py` finds under a Python."""
    out = Path(str(words[-1]))
    out.mkdir(parents=True)
    done = subprocess.run(
        [python, str(FACTS), *map(str, words)],
        env=environment(TESTS),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "facts.pt", weights_only=True)


@pytest.fixture(scope="module")
def stacks(tiny_mistral, tiny_llama, tmp_path_factory):
    """(facts of this stack, facts of the other, folders in which each wrote)."""
    other = other_python()
    if other is None:
        pytest.skip("UMED_OTHER_PYTHON is not set: it names the Python of another stack to compare with")
    folder = tmp_path_factory.mktemp("stacks")
    for checkpoint in (tiny_mistral, tiny_llama):
        (folder / checkpoint.name).symlink_to(checkpoint)
    records = write_records(folder / "data")
    outs = folder / "this", folder / "other"
    here, there = (run(python, "compute", folder, records, out) for python, out in zip((sys.executable, other), outs))
    return here, there, outs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_are_supervised(stacks, family):
    here, there, _ = stacks
    assert here[family]["supervised"] == there[family]["supervised"]
    assert any(label != -100 for label in here[family]["supervised"][1])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_checkpoint_gives_the_same_logits_and_greedy_answers(stacks, family):
    here, there, _ = (stack[family] if isinstance(stack, dict) else stack for stack in stacks)
    torch.testing.assert_close(here["logits"], there["logits"], rtol=0, atol=1e-5)
    assert here["answer"] == there["answer"] != ""
    assert here["answer"] == here["stock answer"] == there["stock answer"]


def test_stage_1_has_the_same_loss_curve(stacks):
    """To the four decimals that transformers 4 logs: it rounds them, so they may differ by 5e-5 (measured: 4.5e-5)."""
    here, there, _ = stacks
    assert len(here["trained"]["losses"]) == 12
    assert here["trained"]["losses"] == pytest.approx(there["trained"]["losses"], abs=6e-5)
    assert here["trained"]["losses"][0] - here["trained"]["losses"][-1] > 0.5, "nothing was learnt, so nothing compared"


def test_each_stack_loads_what_the_other_exports(stacks, tmp_path):
    here, there, (ours, theirs) = stacks
    by_them = run(other_python(), "load", ours / "llava-mistral-exported", tmp_path / "by-them")
    by_us = run(sys.executable, "load", theirs / "llava-mistral-exported", tmp_path / "by-us")
    for found, expected in ((by_them, here["trained"]["exported"]), (by_us, there["trained"]["exported"])):
        torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=1e-5)
        assert found["answer"] == expected["answer"]
