"""Benchmarks that have no other test run at a small size and check their two sides against each other. Timings are not tested."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.umed_runs import ROOT, environment, run_command

pytestmark = [pytest.mark.llava, pytest.mark.run]


def run(script: str, *arguments: str, **keywords: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return run_command(command, env=environment(), forks_too=True, timeout=300, **keywords)


@pytest.mark.one_stack
def test_images_of_every_format_are_read_by_every_side(tmp_path):
    """The benchmark itself compares the sides' tensors. Small images are no test of speed, which it ends with 1 for."""
    done = run(
        *["images.py", "--images", "2", "--side", "64", "--slices", "3", "--turns", "1", "--json"],
        str(tmp_path / "images.json"),
    )
    assert done.returncode == 0 or "not as fast as asked for" in done.stderr, done.stderr[-3000:]
    figures = json.loads((tmp_path / "images.json").read_text())
    assert figures.pop("peak_mb") > 0
    assert set(figures) == {"jpeg", "png16", "dicom", "dicom-rle", "dicom-j2k", "nii.gz"}
    assert all(figure["spread"] < 0.02 for figure in figures.values()), "the sides' tensors differ"


@pytest.mark.one_stack
def test_a_bomb_takes_less_memory_than_allowed(tmp_path):
    names = ["PNG, 16 megapixels of 16 bits", "GIF of 65,535 x 65,535 named .png"]
    # What a forked process shares with its parent would count as its own memory.
    done = run("bombs.py", "--json", str(tmp_path / "bombs.json"), "--only", *names, fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    image, bomb = json.loads((tmp_path / "bombs.json").read_text())
    assert [image["bomb"], bomb["bomb"]] == names
    assert image["result"] == "shown, 1 slices" and 32 < image["above_idle_mb"] < 200, "16 megapixels of 2 bytes"
    assert bomb["result"].startswith("422: ") and bomb["above_idle_mb"] < 32


@pytest.mark.one_stack
def test_answers_with_and_without_sharing_are_compared():
    done = run(
        *[
            "evaluating.py",
            "--images",
            "1",
            "--questions",
            "2",
            "--batch-size",
            "2",
            "--max-new-tokens",
            "2",
            "--repetitions",
            "1",
        ]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["answers"] == figures["equal_answers"] == 2


def test_every_row_of_the_real_size_runs_on_a_small_checkpoint(tmp_path):
    pytest.importorskip("transformers", minversion="5.0", reason="the benchmark is for today's libraries")
    from umed_plugin.commands.demo.tiny_checkpoint import DEFAULT_CORPUS, train_sentencepiece

    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(train_sentencepiece(DEFAULT_CORPUS))
    done = run("real_size.py", str(tmp_path / "size"), "--tokenizer", str(tokenizer), "--small", "--threads", "1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "size" / "rows.json").read_text())
    assert len(rows) == 11
    assert all(row["own_gb"] > 0 and row["seconds"] > 0 for row in rows.values())
    assert done.stdout.count("\n| ") == 12


@pytest.mark.one_stack
def test_ranks_and_one_process_write_the_same_evaluation():
    done = run("shared_evaluation.py", "--records", "8", "--max-new-tokens", "2", "--repetitions", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["same_files"] is True


@pytest.mark.one_stack
def test_records_are_the_same_in_memory_and_by_index(tmp_path):
    """The benchmark itself compares the batches and lengths of its ways."""
    done = run("records.py", "--records", "300", "--json", str(tmp_path / "records.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "records.json").read_text())
    assert list(figures) == ["whole list in memory", "first start", "next start"]
    assert all(figure["words"] > 300 * 20 and len(figure["ids"]) == 16 for figure in figures.values())


@pytest.mark.one_stack
def test_builds_with_and_without_a_pool_are_compared(tmp_path):
    """The benchmark itself compares what was written."""
    done = run(
        *["building.py", "--images", "3", "--side", "32", "--workers", "1,2", "--json", str(tmp_path / "building.json")]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "building.json").read_text())
    assert list(figures) == ["first build, 1 processes", "first build, 2 processes", "second build"]
