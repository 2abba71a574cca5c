"""`umed evaluate --server`, with a stand-in that answers by the plugin's own loop; tests/engine/ has vLLM."""

from __future__ import annotations

import json

import pytest
from support.records import evaluated_records
from support.rollout_stand_in import sampling, stand_in

from umed_plugin.cli import main
from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    file = folder / "records.json"
    file.write_text(json.dumps([{**record, "split": "test"} for record in evaluated_records(folder)]))
    return file


def evaluated(checkpoint, records, out, *more: str) -> int:
    common = ["--benchmark", str(records), "--device", "cpu", "--max-new-tokens", "12", "--quiet", "--out", str(out)]
    return main(["evaluate", str(checkpoint), *common, *more])


def test_the_server_writes_the_same_answers(tiny_mistral, records, tmp_path, capsys):
    assert evaluated(tiny_mistral, records, tmp_path / "own") == 0
    with stand_in(sampling(tiny_mistral)) as server:
        assert evaluated(tiny_mistral, records, tmp_path / "served", "--server", server.url) == 0
        assert server.log[0] == "/v1/models" and "/v1/completions" in server.log
    own, served = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("own", "served"))
    assert own["metrics"] == served["metrics"]
    # Answers of the two are not mixed in one folder.
    assert evaluated(tiny_mistral, records, tmp_path / "served") == 1
    assert "server" in capsys.readouterr().err


def test_another_model_is_refused(tiny_mistral, records, tmp_path, capsys):
    other = make_checkpoint(tmp_path / "llava-mistral-other", seed=1)
    with stand_in(sampling(other)) as server:
        assert evaluated(tiny_mistral, records, tmp_path / "out", "--server", server.url) == 1
    assert "It holds another model or adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--server", "http://gpu-box:8000/v1"], "is another machine"),
        (["--server", "8000"], "must be an address"),
        (["--allow-remote"], "--allow-remote has no effect without --server"),
    ],
)
def test_addresses_are_checked_first(more, words, tiny_mistral, records, tmp_path, capsys):
    assert evaluated(tiny_mistral, records, tmp_path / "out", *more) == 2
    assert words in capsys.readouterr().err
