"""Texts of strangers never reach the terminal as they are: real commands in a real terminal, hostile names, ids and settings."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.records import evaluated_records
from support.speaking import teach
from support.umed_runs import environment

pytestmark = pytest.mark.one_stack
TITLE = "\x1b]0;owned\x07"
HOSTILE = f"{TITLE}\x1b[2J\u202eno"
# What rich and tqdm write for colours, the cursor and its visibility.
OURS = re.compile(rb"\x1b\[(\?25[hl]|[0-9;]*[mAKG]|1?K|2K)")

RECIPE = """
name: strange
description: "\\e]0;owned\\a\\e[2J"
terms: {licence: "CC0 \\e]0;owned\\a", url: "https://example.org"}
annotations:
  reader: csv
  files: boxes.csv
  columns: {file: file, box: [x1, y1, x2, y2], lesion: finding, patient: patient}
classes: {"\\e]0;owned\\a": {name: "cyst"}}
split: {by: patient, fractions: {train: 0.5, test: 0.5}}
"""


def in_terminal(*words: object, cwd: Path) -> tuple[int, bytes]:
    """The status of ``umed WORDS`` and the bytes that a terminal got."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "umed_plugin.cli", *map(str, words)]
    process = subprocess.Popen(
        command,
        env={**environment(), "TERM": "xterm-256color"},
        cwd=cwd,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    got = b""
    while True:
        try:
            part = os.read(controller, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        got += part
    os.close(controller)
    return process.wait(), got


def harmless(got: bytes) -> str:
    """What was written, without the sequences that our own tables and bars need; fails if there are others."""
    rest = OURS.sub(b"", got)
    assert b"\x1b" not in rest and b"\x07" not in rest and b"\x9b" not in rest, rest
    assert "\u202e".encode() not in rest
    return rest.decode()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four patients, one of whom has a hostile name, as have a file that is missing and a class."""
    rows = ["file,x1,y1,x2,y2,finding,patient"]
    for number in range(4):
        Image.new("L", (64, 64), 40 * number).save(tmp_path / f"{number}.png")
        patient = HOSTILE if number == 0 else f"p{number}"
        rows.append(f"{number}.png,{8 + number},9,30,31,{TITLE},{patient}")
    rows.append(f"gone{HOSTILE}.png,1,1,9,9,{TITLE},p9")
    rows.append(f"1.png,1,1,9,9,other{HOSTILE},p1")
    (tmp_path / "boxes.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "strange.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("command", ["check", "build", "show"])
def test_a_recipe_and_its_annotations(data: Path, command: str) -> None:
    more = {"check": ["--data-root", data], "build": ["--data-root", data, "--out", data / "records.json"], "show": []}
    _, got = in_terminal("recipe", command, data / "strange.yaml", *more[command], cwd=data)
    assert "owned" in harmless(got), "it is said what was found"


@pytest.mark.llava
def test_a_checkpoint_and_its_settings(tiny_mistral: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / tiny_mistral.name
    shutil.copytree(tiny_mistral, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"_name_or_path": HOSTILE, "mm_projector_type": HOSTILE, HOSTILE: HOSTILE}
    (checkpoint / "config.json").write_text(json.dumps(config))
    _, got = in_terminal("doctor", checkpoint, cwd=tmp_path)
    assert "owned" in harmless(got)


@pytest.mark.llava
def test_ids_questions_terms_and_answers_of_an_evaluation(tiny_mistral: Path, tmp_path: Path) -> None:
    taught = teach(tiny_mistral, tmp_path / "taught", f"At {TITLE} (1,")
    (tmp_path / "data").mkdir()
    records = evaluated_records(tmp_path / "data", 2)
    for number, record in enumerate(records):
        record |= {"id": f"{number}{HOSTILE}", "source": HOSTILE, "modality": HOSTILE, "patient": f"{number}{HOSTILE}"}
        record["terms"][f"k{TITLE}"] = ["nodule"]
        record["conversations"][0]["value"] = f"<image>\nWhat is {HOSTILE}?"
    (tmp_path / "data" / "records.json").write_text(json.dumps(records))
    out = tmp_path / f"out{HOSTILE}"
    flags = ("--benchmark", tmp_path / "data" / "records.json", "--max-new-tokens", 40, "--device", "cpu")
    status, got = in_terminal("evaluate", taught, *flags, "--out", out, cwd=tmp_path)
    assert status == 0, got
    assert "owned" in harmless(got)
    lines = (out / "predictions.jsonl").read_text().splitlines()
    assert "\x1b" in json.loads(lines[0])["answer"], "the file keeps what the checkpoint wrote"
