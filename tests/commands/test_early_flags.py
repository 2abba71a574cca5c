"""What is wrong with a flag alone is told before LLaVA is prepared and a checkpoint is read, in words that name the flag."""

from __future__ import annotations

import json
import re
import shlex
from types import SimpleNamespace

import pytest

from umed_plugin.cli import main
from umed_plugin.errors import UmedError, UsageError

EVALUATE = ("evaluate", "no-checkpoint", "--benchmark", "slake", "--data-root", "no-data")


@pytest.fixture
def unprepared(monkeypatch):
    """Whoever prepares LLaVA fails."""
    monkeypatch.setattr("umed_plugin.patches.prepare_llava", lambda: pytest.fail("LLaVA was prepared first"))


@pytest.mark.llava
@pytest.mark.parametrize(
    "command",
    [
        EVALUATE,
        ("serve", "no-checkpoint"),
        ("convert", "no-checkpoint", "--out", "no-out"),
    ],
)
def test_an_unknown_template_is_refused_at_once(command, unprepared, capsys):
    assert main([*command, "--template", "umed_mistrel"]) == 2
    said = capsys.readouterr().err
    assert "--template: unknown template 'umed_mistrel'" in said and "umed_mistral" in said
    assert "mistral_instruct" in said or "Did you mean" in said


@pytest.mark.llava
def test_the_names_in_llavas_source_are_those_of_its_dictionary():
    from llava.conversation import conv_templates

    from umed_plugin.checkpoints.prompt_templates import TEMPLATES, _names_in_source

    assert _names_in_source() == {*conv_templates} - {*TEMPLATES}


@pytest.mark.parametrize("size", ["-1", "0", "inf", "nan"])
def test_the_size_of_an_image_cache_is_checked_by_its_flag(size, unprepared, capsys):
    assert main([*EVALUATE, "--image-cache", "cache", f"--image-cache-gb={size}"]) == 2
    assert f"--image-cache-gb is {size}; needed: a number of GB above 0" in capsys.readouterr().err


@pytest.mark.llava
def test_a_gpu_that_is_not_there_is_told_before_the_checkpoint_is_loaded(unprepared, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([*EVALUATE, "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert "--device cuda: torch sees no GPU on this machine" in said and "Allowed here: cpu" in said


@pytest.mark.llava
def test_the_python_api_refuses_it_too(monkeypatch):
    from umed_plugin.checkpoints.loading import load_checkpoint
    from umed_plugin.model.answerer import Answerer, AnswererSettings

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="torch sees no GPU"):
        Answerer("no-checkpoint", AnswererSettings(device="cuda"))
    with pytest.raises(UsageError, match="torch sees no GPU"):
        load_checkpoint("no-checkpoint", device="cuda:0")


def test_a_silent_server_of_an_evaluation_gets_advice_that_the_command_can_follow():
    import socket

    from umed_plugin.commands.evaluate import _server_of

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        given = {"allow_remote": False, "server_adapters": None, "server_max_difference": None}
        server = _server_of(SimpleNamespace(server=url, **given))
        object.__setattr__(server, "timeout", 0.1)
        with pytest.raises(UmedError, match=r"no reply within 0.1 s.*Give the same command again, or see") as caught:
            server.base_model()
    assert "--umed" not in str(caught.value)


@pytest.mark.parametrize("given", ["abc", "0", "-3", "1.5", "\u00b2"])
def test_a_number_of_studies_is_named_by_its_flag(given, capsys):
    assert main(["report", "o", f"--studies={given}"]) == 2
    said = capsys.readouterr().err
    assert f"--studies {given!r}: must be a whole number of at least 1" in said and "_positive" not in said


@pytest.mark.parametrize("of", ["build r.yaml --out o.json", "review t.json"])
@pytest.mark.parametrize("given", ["-3", "1.5", "x"])
def test_a_seed_that_no_generator_takes_is_named_by_its_flag(of, given, capsys):
    assert main(["recipe", *of.split(), f"--seed={given}"]) == 2
    assert f"--seed {given!r}: must be a whole number from 0 to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flag", "example"),
    [
        ("recipe build demo_studies", "--out", "records.json"),
        ("recipe build demo_studies --out o.json --writer openai", "--ledger", "ledger.jsonl"),
        ("recipe review no.json", "--out", "review.html"),
        pytest.param("report no", "--index", "reports.html", marks=pytest.mark.llava),
        pytest.param("report no", "--picture", "before_after.png", marks=pytest.mark.llava),
    ],
)
def test_where_a_file_cannot_be_is_said_before_the_work(command, flag, example, tmp_path, capsys):
    """Nothing that the command reads is there: that would be said first."""
    assert main([*command.split(), flag, str(tmp_path)]) == 2
    assert f"{flag} {tmp_path}: is a folder. Give a file, such as {tmp_path / example}" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([*command.split(), flag, str(tmp_path / "file" / "a")]) == 2
    assert f"file is a file, and no folder. Choose another {flag}." in capsys.readouterr().err


def test_a_file_where_a_report_is_to_be_is_said_before_the_data_is_read(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["recipe", "check", "no-recipe", "--report", str(tmp_path / "file")]) == 2
    assert "file: is a file, where a folder is needed. Choose another --report." in capsys.readouterr().err


def test_commands_that_are_printed_can_be_pasted(tmp_path):
    """A folder may have spaces."""
    from umed_plugin.checkpoints.adapter_folder import find_base
    from umed_plugin.checkpoints.folder import read_config
    from umed_plugin.commands.doctor.catalogue import finding
    from umed_plugin.data.records import load_records

    folder = tmp_path / "my runs"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {}}))
    with pytest.raises(UmedError) as other_form:
        read_config(folder)
    with pytest.raises(UmedError) as lora:
        find_base(folder, folder)
    with pytest.raises(UmedError) as records:
        load_records(folder / "train.json")
    unmerged = finding("adapter-not-merged", "", "", checkpoint=folder).remedy
    told = [str(lora.value), str(records.value), str(other_form.value), unmerged]
    for text in told:
        words = shlex.split(re.search(r"umed (convert|merge|recipe|doctor) .*", text)[0])
        assert any(word.startswith(str(folder)) for word in words), text


def test_the_review_that_a_build_advises_can_be_pasted(tmp_path, monkeypatch, capsys):
    from umed_plugin.commands.recipe import build

    out = tmp_path / "bu ilt" / "train.json"
    reviewed = SimpleNamespace(set_aside=[{"id": "a"}], records=[])
    monkeypatch.setattr("umed_plugin.data.writing.decisions.apply_decisions", lambda *given: reviewed)
    monkeypatch.setattr("umed_plugin.data.records.save_records", lambda *given: None)
    build.with_decisions([], [{"id": "a"}], [], out)
    line = next(line for line in capsys.readouterr().out.splitlines() if "umed recipe review" in line)
    assert shlex.split(line)[-1] == str(out)


def test_the_flags_that_a_build_advises_can_be_pasted(tmp_path, capsys):
    from umed_plugin.commands.recipe import build

    out = tmp_path / "bu ilt" / "train.json"
    build._tell_result(SimpleNamespace(out=out, tower=None, image_aspect_ratio="pad"), [])
    words = shlex.split(capsys.readouterr().out.partition("train with: ")[2])
    assert words == ["--data_path", str(out), "--image_folder", str(out.parent), "--image_aspect_ratio", "pad"]
