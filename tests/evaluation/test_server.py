"""`umed evaluate --server`, with a stand-in that answers by the plugin's own loop; tests/engine/ has vLLM."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from support.records import evaluated_records
from support.rollout_stand_in import reply, sampling, stand_in
from support.taught import write_lora

from umed_plugin.cli import main
from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint
from umed_plugin.model.server_answering import ServerWriter


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
        said = capsys.readouterr().err
        assert "It holds another model or adapter" in said and "0.1 (--server-max-difference)" in said
        # What is allowed is the user's, and the distance is told.
        more = ["--server", server.url, "--server-max-difference", "50"]
        assert evaluated(tiny_mistral, records, tmp_path / "all-the-same", *more) == 0
    assert re.search(r"over its first \d+ tokens, its log-probabilities differ by \S+ nats", capsys.readouterr().out)


@pytest.mark.parametrize("most", ["0.1", "50"])
def test_a_server_that_does_not_apply_the_adapter_is_refused(
    most, tiny_mistral, records, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("umed_plugin.model.server_comparison.LEAST_TOKENS", 30)
    lora, complete = write_lora(tiny_mistral, tmp_path / "llava-mistral-lora"), sampling(tiny_mistral)
    more = ["--base", str(tiny_mistral), "--server-max-difference", most]
    with stand_in(lambda body, folder: complete(body, None)) as server:
        assert evaluated(lora, records, tmp_path / "out", *more, "--server", server.url) == 1
    assert "accepts the adapter, but answers without it" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [10**6, -1, 10**30, float("inf")])
def test_tokens_that_the_model_does_not_have_are_refused(wrong, tiny_mistral, records, tmp_path, capsys):
    def complete(body, adapter):
        count = len(body["prompt_embeds"])
        return reply(body, [[wrong, *body["stop_token_ids"]]] * count, [[-1.0, -1.0]] * count)

    with stand_in(complete) as server:
        assert evaluated(tiny_mistral, records, tmp_path / "out", "--server", server.url) == 1
    said = capsys.readouterr().err
    assert "Does the server hold another model?" in said or "a completion lacks token_ids" in said


def test_an_adapter_lies_where_the_server_can_read_it(tiny_mistral, records, tmp_path, capsys):
    lora, shared = write_lora(tiny_mistral, tmp_path / "llava-mistral-lora"), tmp_path / "new" / "shared"
    more = ["--base", str(tiny_mistral), "--server-adapters", str(shared)]
    assert evaluated(lora, records, tmp_path / "own", *more[:2]) == 0
    with stand_in(sampling(tiny_mistral)) as server:
        assert evaluated(lora, records, tmp_path / "served", *more, "--server", server.url) == 0
        (name,), (folder,) = server.adapters, server.adapters.values()
        assert folder == str(shared / name) and shared.stat().st_mode & 0o055 == 0o055
        assert all(file.stat().st_mode & 0o044 == 0o044 for file in (shared / name).iterdir())
        own, served = (json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("own", "served"))
        assert own["metrics"] == served["metrics"]

        # What a server cannot load, or this process cannot write, is told by this command's own flag.
        server.may_load = False
        assert evaluated(lora, records, tmp_path / "refused", *more[:2], "--server", server.url) == 1
        said = capsys.readouterr().err
        assert "--server-adapters names another folder" in said and "--lora_r" not in said
        (tmp_path / "file").write_text("")
        more[3] = str(tmp_path / "file" / "shared")
        assert evaluated(lora, records, tmp_path / "unwritten", *more, "--server", server.url) == 1
        said = capsys.readouterr().err
        assert "--server-adapters names another" in said and "--umed_rollout" not in said


def test_the_adapter_is_removed_at_the_end_and_the_folder_is_not(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("umed_plugin.model.server_answering.write_adapter", lambda model, folder, flag: folder)
    ends, forgotten = [], []
    monkeypatch.setattr("atexit.register", lambda *call: ends.append(call))
    server = SimpleNamespace(
        url="",
        base_model=lambda: "base",
        load_adapter=lambda *told: None,
        unload_adapter=forgotten.append,
        adapters_flag="",
    )
    for adapters in (None, tmp_path):
        writer = ServerWriter(server, SimpleNamespace(peft_config={}), adapters)
        forget, folder = ends.pop()
        (tmp_path / writer._name).mkdir(exist_ok=True)
        writer._compared = 255 if adapters else 256
        forget(folder)
        assert ("cannot show whether it applies the adapter" in capsys.readouterr().out) == (adapters is not None)
        assert not folder.exists() and forgotten[-1] == writer._name
    assert tmp_path.is_dir() and [entry.name for entry in tmp_path.iterdir()] == forgotten[:1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--server", "http://gpu-box:8000/v1"], "is another machine"),
        (["--server", "8000"], "must be an address"),
        (["--allow-remote"], "--allow-remote has no effect without --server"),
        (["--server-adapters", "shared"], "--server-adapters has no effect without --server"),
        (["--server-max-difference", "1"], "--server-max-difference has no effect without --server"),
        (["--server", "http://127.0.0.1:9/v1", "--server-max-difference", "0"], "needed: a number of nats above 0"),
        (["--server", "http://127.0.0.1:9/v1", "--server-max-difference", "nan"], "needed: a number of nats above 0"),
        (["--server", "http://127.0.0.1:9/v1", "--server-adapters", "shared"], "holds no adapter"),
    ],
)
def test_addresses_are_checked_first(more, words, tiny_mistral, records, tmp_path, capsys):
    assert evaluated(tiny_mistral, records, tmp_path / "out", *more) == 2
    assert words in capsys.readouterr().err
