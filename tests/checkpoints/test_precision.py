"""The precision in which a checkpoint answers: what the device computes, and what the memory holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from umed_plugin.checkpoints import precision
from umed_plugin.checkpoints.precision import answering_precision
from umed_plugin.errors import UsageError

pytestmark = pytest.mark.llava


def test_a_cpu_answers_in_float32_where_that_fits(
    tiny_mistral: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answering_precision(tiny_mistral, None, "cpu") == "float32"
    assert answering_precision(tiny_mistral, None, "cuda") == "float16"
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(precision, "memory_here", lambda: 3 * 10**9)
    assert answering_precision(tiny_mistral, None, "cpu") == "bfloat16"
    assert "answers in bfloat16: in float32 it would need 3 GB, and there are 3 GB" in capsys.readouterr().out
    assert answering_precision(tiny_mistral, None, "cpu", "float32") == "float32", "a wish is followed"
    assert answering_precision(tiny_mistral, None, "cuda", "bfloat16") == "bfloat16"
    assert capsys.readouterr().out == ""


def test_float16_on_a_cpu_is_refused(tiny_mistral: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--dtype float16: a CPU cannot compute in it. Allowed on a CPU: float32, bfloat16."
    ):
        answering_precision(tiny_mistral, None, "cpu", "float16")


def test_a_container_has_less_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(precision, "_CONTAINER_LIMIT", limit)
    machine = precision.memory_here()
    limit.write_text("1000000\n")
    assert precision.memory_here() == 1000000 < machine
    limit.write_text("max\n")
    assert precision.memory_here() == machine
