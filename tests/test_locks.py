"""One run at a time for a file or folder: the second is refused by name and number, and no lock outlives its process."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.umed_runs import environment

from umed_plugin import cli
from umed_plugin.errors import UmedError
from umed_plugin.files import locks

# Holds a lock until it is killed; with a second argument a forked child of it lives on.
HOLDER = """
import os, sys, time
from umed_plugin.files.locks import lock_for_the_process, locked
options = eval(sys.argv[2])
with locked(sys.argv[1], **options):
    forked, tell = os.pipe()
    child = os.fork() if len(sys.argv) > 3 else None
    if child == 0:
        os.write(tell, b"x")  # it runs, and so has given up what it got from its parent
    else:
        child and os.read(forked, 1)
        print("ready", child, flush=True)
    time.sleep(100)
"""


def holder(target: Path, *more: str, **options: object) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-c", HOLDER, str(target), repr(options), *more]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    word, child = process.stdout.readline().split()
    assert word == "ready"
    return process, child


@pytest.mark.parametrize("inside", [True, False])
def test_the_second_is_refused_by_the_firsts_number_and_a_killed_ones_lock_is_free(inside, tmp_path):
    target = tmp_path / "out"
    process, child = holder(target, "fork", inside=inside)
    with pytest.raises(UmedError) as refused, locks.locked(target, inside=inside):
        pass
    told = str(refused.value)
    assert told.startswith(f"{target}: another process is writing it (process {process.pid})") and "\n" not in told
    process.kill()
    process.wait()
    os.kill(int(child), 0)  # what it has forked lives on, without the lock
    with locks.locked(target, inside=inside):
        pass
    os.kill(int(child), signal.SIGKILL)
    assert not list(tmp_path.iterdir()) or not list(target.iterdir())


def test_shared_locks_stand_side_by_side_and_keep_the_whole_out(tmp_path):
    first, _ = holder(tmp_path, inside=True, shared=True)
    with (
        locks.locked(tmp_path, inside=True, shared=True),
        pytest.raises(UmedError, match="another process"),
        locks.locked(tmp_path, inside=True),
    ):
        pass
    with pytest.raises(UmedError, match="another process"), locks.locked(tmp_path, inside=True):
        pass  # the one that has ended has not removed the other's file
    first.kill()
    first.wait()
    with locks.locked(tmp_path, inside=True):
        pass
    assert not list(tmp_path.iterdir())


def test_all_folders_that_a_lock_has_made_go_with_it_when_they_are_empty(tmp_path):
    with locks.locked(tmp_path / "a" / "b" / "out", inside=True):
        assert (tmp_path / "a" / "b" / "out").is_dir()
    assert not list(tmp_path.iterdir())
    with locks.locked(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "kept").touch()
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["kept"]


def test_a_lock_for_the_process_is_taken_once_and_ends_with_it(tmp_path):
    code = "import sys; from umed_plugin.files.locks import lock_for_the_process as hold\n"
    code += "[hold(sys.argv[1], 'busy', '--out') for _ in range(2)]"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], env=environment(), check=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "way", ["locked(target, inside=True)", "nullcontext(lock_for_the_process(target, 'busy', '--out'))"]
)
def test_a_child_that_ends_leaves_lock_and_folder_to_its_parent(way, tmp_path):
    """As a data loader's worker does, before the first file is written."""
    code = f"""
import gc, os, sys
from contextlib import nullcontext
from umed_plugin.files.locks import lock_for_the_process, locked
target = sys.argv[1]
with {way}:
    child = os.fork()
    if child == 0:
        gc.collect()
    else:
        os.waitpid(child, 0)
        print(os.listdir(target), flush=True)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (run.stdout.split(), run.stderr, run.returncode) == (["['.lock']"], "", 0)
    assert not (tmp_path / "out").exists(), "nothing was written to it"


def test_a_file_system_without_locks_is_said_and_not_fatal(tmp_path, monkeypatch, capsys):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    with locks.locked(tmp_path / "out"):
        pass
    assert "its file system has no locks (No locks available)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# The words of a command -> what it writes, and how that is locked. OUT is that folder.
COMMANDS = {
    "recipe build demo_studies --data-root D --out OUT/train.json": ("train.json", {}),
    "evaluate CKPT --benchmark R --out OUT": ("", {"inside": True}),
    "evaluate CKPT --benchmark R --out OUT --shard 2/3": ("predictions.shard-2-of-3", {}),
    "evaluate CKPT --benchmark R --out OUT --shard 1/3": ("", {"inside": True}),
    "demo --out OUT": ("", {"inside": True}),
    "report OUT": ("report.html", {}),
    "merge LORA --out OUT/merged": ("merged", {}),
    "convert CKPT --out OUT/hf": ("hf", {}),
    "doctor OUT --fix": ("config.json", {}),
}


@pytest.mark.llava
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_does_not_write_what_another_writes(command, tiny_mistral, tmp_path, capsys):
    from support.records import evaluated_records
    from support.taught import write_lora

    (tmp_path / "data").mkdir()
    records = tmp_path / "data" / "records.json"
    records.write_text(json.dumps(evaluated_records(tmp_path / "data", 2)))
    out = tmp_path / "out"
    out.mkdir()
    (out / "trainer_state.json").write_text('{"log_history": [], "global_step": 1, "max_steps": 2}')
    if command.startswith("doctor"):  # something that it fixes
        shutil.copytree(tiny_mistral, out, dirs_exist_ok=True)
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "/no/such/tower"}))
    name, options = COMMANDS[command]
    lora = write_lora(tiny_mistral, tmp_path / "llava-lora") if "LORA" in command else ""
    words = {
        "LORA": str(lora),
        "OUT": str(out),
        "CKPT": str(tiny_mistral),
        "R": str(records),
        "D": str(tmp_path / "data"),
    }
    argv = [words.get(word, word.replace("OUT", str(out))) for word in command.split()]
    process, _ = holder(out / name if name else out, **options)
    before = sorted(out.iterdir())
    assert cli.main(argv) == 1
    lines = capsys.readouterr().err.splitlines()
    # transformers 5 shows how far it has loaded weights.
    told = [
        line for line in lines if line and not line.startswith("Loading weights:") and not line.endswith(": started")
    ]
    process.kill()
    process.wait()
    assert len(told) == 1 and f"(process {process.pid})" in told[0] and str(out / name) in told[0], told
    assert sorted(out.iterdir()) == before


@pytest.mark.llava
@pytest.mark.run
def test_a_training_does_not_write_into_anothers_folder(tiny_llama, tmp_path):
    from support.records import write_records
    from support.umed_runs import train

    records, out = write_records(tmp_path / "data"), tmp_path / "out"
    process, _ = holder(out, inside=True)
    done = train(tiny_llama, records, out, "--max_steps", "1")
    process.kill()
    process.wait()
    assert done.returncode == 1
    assert f"{out}: another training is writing it (process {process.pid})" in done.stderr
    assert "choose another --output_dir" in done.stderr and "Traceback" not in done.stderr
    assert [file.name for file in out.iterdir()] == [".lock"]
    assert train(tiny_llama, records, out, "--max_steps", "1").returncode == 0
    assert not (out / ".lock").exists() and (out / "trainer_state.json").is_file()
