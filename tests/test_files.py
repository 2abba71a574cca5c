"""Files appear whole or not at all, whatever stops the process that writes them."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from umed_plugin import files
from umed_plugin.errors import UmedError
from umed_plugin.files import locks


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


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    old, young = tmp_path / "a.json.0123abcd.partial", tmp_path / "a.json.4567abcd.partial"
    for left in (old, young):
        left.touch()
    os.utime(old, (0, 0))
    files.write_json(tmp_path / "a.json", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", young.name], (
        "another rank may still write its own"
    )


def test_a_name_that_is_not_utf_8_is_written_in_escapes(tmp_path: Path) -> None:
    value = {"image": os.fsdecode(b"scan-\xff.png"), "note": "größe"}
    files.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value


@pytest.mark.parametrize(("number", "tolerated"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.ENOSPC, False)])
def test_a_file_system_that_cannot_flush_is_no_error_and_a_full_disk_is(
    number: int, tolerated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if tolerated:
        files.write_text(tmp_path / "a.txt", "a")
        assert (tmp_path / "a.txt").read_text() == "a"
    else:
        with pytest.raises(OSError, match="No space left"):
            files.write_text(tmp_path / "a.txt", "a")
        assert not list(tmp_path.iterdir())


def test_a_folder_may_hold_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    with files.replacing_folder(tmp_path / "model") as folder:
        (folder / "link").symlink_to("nowhere")
    assert (tmp_path / "model" / "link").is_symlink()


HOLDER = """
import sys, time
from umed_plugin import files
with files.replacing_folder(sys.argv[1]) as folder:
    (folder / "a").write_text("first")
    print("ready", flush=True)
    sys.stdin.readline()
"""


def holder(target: Path) -> subprocess.Popen:
    """A process that is writing ``target``, until a line is written to it."""
    code = [sys.executable, "-c", HOLDER, str(target)]
    process = subprocess.Popen(
        code, cwd=Path(files.__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_folder_has_one_writer_and_a_killed_ones_lock_ends_with_it(tmp_path: Path) -> None:
    target = tmp_path / "model"
    first = holder(target)
    with pytest.raises(UmedError, match="another process is writing it"), files.replacing_folder(target):
        pass
    with pytest.raises(UmedError, match="another process is writing it"), locks.locked(target):
        pass
    first.kill()
    first.wait()
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")], "it was killed within"
    with files.replacing_folder(target) as folder:
        (folder / "a").write_text("second")
    assert (target / "a").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_appears_meanwhile_is_kept_and_so_is_the_result(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with (
        pytest.raises(UmedError, match="appeared while it was being written"),
        files.replacing_folder(target) as folder,
    ):
        (folder / "a").write_text("mine")
        target.mkdir()
        (target / "a").write_text("theirs")
    assert (target / "a").read_text() == "theirs"
    (kept,) = tmp_path.glob("model.finished-*")
    assert (kept / "a").read_text() == "mine"


@pytest.mark.parametrize("new_is_there", [True, False])
def test_a_writer_that_was_killed_between_its_renames_loses_nothing(new_is_there: bool, tmp_path: Path) -> None:
    target, old = tmp_path / "model", tmp_path / "model.old-0123abcd"
    for folder in [old, *([target] if new_is_there else [])]:
        folder.mkdir()
        (folder / "a").write_text(folder.name)
    with pytest.raises(ValueError, match="stop"), files.replacing_folder(target, overwrite=True):
        raise ValueError("stop")
    assert (target / "a").read_text() == ("model" if new_is_there else "model.old-0123abcd")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UmedError, match="cannot be written"), files.replacing_folder(tmp_path / "file" / "model"):
        pass


def test_a_full_disk_names_the_file(tmp_path):
    target = tmp_path / "records.json"
    with pytest.raises(OSError, match="No space left on device") as failed, files.replacing(target):
        raise OSError(28, "No space left on device")
    assert failed.value.filename == str(target) and list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_file_is_named_and_not_the_partial_file(tmp_path):
    with pytest.raises(OSError) as failed:
        files.write_text(tmp_path, "x")
    assert failed.value.filename == str(tmp_path) and "partial" not in str(failed.value)


def test_lines_of_json_hold_every_name_and_follow_a_line_that_was_cut_off(tmp_path: Path) -> None:
    target, odd = tmp_path / "answers.jsonl", os.fsdecode(b"caf\xe9.png")
    files.append_json_lines(target, [{"image": odd}, {"answer": "größe"}])
    assert target.read_bytes() == b'{"image": "caf\\udce9.png"}\n' + '{"answer": "größe"}\n'.encode()
    with target.open("ab") as stream:
        stream.write(b'{"answ')
    files.append_json_lines(target, [1, "a\u2028b"])
    lines = target.read_bytes().decode().split("\n")
    assert lines[2:] == ['{"answ', "1", '"a\u2028b"', ""] and json.loads(lines[0]) == {"image": odd}
    files.write_json_lines(target, [{"image": odd}])
    assert target.read_bytes() == files.json_lines([{"image": odd}])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_lines_that_do_not_fit_on_the_disk_name_their_file() -> None:
    with pytest.raises(OSError, match="No space left on device") as failed:
        files.append_json_lines("/dev/full", [1])
    assert failed.value.filename == "/dev/full"


def test_what_libraries_say_of_a_full_disk_is_told_from_their_other_errors() -> None:
    """safetensors and torch.save raise exceptions of their own; one may be the cause of another."""
    rust = Exception(
        "Error while serializing: IoError(Os { code: 28 }) I/O error: No space left on device (os error 28)"
    )
    assert files.failed_write(rust) == "writing a file: No space left on device"
    caused = ValueError("saving failed")
    caused.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded", "a.bin")
    assert files.failed_write(caused) == "a.bin: Disk quota exceeded"
    for other in (OSError(errno.ENOENT, "No such file", "a"), RuntimeError("PytorchStreamReader failed"), KeyError(28)):
        assert files.failed_write(other) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [("[" * 100_000, "is not JSON (it is nested too deeply)"), ("{", "is not JSON"), ("[]", "holds a list")],
)
def test_a_damaged_json_file_is_named(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "umed.json").write_text(content)
    with pytest.raises(UmedError, match=re.escape(f"{tmp_path / 'umed.json'}: {said}")):
        files.read_object(tmp_path / "umed.json")
