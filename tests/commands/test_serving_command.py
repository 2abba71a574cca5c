"""The command `umed serve` in a process of its own: how it ends, what it prints, and wrong flags."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.chat_client import Client
from support.speaking import SENTENCE
from support.umed_runs import environment

from umed_plugin import cli


@contextlib.contextmanager
def served(checkpoint: Path, temporary: Path, *more: str) -> Any:
    """Run `umed serve` in a separate process; yields it with its address."""
    command = [sys.executable, "-m", "umed_plugin.cli", "serve", str(checkpoint), "--port", "0", *more]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        seen = ""
        while not (found := re.search(r"http://([\d.]+):(\d+)/", seen)):
            line = process.stdout.readline()
            assert line, seen
            seen += line
        process.server_address = (found[1].replace("0.0.0.0", "127.0.0.1"), int(found[2]))
        process.began = seen
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_cleanly_and_tells_nothing_of_patients(
    speaking: Path, tmp_path: Path, dicom: Path, how: signal.Signals
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    odd = dicom.read_bytes().replace(b"-1000", b"Doe^J", 1)
    with served(speaking, temporary) as process:
        client = Client(process)
        study, held = client.upload(dicom)
        assert client.question(study)[-1]["answer"]["text"] == SENTENCE
        bad = client.begin()
        client.put(bad, "Doe.dcm", odd)
        status, said = client.open(bad)
        assert status == 422 and "Doe^J" not in str(said)
        (folder,) = temporary.glob("umed-serve-*")
        assert any(folder.rglob("*.dcm"))
        process.send_signal(how)
        printed = process.began + process.stdout.read()
        assert process.wait(30) == 0
    assert not folder.exists()
    assert "Doe" not in printed and "secret-7" not in printed and "Traceback" not in printed
    assert printed.splitlines()[-1] == "umed serve: stopping" and "umed: warning" not in printed


def test_ctrl_c_does_not_wait_for_a_long_answer_to_end(tiny_mistral: Path, tmp_path: Path, dicom: Path) -> None:
    with served(tiny_mistral, tmp_path, "--max-new-tokens", "800") as process:
        client = Client(process)
        study, _ = client.upload(dicom)
        # Browsers keep idle connections open.
        with socket.create_connection(process.server_address), client.listening(study) as lines:
            assert any("text" in line for line in lines)
            process.send_signal(signal.SIGINT)
            rest = list(lines)
            assert process.wait(20) == 0
    assert not any("answer" in line for line in rest), "the answer was stopped"


def test_an_address_beyond_this_machine_is_warned_of(tiny_mistral: Path, tmp_path: Path) -> None:
    with served(tiny_mistral, tmp_path, "--host", "0.0.0.0") as process:
        assert "umed: warning: 0.0.0.0 can be reached from other machines" in process.began
        assert Client(process).ask("GET", "/")[0] == 200
        assert Client(process).ask("GET", "/", Host="evil.example")[0] == 403


def test_two_checkpoints_are_served_by_one_command(
    speaking: Path, tiny_mistral: Path, tmp_path: Path, dicom: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(speaking, tmp_path, "--compare", str(tiny_mistral), "--max-new-tokens", "4") as process:
        client = Client(process)
        page = client.ask("GET", "/")[1].decode()
        # Both folders have one name: as much of their paths is shown as tells them apart.
        for checkpoint in (speaking, tiny_mistral):
            assert f'data-name="{checkpoint.parent.name}/{checkpoint.name}"' in page
        study, _ = client.upload(dicom)
        texts = [client.question(study, model=model)[-1]["answer"]["text"] for model in (0, 1)]
        assert SENTENCE.startswith(texts[0]) and texts[0] != texts[1]
    assert cli.main(["serve", str(speaking), "--compare", str(speaking)]) == 2
    assert "is the checkpoint that is served already" in capsys.readouterr().err


def test_a_port_that_is_taken(tiny_mistral: Path, server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(["serve", str(tiny_mistral), "--port", str(server.server_address[1])]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "cannot listen there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--port", "70000"], ["--upload-mb", "0"], ["--megapixels", "0"], ["--max-new-tokens", "-3"]]
)
def test_wrong_flags(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "anywhere", *wrong]) == 2
    assert wrong[0] in capsys.readouterr().err


_FREED = """
import ctypes
from umed_plugin.commands.serve.command import give_large_blocks_back

class Blocks(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "a", "b", "c", "d", "e")]

libc = ctypes.CDLL(None)
libc.mallinfo.restype, libc.malloc.restype, libc.free.argtypes = Blocks, ctypes.c_void_p, [ctypes.c_void_p]
if {given_back}:
    give_large_blocks_back()
libc.free(libc.malloc(16 << 20))  # glibc now counts blocks of this size among the small ones, unless told otherwise
before = libc.mallinfo().hblks
libc.malloc(16 << 20)
print(libc.mallinfo().hblks - before)
"""


@pytest.mark.parametrize("given_back", [True, False])
def test_memory_of_a_large_image_is_given_back(given_back: bool) -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo"):
        pytest.skip("only glibc keeps large blocks")
    code = _FREED.replace("{given_back}", str(given_back))
    said = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert said.stdout.split()[-1] == str(int(given_back))
