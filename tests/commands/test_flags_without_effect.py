"""Flags of commands that read a checkpoint: what would have no effect is refused before anything is loaded."""

from __future__ import annotations

import json

import pytest

from umed_plugin.cli import main

pytestmark = [pytest.mark.llava, pytest.mark.one_stack]


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "CKPT", "--benchmark", "slake", "--data-root", "."],
        ["serve", "CKPT"],
        ["serve", "CKPT", "--compare", "CKPT"],
        ["doctor", "CKPT"],
    ],
    ids=" ".join,
)
def test_a_base_without_an_adapter_is_refused(command, tiny_mistral, capsys):
    """The merged checkpoint would be measured in place of the adapter that is meant."""
    given = [str(tiny_mistral) if word == "CKPT" else word for word in command]
    assert main([*given, "--base", str(tiny_mistral)]) == 2
    assert f"--base {tiny_mistral} has no effect: {tiny_mistral}" in capsys.readouterr().err


def test_the_doctor_says_the_memory_to_programs_too_and_needs_a_checkpoint_for_it(tiny_mistral, capsys):
    assert main(["doctor", str(tiny_mistral), "--recipe", "demo_studies", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert any("stage 1" in line for line in memory)
    assert main(["doctor", "--recipe", "demo_studies"]) == 2
    assert "--fix, --base and --recipe need a checkpoint" in capsys.readouterr().err
    assert main(["doctor", str(tiny_mistral), "--recipe", "demo_studie"]) == 2
    assert "Did you mean 'demo_studies'" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "said"), [('{"model_type": ', "is not JSON"), ("[]", "is not a JSON object")])
def test_a_damaged_configuration_is_named(content, said, tmp_path, capsys):
    (tmp_path / "llava-mistral").mkdir()
    (tmp_path / "llava-mistral" / "config.json").write_text(content)
    for command in (["convert"], ["rollout-server", "--print"]):
        more = ["--out", str(tmp_path / "out")] if command == ["convert"] else []
        assert main([*command, str(tmp_path / "llava-mistral"), *more]) == 1
        shown = capsys.readouterr().err
        assert f"config.json: {said}" in shown and "bug" not in shown
