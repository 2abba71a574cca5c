"""Files appear whole or not at all, whatever stops the process that writes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from umed_plugin import files
from umed_plugin.errors import UmedError


def test_the_old_file_stays_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    files.write_json(target, {"old": "größe"})
    with pytest.raises(RuntimeError), files.replacing(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert json.loads(target.read_text(encoding="utf-8")) == {"old": "größe"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_content_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path: Path, monkeypatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def told_fsync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def told_replace(source: object, target: object) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", told_fsync)
    monkeypatch.setattr(os, "replace", told_replace)
    files.write_text(tmp_path / "a.txt", "a")
    assert events == ["file", "rename", "folder"]
    events.clear()
    with files.replacing_folder(tmp_path / "model") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_bytes(b"w")
    assert events.index("rename") > max(i for i, event in enumerate(events) if event == "file")
    events.clear()
    files.write_bytes(tmp_path / "cached", b"c", durable=False)
    assert events == ["rename"]


WRITER = """
import sys
from umed_plugin import files
for number in range(10_000):
    files.write_text(sys.argv[1], str(number % 10) * 200_000)
"""


def test_a_reader_sees_whole_files_and_kill_9_leaves_one(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(target)], cwd=Path(files.__file__).parents[1])]
    writers.append(subprocess.Popen(writers[0].args, cwd=Path(files.__file__).parents[1]))
    end = time.monotonic() + 20
    seen = 0
    while seen < 50 and time.monotonic() < end:
        if target.exists():
            text = target.read_text()
            assert len(text) == 200_000 and len(set(text)) == 1
            seen += 1
    for writer in writers:
        writer.kill()
        writer.wait()
    text = target.read_text()
    assert seen == 50 and len(text) == 200_000 and len(set(text)) == 1


def test_a_folder_replaces_another_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "of_a_killed_run").touch()
    with pytest.raises(UmedError, match="--overwrite"), files.replacing_folder(target):
        pass
    with files.replacing_folder(target, overwrite=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
