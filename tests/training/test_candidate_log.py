"""The table of candidates: its text, and a real run that reports to TensorBoard and W&B, where they are installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.records import grounded_records
from support.umed_runs import reward

from umed_plugin.training.candidate_log import CandidateLogStart, as_markdown, leave_out_from, log_candidates

RECORD = {"id": "study 1", "objects": {"ref": ["cyst"], "bbox": [[1, 2, 3, 4]]}}


def test_the_line_and_the_table(tmp_path):
    terms = {"localization": [0.5, 0.25], "vision_relevance": [None, 0.125]}
    for step in (0, 4):
        log_candidates(step, RECORD, ["a cyst\n| here", "none"], [1.5, 0.0], terms, tmp_path, [])
    lines = [json.loads(text) for text in (tmp_path / "candidates.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4]
    assert lines[0]["candidates"][1] == {"text": "none", "reward": 0.0, "localization": 0.25, "vision_relevance": 0.125}
    assert lines[0]["true"] == RECORD["objects"] and lines[0]["study"] == {}
    head, _, *table = as_markdown(lines[0]).splitlines()
    assert "study 1" in head and "cyst" in head
    assert table == [
        "| text | reward | localization | vision_relevance |",
        "| --- | --- | --- | --- |",
        "| a cyst \\| here | 1.500 | 0.500 |  |",
        "| none | 0.000 | 0.250 | 0.125 |",
    ]


def test_a_run_that_goes_on_leaves_out_the_steps_that_it_takes_again(tmp_path):
    file = tmp_path / "candidates.jsonl"
    for step in (0, 4, 8):
        log_candidates(step, RECORD, ["a\u2028b\n"], [1.5], {}, tmp_path, [])
    before = file.read_bytes()
    inode = file.stat().st_ino

    def begin(step, first=True):
        state = SimpleNamespace(global_step=step, is_world_process_zero=first)
        CandidateLogStart().on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), state, None)

    begin(9)
    begin(0, first=False)
    assert file.read_bytes() == before and file.stat().st_ino == inode, "nothing to leave out"
    begin(8)
    assert file.read_bytes() == b"".join(before.splitlines(keepends=True)[:2])
    with open(file, "ab") as stream:
        stream.write(b'{"step": 5, "id')  # as kill -9 leaves it
    begin(6)
    assert file.read_bytes() == b"".join(before.splitlines(keepends=True)[:2])
    begin(0)
    assert file.read_bytes() == b"" and [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_crash_leaves_the_old_log_or_the_new_one(tmp_path, monkeypatch):
    for step in (0, 4):
        log_candidates(step, RECORD, ["a"], [1.5], {}, tmp_path, [])
    file = tmp_path / "candidates.jsonl"
    before = file.read_bytes()

    def full(*unused):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError):
        leave_out_from(file, 4)
    assert file.read_bytes() == before


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_run_shows_figures_and_table_where_it_reports(package, tiny_mistral, tmp_path, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    records = grounded_records(tmp_path / "data")
    # Runs of the tests see the checkout and one folder more: the one that holds the package.
    (records.parent / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(Path(find_spec(package).origin).parent.parent)!r})\n"
    )
    more = ["--report_to", package, "--logging_dir", str(tmp_path / "logs"), "--max_steps", "3", "--save_steps", "9"]
    run = reward(tiny_mistral, records, tmp_path / "out", *more, "--umed_log_candidates", "2")
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(text) for text in (tmp_path / "out" / "candidates.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2]
    for study in (line["study"] for line in lines):
        assert Path(study["image"]).is_file() and Path(study["image"]).is_absolute()
        assert study["image_aspect_ratio"] == "pad" and study["question"] and "<image>" not in study["question"]
    if package == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"tensors": 0})
        events.Reload()
        assert [event.step for event in events.Scalars("train/reward/total")] == [1, 2, 3]
        assert "train/guard/length_ratio" in events.Tags()["scalars"]
        shown = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("candidates/text_summary")]
        assert shown == [as_markdown(line) for line in lines]
    else:
        tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/candidates_*.table.json"))
        found = [json.loads(table.read_text()) for table in tables]
        assert sorted(table["data"] for table in found) == sorted(
            [[line["id"], *row.values()] for row in line["candidates"]] for line in lines
        )
