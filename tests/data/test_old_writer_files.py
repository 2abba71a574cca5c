"""Ledgers, batch notes, records and decisions that an earlier version wrote (commit 6baa41d) are read by this one.

``tests/support/old/writer`` was written by that version against `writer_server`, in a folder whose recipe has ``data_root: .``:
four images with a lesion, one without. One reply was corrected, one image was set aside after three, and a run with ``--batch``
was killed while its first batch was open. The absolute paths of images were replaced by ``/data``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.batch_server import BatchServer, batch_server
from support.judge_server import judge_server
from support.umed_runs import ROOT
from support.writer_server import KEY, good, is_reflection

from umed_plugin import cli
from umed_plugin.data.records import Record, load_records

pytestmark = [pytest.mark.llava, pytest.mark.one_stack]  # images are read through MONAI, which needs torch

OLD = ROOT / "tests" / "support" / "old" / "writer"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old files, and the working directory."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("umed_plugin.remote.batch_api.POLL_SECONDS", 0.02)
    monkeypatch.chdir(shutil.copytree(OLD, tmp_path / "old"))
    return tmp_path / "old"


def build(url: str, out: str, *more: str) -> int:
    writer = ["--writer", "openai", "--model", "the-model", "--base-url", url]
    return cli.main(["recipe", "build", "recipe.yaml", "--out", f"out/{out}", *writer, *more])


def at_old_place(records: list[Record], folder: Path) -> list[Record]:
    """As the old build wrote them: it did not say that a patient is only a file's name."""
    for record in records:
        assert record["provenance"].pop("patient") == "file name"
    return [{**record, "image": record["image"].replace(str(folder), "/data")} for record in records]


def test_every_reply_in_an_old_ledger_is_found_and_gives_the_old_records(folder: Path) -> None:
    old, old_aside = load_records(OLD / "out" / "train.json"), load_records(OLD / "out" / "train.aside.json")
    with judge_server(good) as server:
        assert build(server.url, "train.json") == 0
    assert server.asked == []
    assert at_old_place(load_records(folder / "out" / "train.json"), folder) == old and len(old) == 4
    assert at_old_place(load_records(folder / "out" / "train.aside.json"), folder) == old_aside and len(old_aside) == 1


def test_an_old_dry_run_counts_what_an_old_ledger_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("http://127.0.0.1:9/v1", "train.json", "--dry-run", "--prices", "10,100") == 0
    printed = capsys.readouterr().out
    assert "4 images with lesions, of which 4 have all their replies" in printed
    assert "the mean of the replies in the ledger" in printed


def test_old_decisions_still_fit_the_texts_that_were_shown(folder: Path) -> None:
    with judge_server(good) as server:
        assert build(server.url, "train.json", "--decisions", "out/decisions.json") == 0
    records = load_records(folder / "out" / "train.json")
    assert [record["id"] for record in records] == ["drawn/0000.png", "drawn/0003.png", "drawn/0004.png"]
    assert records[0]["provenance"]["review"] == {"decision": "accept", "reviewers": ["A. B."]}


def test_old_records_and_those_set_aside_can_be_reviewed(folder: Path) -> None:
    for file in ("train.json", "train.aside.json"):
        path = folder / "out" / file
        path.write_text(path.read_text().replace("/data/", f"{folder}/"))
    assert cli.main(["recipe", "review", "out/train.json"]) == 0
    page = (folder / "out" / "train.review.html").read_text()
    assert "The text has 4 words; needed: 15 to 150." in page and "53a3433d4e326ba9" in page


def test_a_batch_that_an_old_run_left_open_is_collected_and_not_paid_again(folder: Path) -> None:
    with batch_server(good) as server:
        finish_old_batch(server, folder)
        assert build(server.url, "batched.json", "--batch") == 0
        assert len(server.batches) == 2 and len(server.asked) == 4  # the old batch, and one with the reflections
        assert all(is_reflection(asked) for asked in server.asked)
    assert len(load_records(folder / "out" / "batched.json")) == 5
    notes = (folder / "out" / "batched.ledger.batches.jsonl").read_text().splitlines()
    assert {"ended": "batch_0"} in [json.loads(line) for line in notes if line]


def finish_old_batch(server: BatchServer, folder: Path) -> None:
    """The batch that the killed run had sent, as the server has it when it has ended."""
    server.make_batch("file_0").update(status="completed", output_file_id="batch_0_output")
    server.files.update(file_0="", batch_0_output=(folder / "out" / "batch_0_output.jsonl").read_text())
