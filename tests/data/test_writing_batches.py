"""The writer by the Batch API: rounds, faults, a budget, and a process that is killed while its batch is being made."""

from __future__ import annotations

import threading
import time
import zlib
from pathlib import Path

import pytest
from support.batch_server import BatchServer, batch_server
from support.judge_server import Answer, Asked
from support.writer_runs import build_templates, command, ledger_lines, start
from support.writer_server import KEY, draft, finished, good, is_asked_again, is_reflection, reply, write_data

from umed_plugin import cli
from umed_plugin.data.records import load_records

pytestmark = [pytest.mark.llava, pytest.mark.one_stack]  # images are read through MONAI, which needs torch


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("umed_plugin.remote.batch_api.POLL_SECONDS", 0.02)


def build(folder: Path, server: BatchServer, *more: str) -> int:
    return cli.main(command(folder, server, "--batch", *more))


def test_two_batches_write_all_and_a_third_asks_again(tmp_path: Path) -> None:
    """A third of the reflections has a box too many, one question gets 500, and one reply is no completion."""
    failing = {3: Answer({"error": {"message": "try later"}}, 500), 4: Answer({"choices": None})}

    def model(asked: Asked) -> Answer:
        if len(server.asked) in failing and not is_reflection(asked):
            return failing.pop(len(server.asked))
        wrong = is_reflection(asked) and not is_asked_again(asked) and zlib.crc32(asked.request_id.encode()) % 3 == 0
        text = finished(asked) if is_reflection(asked) else draft(asked)
        return reply(text + " Also [0.10, 0.10, 0.20, 0.20]." * wrong)

    write_data(tmp_path, 12, negatives=1)
    with batch_server(model) as server:
        assert build(tmp_path, server) == 0
        assert len(load_records(tmp_path / "out" / "train.json")) == 13 and not failing
        assert 3 <= len(server.batches) <= 5
        assert any(is_asked_again(asked) for asked in server.asked)
        kept = [line for line in ledger_lines(tmp_path) if "lost" not in line]
        assert len(kept) == len({line["key"] for line in kept}) and all(
            line["stage"] in ("write", "reflect") for line in kept
        )
        before = len(server.batches)
        assert build(tmp_path, server) == 0
        assert len(server.batches) == before
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "train.json",
        "train.ledger.batches.jsonl",
        "train.ledger.jsonl",
    ]


def test_a_budget_cuts_a_batch(tmp_path: Path, capsys) -> None:
    write_data(tmp_path, 10)
    with batch_server(good) as server:
        assert build(tmp_path, server, "--budget", "13requests") == 1
        assert sum(server.paid.values()) == 13
        assert "7 images have no diagnosis yet" in capsys.readouterr().out
        assert build(tmp_path, server, "--budget", "99requests") == 0
    assert sum(server.paid.values()) == 20 and set(server.paid.values()) == {1}


@pytest.mark.parametrize("made", [False, True], ids=["while it is made", "while it is waited for"])
def test_a_batch_survives_kill_9_and_is_paid_once(made: bool, tmp_path: Path) -> None:
    write_data(tmp_path, 5)
    build_templates(tmp_path)
    with batch_server(good, polls=10**9 if made else 2) as server:
        server.hold = None if made else threading.Event()
        process = start(tmp_path, server, "--batch")
        ended = time.monotonic() + 200
        notes = tmp_path / "out" / "train.ledger.batches.jsonl"
        while not server.batches or (made and b'"batch"' not in notes.read_bytes()):
            assert process.poll() is None and time.monotonic() < ended, process.communicate()
            time.sleep(0.02)
        process.kill()
        process.communicate()
        assert (b'"batch"' in notes.read_bytes()) == made
        if server.hold is not None:
            server.hold.set()
        server.hold = None
        server.polls = server.batches["batch_0"]["looked_at"] + 2
        assert build(tmp_path, server) == 0
        assert len(server.batches) == 2  # the one that was found again, and the reflections
    assert len(server.paid) == 10 and set(server.paid.values()) == {1}
    assert len(load_records(tmp_path / "out" / "train.json")) == 5


def test_an_open_batch_of_another_model_is_left_to_it(tmp_path: Path, capsys) -> None:
    """Its replies would be taken for the texts of the model that is asked now."""

    def by_model(asked: Asked) -> Answer:
        answer = good(asked)
        answer.body["model"] = asked.body["model"]
        return answer

    write_data(tmp_path, 2)
    with batch_server(by_model, polls=10**9) as server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("umed_plugin.remote.batch_api.time.sleep", _interrupted)
            assert build(tmp_path, server, "--model", "first") == 128 + 2
        server.polls = 2
        server.batches["batch_0"]["looked_at"] = 0
        capsys.readouterr()
        assert build(tmp_path, server, "--model", "second") == 0
        told = capsys.readouterr().out
        assert "train.ledger.batches.jsonl: 1 open batch was asked of first at" in told and "--model first" in told
        assert {line["answered_by"] for line in ledger_lines(tmp_path)} == {"second"}
        before = len(server.batches)
        assert build(tmp_path, server, "--model", "first") == 0
        assert len(server.batches) == before + 1  # its first batch was collected, and the reflections followed
    assert all(line["answered_by"] == line["model"] for line in ledger_lines(tmp_path))


def test_a_batch_that_the_server_has_deleted_names_the_notes(tmp_path: Path, capsys) -> None:
    notes = tmp_path / "out" / "train.ledger.batches.jsonl"
    write_data(tmp_path, 1)
    with batch_server(good) as server:
        notes.parent.mkdir()
        notes.write_text('{"file": "file_9"}\n{"batch": "batch_9", "file": "file_9"}\n')
        assert build(tmp_path, server) == 1
        told = capsys.readouterr().err
        assert f"{notes}: lists batch batch_9" in told and "delete the lines with batch_9 from the file" in told
        notes.write_text('{"file": "file_9"}\n')
        assert build(tmp_path, server) == 0


def _interrupted(seconds: float) -> None:
    raise KeyboardInterrupt


def test_a_server_without_a_batch_api_is_told_and_the_key_is_not(tmp_path: Path, capsys) -> None:
    from support.judge_server import judge_server

    write_data(tmp_path, 1)
    with judge_server(
        lambda asked: Answer({"error": {"message": f"no such page {asked.authorization}"}}, 404)
    ) as server:
        server.RequestHandlerClass.do_GET = server.RequestHandlerClass.do_POST
        assert cli.main(command(tmp_path, server, "--batch")) == 1
    told = capsys.readouterr().err
    assert "the Batch API cannot be used" in told and "without --batch" in told and KEY not in told
