"""Images are read by several processes, in shards, and only once: the records are those of one process that reads all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.drawn import BOX, scene, write_dicom, write_png, write_png16, write_recipe
from support.umed_runs import environment
from support.waiting import has_ended

from umed_plugin import cli
from umed_plugin.commands.recipe import sharing
from umed_plugin.data import reading
from umed_plugin.data.build import build_records
from umed_plugin.data.reading import kept, looks
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError
from umed_plugin.files.locks import locked

COLUMNS = "{file: file, box: [x1, y1, x2, y2], lesion: lesion, slice: slice}"
CSV = f"{{reader: csv, files: a.csv, columns: {COLUMNS}}}"
KEPT = ".umed_checked.jsonl"

pytestmark = pytest.mark.llava


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images: two that LLaVA reads, two that are rendered, one damaged. All are older than the clock's doubt."""
    write_png(tmp_path / "a.png", scene())
    write_png(tmp_path / "b.png", scene()[::-1].copy())
    write_png16(tmp_path / "c.png", scene())
    write_dicom(tmp_path / "d.dcm", scene())
    (tmp_path / "e.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    names = ("a.png", "b.png", "c.png", "d.dcm", "e.png")
    rows = [",".join(map(str, (name, *BOX, "nod", ""))) for name in names]
    (tmp_path / "a.csv").write_text("\n".join(["file,x1,y1,x2,y2,lesion,slice", *rows]))
    write_recipe(tmp_path, CSV)
    for name in names:
        age(tmp_path / name)
    return tmp_path


def age(file: Path, seconds: float = 100.0) -> None:
    then = time.time() - seconds
    os.utime(file, (then, then))


def recipe_of(folder: Path) -> Any:
    return load_recipe(write_recipe(folder, CSV))


def build(folder: Path, out: str, **options: Any) -> list[dict[str, Any]]:
    return build_records(recipe_of(folder), out_dir=folder / out, on_bad_image="skip", **options)


def content(folder: Path) -> dict[str, bytes]:
    """Every file that a build wrote, but for what it keeps for itself."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that this process reads."""
    names: list[str] = []

    def noted(request: looks.Request, evaluated: Any) -> looks.Dated:
        names.append(Path(request.path).name)
        return looks.look(request, evaluated)

    monkeypatch.setattr(reading, "look", noted)
    return names


def test_two_processes_build_what_one_builds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = build(folder, "one", workers=1)
    told = capsys.readouterr().err
    assert build(folder, "two", workers=2) == one and len(one) == 4
    assert capsys.readouterr().err == told and "e.png" in told
    assert content(folder / "two") == content(folder / "one") and len(content(folder / "one")) == 2
    with pytest.raises(UmedError, match=r"1 fault\n.*e\.png"):
        build_records(recipe_of(folder), out_dir=folder / "three", workers=2)


def test_only_what_has_changed_is_read_again(folder: Path, read: list[str]) -> None:
    first = build(folder, "out")
    assert len(read) == 5
    read.clear()
    assert build(folder, "out") == first
    assert read == ["e.png"], "what cannot be read is tried again"
    read.clear()
    write_png(folder / "b.png", scene())
    age(folder / "b.png", 50)
    (folder / "out" / "images" / "drawn" / "c.png.png").unlink()
    (folder / "out" / "images" / "drawn" / "d.dcm.png").write_bytes(b"other")
    assert build(folder, "out") == first
    assert read == ["b.png", "c.png", "d.dcm", "e.png"]


def test_another_window_and_other_evaluation_sets_are_noticed(folder: Path, read: list[str]) -> None:
    build(folder, "out")
    before = content(folder / "out")
    read.clear()
    windowed = load_recipe(write_recipe(folder, CSV, extra="image: {window: {low: 0, high: 50}}\n"))
    build_records(windowed, out_dir=folder / "out", on_bad_image="skip")
    assert {"c.png", "d.dcm"} <= set(read) and content(folder / "out") != before
    (folder / "evaluated").mkdir()
    other = np.random.default_rng(0).integers(0, 255, scene().shape, dtype=np.uint8)
    for file in (folder / "b.png", folder / "evaluated" / "z.png"):
        write_png(file, other)
        age(file)
    for number in range(2):
        read.clear()
        records = build(folder, "out", against=[folder / "evaluated"])
        assert [record["id"] for record in records] == ["drawn/a.png", "drawn/c.png", "drawn/d.dcm"]
        assert len(read) == (5, 1)[number]
    assert len(build(folder, "out")) == 4, "without the evaluation set b.png is read again"


def test_a_file_that_may_still_change_is_not_kept(folder: Path, read: list[str]) -> None:
    os.utime(folder / "a.png")
    build(folder, "out")
    read.clear()
    build(folder, "out")
    assert read == ["a.png", "e.png"]


@pytest.mark.parametrize("harm", ["cut", "bit", "foreign", "gone", "folder"])
def test_a_damaged_file_of_what_was_seen_costs_time_and_nothing_else(folder: Path, read: list[str], harm: str) -> None:
    first = build(folder, "out")
    file = folder / "out" / KEPT
    data = file.read_bytes()
    if harm == "cut":
        file.write_bytes(data[:-40])
    elif harm == "bit":
        file.write_bytes(data.replace(b"true", b"tru3").replace(b"[true", b"[fals"))
    elif harm == "foreign":
        file.write_text('{"key": 1}\n\n[]\nnothing\n00000000 {}\n')
    else:
        file.unlink()
        if harm == "folder":
            file.mkdir()
    read.clear()
    assert build(folder, "out") == first
    assert 1 < len(read) <= 5
    read.clear()
    assert build(folder, "out") == first and (harm == "folder" or read == ["e.png"])


def test_what_was_superseded_or_damaged_leaves_the_file(folder: Path) -> None:
    build(folder, "out")
    file = folder / "out" / KEPT
    whole = sorted(file.read_bytes().split(b"\n"))
    file.write_bytes(file.read_bytes() * 2 + b"half a li")
    build(folder, "out")
    assert sorted(file.read_bytes().split(b"\n"))[1:] == [line for line in whole if line]


def test_an_interrupted_build_goes_on_where_it_was(
    folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    whole = reading.look

    def killed_at_third(request: looks.Request, evaluated: Any) -> looks.Dated:
        if request.path.endswith("c.png"):
            raise Killed
        return whole(request, evaluated)

    with monkeypatch.context() as patched:
        patched.setattr(reading, "look", killed_at_third)
        with pytest.raises(Killed):
            build(folder, "out")
    read.clear()
    build(folder, "out")
    assert read == ["c.png", "d.dcm", "e.png"]


def test_shards_are_joined_to_what_one_process_builds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(recipe_of(folder).path)

    def run(out: str, *flags: str) -> int:
        where = ("--out", str(folder / out / "t[1].json"), "--data-root", str(folder))
        return cli.main(["recipe", "build", recipe, *where, "--on-bad-image", "skip", "--quiet", *flags])

    assert run("one") == 0
    assert run("two", "--join") == 2 and "no shard has been read" in capsys.readouterr().err
    assert run("two", "--shard", "2/2") == 0
    assert "Still to be read: 1/2" in capsys.readouterr().out and not (folder / "two" / "t[1].json").exists()
    assert run("two", "--join") == 2 and "shards 1/2 have not been read" in capsys.readouterr().err
    assert run("two", "--shard", "1/2") == 0, "the last one joins"
    assert content(folder / "two") == content(folder / "one")
    assert sorted(file.name for file in (folder / "two").glob(".*")) == [KEPT], "the shards' own files are joined"
    assert run("two", "--shard", "3/2") == 2 and "must be I/N" in capsys.readouterr().err
    assert run("two", "--workers", "0") == 2 and "at least 1" in capsys.readouterr().err


def test_a_join_that_fails_can_be_repeated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "out" / "t.json"
    flags = ("--out", str(out), "--data-root", str(folder), "--on-bad-image", "skip", "--quiet")
    command = ["recipe", "build", str(recipe_of(folder).path), *flags]

    def full(*_: object) -> None:
        raise UmedError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("umed_plugin.data.records.save_records", full)
        assert [cli.main([*command, "--shard", shard]) for shard in ("1/2", "2/2")] == [0, 1]
        assert [cli.main([*command, "--shard", "2/2"]), cli.main([*command, "--join"])] == [1, 1]
    assert "no space left" in capsys.readouterr().err and not out.exists()
    assert sorted(file.name for file in out.parent.glob(".t.json*")) == [
        ".t.json.shard-1-of-2",
        ".t.json.shard-2-of-2",
    ]
    assert cli.main([*command, "--join"]) == 0 and len(json.loads(out.read_text())) == 4
    assert [file.name for file in out.parent.glob(".t.json*")] == []


def test_of_two_shards_that_end_at_the_same_time_one_joins(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "out" / "t.json"
    flags = ("--out", str(out), "--data-root", str(folder), "--on-bad-image", "skip", "--quiet")
    command = ["recipe", "build", str(recipe_of(folder).path), *flags]
    assert cli.main([*command, "--shard", "1/2"]) == 0
    with locked(out):  # as by the other one, which has seen all marks
        assert cli.main([*command, "--shard", "2/2"]) == 0
        assert cli.main([*command, "--join"]) == 1
    assert "Another shard, which ended at the same time, writes" in capsys.readouterr().out and not out.exists()
    assert cli.main([*command, "--join"]) == 0, "if the other one fails, the marks are there"
    # The other one has joined, and removed the marks, before this one looked for them.
    seen = sharing._missing
    monkeypatch.setattr(sharing, "_missing", lambda args, count: sharing.remove_marks(args) or seen(args, count))
    assert cli.main([*command, "--shard", "2/2"]) == 0
    assert "Another shard, which ended at the same time, writes" in capsys.readouterr().out


def test_two_sentences_of_a_slice_in_two_windows_are_two_pictures(folder: Path) -> None:
    """Two processes would write one file at once, since neither sees that of the other."""
    rows = [
        ("c.png", "Dark area.", "-1000,0"),
        ("c.png", "Bright area.", "0,1000"),
        ("d.dcm", "One.", "0,1000"),
        ("d.dcm", "Two.", "0,1000"),
    ]
    lines = [f'{name},{",".join(map(str, BOX))},nod,{text},"{window}"' for name, text, window in rows]
    (folder / "a.csv").write_text("\n".join(["file,x1,y1,x2,y2,lesion,text,window", *lines]))
    columns = "{file: file, box: [x1, y1, x2, y2], lesion: lesion, window: window}"
    annotations = f"{{reader: csv, files: a.csv, phrase: text, columns: {columns}}}"
    recipe = load_recipe(write_recipe(folder, annotations, extra="image: {window: column}\n"))
    records = build_records(recipe, out_dir=folder / "one", workers=1)
    names = [record["image"] for record in records]
    assert len(set(names[:2])) == 2 and all(name.startswith("images/drawn/c.png-") for name in names[:2])
    assert names[2:] == ["images/drawn/d.dcm.png"] * 2, "one picture has one file, and its plain name"
    assert build_records(recipe, out_dir=folder / "one", workers=1) == records, "nothing is read again"
    assert build_records(recipe, out_dir=folder / "two", workers=2) == records
    command = ["recipe", "build", str(recipe.path), "--data-root", str(folder), "--quiet"]
    for shard in ("2/2", "1/2"):
        assert cli.main([*command, "--out", str(folder / "three" / "t.json"), "--shard", shard]) == 0
    assert json.loads((folder / "three" / "t.json").read_text()) == records
    for out in ("two", "three"):
        written = {name: data for name, data in content(folder / out).items() if name != "t.json"}
        assert written == content(folder / "one") and len(written) == 3


def test_a_shard_stops_at_images_that_cannot_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--out", str(folder / "out" / "t.json"), "--data-root", str(folder), "--shard", "1/2")
    assert cli.main(["recipe", "build", str(recipe_of(folder).path), *where]) == 1
    error = capsys.readouterr().err
    assert "shard 1/2: 1 of 3 images cannot be read" in error and "e.png" in error
    assert sorted(file.name for file in (folder / "out").iterdir()) == [".umed_checked.shard-1-of-2.jsonl", "images"]


def test_a_process_that_is_ended_from_outside_is_one_error(tmp_path: Path) -> None:
    from umed_plugin.data.reading import pool

    with pytest.raises(UmedError, match="ended from outside while it read .*little memory.*--workers 1"):
        list(pool.in_processes(end_oneself, [looks.Request("a.png"), looks.Request("b.png")], None, 2))


def end_oneself(part: Any, shared: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_processes_end_with_their_parent(tmp_path: Path, number: int) -> None:
    code = (
        "from pathlib import Path; from umed_plugin.commands import signals; from umed_plugin.data.reading import pool;"
        "from support.waiting import wait_long\n"
        f"with signals.raised(): list(pool.in_processes(wait_long, range(16), Path({str(tmp_path)!r}), 2))"
    )
    tests = str(Path(__file__).parents[1])
    env = {**environment(), "PYTHONPATH": f"{tests}{os.pathsep}{environment().get('PYTHONPATH', '')}"}
    parent = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, start_new_session=True)
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    parent.send_signal(number)
    parent.communicate(timeout=30)
    until(lambda: all(has_ended(int(file.name)) for file in tmp_path.iterdir()))


def until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_lines_of_another_format_are_not_used(folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder, "out")
    read.clear()
    monkeypatch.setattr(kept, "_FORMAT", "looks-0")
    build(folder, "out")
    assert len(read) == 5
    assert all(json.loads(line[9:])["path"] for line in (folder / "out" / KEPT).read_bytes().split(b"\n") if line)
