"""Stage 2 through ``umed-run`` with a judge on loopback: replayed, killed and resumed, out of budget, in two processes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support import forked
from support.judge_server import Answer, Asked, JudgeServer, completion, judge_server, score
from support.records import grounded_records
from support.umed_runs import TWO_PROCESSES, environment, train_flags, weights

KEY = "sk-test-0123456789"
FLAGS = shlex.split(
    "--umed_stage rewarding --umed_num_candidates 4 --umed_max_new_tokens 12 --learning_rate 1e-3 --max_steps 5 --save_steps 2"
    " --lora_enable True --lora_r 4 --umed_log_candidates 1 --umed_rewards relevance,localization"
)
PYTHON = ("python", "-m", "llava.train.train_mem")


def by_text(asked: Asked) -> Answer:
    """A score that depends only on the text, and that differs between candidates."""
    return score(zlib.crc32(asked.text.encode()) % 11)


def judged(server: JudgeServer | None, **changes: str) -> list[str]:
    judge = (
        {"umed_judge": "openai:the-model", "umed_judge_base_url": server.url, "umed_judge_retries": "0"}
        if server
        else {}
    )
    return [part for name, value in {**judge, **changes}.items() for part in (f"--{name}", value)]


def start(checkpoint: Path, records: Path, output: Path, *more: str, launcher: Sequence[str] = PYTHON):
    """``umed-run`` with the key in its environment, as a process that can be killed."""
    command = [sys.executable, "-m", "umed_plugin.launch", *launcher]
    command += train_flags(checkpoint, records, output, *[part for part in FLAGS if part], *more)
    env = {**environment(), "OPENAI_API_KEY": KEY}
    if forked.wanted(command):
        return forked.Forked(command, env=env)
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen | forked.Forked, returncode: int | None = 0) -> str:
    """Everything that the process printed; the key must not be in it."""
    stdout, stderr = process.communicate(timeout=300)
    assert returncode is None or process.returncode == returncode, f"{stdout[-1500:]}\n{stderr[-3000:]}"
    assert KEY not in stdout + stderr
    return stdout + stderr


def rewards_in(output: Path) -> list[list[tuple[str, float, float | None]]]:
    groups = [json.loads(line)["candidates"] for line in (output / "candidates.jsonl").read_text().splitlines()]
    return [[(answer["text"], answer["reward"], answer["relevance"]) for answer in group] for group in groups]


def assert_same_weights(output: Path, expected: Path) -> None:
    found, wanted = weights(output), weights(expected)
    assert set(found) == set(wanted) and any(
        tensor.abs().max() > 0 for name, tensor in wanted.items() if "lora_B" in name
    )
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grounded_records(tmp_path_factory.mktemp("judged") / "data")


@pytest.fixture(scope="module")
def whole(tiny_mistral: Path, records: Path) -> tuple[Path, list[Asked]]:
    """An uninterrupted run, and the requests to its judge."""
    output = records.parent.parent / "whole"
    with judge_server(by_text) as server:
        finish(start(tiny_mistral, records, output, *judged(server)))
    return output, server.asked


def test_a_run_is_judged_by_the_server_and_logs_what_it_took(whole, records):
    output, asked = whole
    history = [
        line for line in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in line
    ]
    assert len(history) == 5
    for line in history:
        assert line["judge/failed"] == 0 and line["judge/requests"] + line["judge/cached"] in (8, 4)  # nine records
        assert line["judge/tokens"] == 110 * line["judge/requests"] and line["judge/wait_seconds"] >= 0
        assert 0 < line["reward/relevance"] < 1
    assert len(asked) == sum(line["judge/requests"] for line in history) == len({request.text for request in asked})

    known = {json.loads(line)["answer"]: json.loads(line) for line in (output / "judge.jsonl").read_text().splitlines()}
    references = {record["conversations"][1]["value"].split(" at ")[0] for record in json.loads(records.read_text())}
    assert all(any(reference in line["reference"] for reference in references) for line in known.values())
    for group in rewards_in(output):
        for text, _, relevance in group:
            assert relevance == json.loads(known[text]["reply"])["score"] / 10


def test_the_key_is_in_no_file_of_a_run(whole):
    output, asked = whole
    assert {request.authorization for request in asked} == {f"Bearer {KEY}"}
    files = [file for file in output.rglob("*") if file.is_file()]
    assert any(file.name == "training_args.bin" for file in files) and any(file.name == "judge.jsonl" for file in files)
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


@pytest.mark.one_stack
def test_replaying_gives_the_same_rewards_and_weights_without_a_server(whole, tiny_mistral, records, tmp_path):
    output, _ = whole
    replay = judged(None, umed_judge=f"replay:{output / 'judge.jsonl'}")
    finish(start(tiny_mistral, records, tmp_path / "out", *replay, "--report_to", "none"))
    assert rewards_in(tmp_path / "out") == rewards_in(output)
    assert_same_weights(tmp_path / "out", output)
    assert not (tmp_path / "out" / "judge.jsonl").exists()


@pytest.mark.one_stack
def test_killed_in_the_middle_of_judging_and_resumed_asks_nothing_twice(whole, tiny_mistral, records, tmp_path):
    output, let_go, after = tmp_path / "out", threading.Event(), []

    def three_more_after_the_checkpoint(asked: Asked) -> Answer:
        if not let_go.is_set() and (output / "checkpoint-2" / "trainer_state.json").is_file():
            after.append(asked)
            if len(after) > 3:
                let_go.wait(120)
        return by_text(asked)

    with judge_server(three_more_after_the_checkpoint) as server:
        process = start(tiny_mistral, records, output, *judged(server))
        ended = time.monotonic() + 200
        while len(after) < 4 or (output / "judge.jsonl").read_bytes().count(b"\n") < len(server.asked) - server.held:
            assert process.poll() is None and time.monotonic() < ended, process.communicate()
            time.sleep(0.02)
        process.kill()
        finish(process, None)
        let_go.set()
        kept = {json.loads(line)["answer"] for line in (output / "judge.jsonl").read_text().splitlines()}
        before = len(server.asked)
        finish(start(tiny_mistral, records, output, *judged(server)))
        assert before >= len(kept) >= 3
        assert len(server.asked) > before
        assert not [asked for asked in server.asked[before:] if any(_holds(asked, answer) for answer in kept)]
    assert_same_weights(output, whole[0])


def _holds(asked: Asked, answer: str) -> bool:
    return f"<answer>\n{answer}\n</answer>" in asked.text


@pytest.mark.one_stack
def test_a_spent_budget_ends_with_a_checkpoint_and_a_larger_one_goes_on(whole, tiny_mistral, records, tmp_path):
    output = tmp_path / "out"
    with judge_server(by_text) as server:
        printed = finish(start(tiny_mistral, records, output, *judged(server, umed_judge_budget="20requests")), 1)
        assert "umed: error: training stopped after step 3: the judge's budget of 20 requests is spent" in printed
        assert "Traceback" not in printed
        assert (output / "checkpoint-3" / "trainer_state.json").is_file()
        assert not (output / "trainer_state.json").exists()  # LLaVA writes it when training is over
        finish(start(tiny_mistral, records, output, *judged(server, umed_judge_budget="5000requests")))
        assert len(server.asked) == len({asked.text for asked in server.asked})
    assert_same_weights(output, whole[0])


def test_two_processes_share_the_ledger_and_stop_together(tiny_mistral, records, tmp_path):
    output = tmp_path / "out"
    with judge_server(by_text) as server:
        flags = judged(server, umed_judge_budget="40requests")
        printed = finish(start(tiny_mistral, records, output, *flags, launcher=TWO_PROCESSES), 1)
    assert "the judge's budget of 40 requests is spent" in printed
    lines = [json.loads(line) for line in (output / "judge.jsonl").read_text().splitlines()]
    assert len(lines) == len(server.asked) >= 40
    (checkpoint,) = [folder for folder in output.glob("checkpoint-*") if folder.name != "checkpoint-2"]
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert checkpoint.name == f"checkpoint-{len(history)}" and len(history) < 5
    assert all(line["judge/requests"] > 4 for line in history)  # the mean of both
    rank_files = {file.name for file in checkpoint.glob("rng_state_*.pth")}
    assert rank_files == {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.one_stack
@pytest.mark.parametrize("launcher", [PYTHON, TWO_PROCESSES], ids=["one process", "two processes"])
def test_a_server_that_is_not_there_ends_the_run_plainly_with_a_checkpoint(launcher, tiny_mistral, records, tmp_path):
    """The checkpoint is saved because of the failing judge, behind the step before it."""
    nowhere = {"umed_judge": "openai:m", "umed_judge_base_url": "http://127.0.0.1:9/v1", "umed_judge_patience": "2"}
    nowhere["umed_judge_retries"] = "0"
    flags = [*judged(None, **nowhere), "--gradient_accumulation_steps", "2", "--save_steps", "100"]
    printed = finish(start(tiny_mistral, records, tmp_path / "out", *flags, launcher=launcher), 1)
    said = "training stopped after step 1: the judge returned no score in 2 consecutive rollouts"
    assert f"umed: error: {said}" in printed and "Connection" in printed
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-1" and (checkpoint / "trainer_state.json").is_file(), "a rollout is a step"
    assert f"Saved: {checkpoint}. The same command goes on from there." in printed
    if launcher == PYTHON:  # torchrun has a traceback of its own
        assert "Traceback" not in printed


def test_a_judge_without_patience_ends_the_run_before_the_first_step(tiny_mistral, records, tmp_path):
    nowhere = {"umed_judge": "openai:m", "umed_judge_base_url": "http://127.0.0.1:9/v1", "umed_judge_patience": "1"}
    flags = judged(None, **nowhere, umed_judge_retries="0")
    printed = finish(start(tiny_mistral, records, tmp_path / "out", *flags), 1)
    assert "training stopped after step 0: the judge returned no score in a rollout" in printed
    assert "Nothing was learnt yet." in printed and not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_budget_that_cannot_be_counted_ends_the_run_with_a_checkpoint(tiny_mistral, records, tmp_path):
    """The server stops telling tokens in the second rollout."""

    def tells_less(asked: Asked) -> Answer:
        return by_text(asked) if len(server.asked) <= 8 else Answer(completion('{"score": 3}', usage=False))

    with judge_server(tells_less) as server:
        flags = judged(server, umed_judge_budget="100000tokens", save_steps="100")
        printed = finish(start(tiny_mistral, records, tmp_path / "out", *flags), 1)
    assert "training stopped after step 1: --umed_judge_budget is in tokens" in printed
    assert (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").is_file()
