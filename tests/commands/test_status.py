"""`umed status`: a run that is going on, one that was stopped, and one that has ended, from the files that runs write."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from support.report_runs import write_log

from umed_plugin.cli import main
from umed_plugin.commands.run_logs import last_row, read_progress
from umed_plugin.files.locks import holder, locked

# As transformers 4 and LLaVA write it: tqdm's bars with carriage returns, and a row of metrics now and then.
BAR = (
    "/env/bin/umed-run /env/bin/python -m llava.train.train_mem --max_steps 40\n"
    " 25%|##5       | 10/40 [00:20<01:00,  2.00s/it]\r 27%|##7       | 11/40 [00:22<00:58,  2.00s/it]\n"
    "{'loss': 0.0, 'learning_rate': 0.005, 'reward/relevance': 0.5, 'reward/total': 1.25, 'kl': 0.01, 'epoch': 0.1}\n"
)


def with_log(folder: Path, text: str, name: str = "stage_2_rewarding") -> Path:
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(text)
    return log


def test_a_run_that_is_going_on_says_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = with_log(tmp_path / "run", BAR)
    with locked(tmp_path / "run", inside=True):
        assert holder(tmp_path / "run") == f"process {os.getpid()}"
        assert main(["status", str(tmp_path / "run")]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == f"{tmp_path / 'run'}: running (process {os.getpid()})"
    assert lines[:3] == [
        "  step: stage 2 rewarding",
        "  progress: 11 of 40 (27 %), 2 s each, 58 s left",
        "  last: reward/relevance 0.5, reward/total 1.25, kl 0.01, loss 0",
    ]
    assert lines[3].startswith(f"  log: {log} (last line ") and len(lines) == 4


def test_a_run_that_writes_nothing_any_more_may_hang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, old = with_log(tmp_path / "run", BAR), time.time() - 3600
    os.utime(log, (old, old))
    with locked(tmp_path / "run", inside=True):
        assert main(["status", str(tmp_path / "run")]) == 0
    assert "nothing was written for 1 h 00 min" in capsys.readouterr().out


def test_a_run_that_was_killed_and_one_that_has_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_log(tmp_path / "run", BAR)
    (tmp_path / "run" / ".lock").write_text("1 elsewhere\n")
    assert main(["status", str(tmp_path / "run")]) == 1
    shown = capsys.readouterr().out
    assert "stopped before its end; the same command continues it" in shown and " left" not in shown
    for name in ("summary.json", "report.html"):
        (tmp_path / "run" / name).write_text("{}")
    assert main(["status", str(tmp_path / "run")]) == 0
    assert f"report: {tmp_path / 'run' / 'report.html'}" in capsys.readouterr().out


def test_a_training_by_hand_is_read_from_its_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path / "out" / "checkpoint-20", None, [{"loss": 3.0}, {"loss": 2.5}])
    assert main(["status", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().out
    assert "progress: 20 of 20 (100 %), as of its last checkpoint" in shown
    assert "started without umed-run, or without --umed_stage" in shown


def test_a_training_that_went_on_behind_its_end_is_not_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path / "out", None, [{"loss": 3.0}])
    assert main(["status", str(tmp_path / "out")]) == 0
    write_log(tmp_path / "out" / "checkpoint-30", None, [{"loss": 3.0}, {"loss": 2.5}, {"loss": 2.0}])
    assert main(["status", str(tmp_path / "out")]) == 1
    assert "progress: 30 of 30 (100 %), as of its last checkpoint" in capsys.readouterr().out


def test_what_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "holds no run" in said.err and said.out == ""
    assert main(["status", str(tmp_path / "nowhere")]) == 1 and "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100%|###| 10/10 [00:02<00:00,  4.00it/s]\n", (10, 10, 0.25)),
        ("umed: answering: question 12 of 130 (9 %), 1.5 s per question, 2 min left\n", (12, 130, 1.5)),
        ("umed: answering: question 12 of 130 (9 %)\n", (12, 130, None)),
        ("umed-run a\n 5/9 [00:01<00:01, 1.00it/s]\numed-run a\n 1/9 [00:01<00:08, 2.00it/s]\n", (1, 9, 0.5)),
        ("Loading checkpoint\n", None),
    ],
)
def test_progress_of_a_log(text: str, expected: Any, tmp_path: Path) -> None:
    found = read_progress(with_log(tmp_path, text))
    assert (None if found is None else (found.done, found.total, found.seconds)) == expected


def test_transformers_5_prints_rows_of_strings(tmp_path: Path) -> None:
    found = read_progress(with_log(tmp_path, BAR + "{'loss': '0.5', 'epoch': '1'}\n{'train_loss': '0.1'}\n"))
    assert found is not None and found.row == {"loss": 0.5, "epoch": 1.0}


def test_a_loss_that_is_no_number_any_more_is_read() -> None:
    assert str(last_row("{'loss': nan, 'kl': inf, 'epoch': 1.0}\n")) == "{'loss': nan, 'kl': inf, 'epoch': 1.0}"
