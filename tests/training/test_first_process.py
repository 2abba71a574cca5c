"""What one process does for all: the others wait without a time limit, hear of it, and fail with its message."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from support.umed_runs import environment

from umed_plugin.training.first_process import first_process_does

CODE = """
import os, sys, time
import torch.distributed as dist
from datetime import timedelta
from umed_plugin.errors import UmedError
from umed_plugin.training import first_process

rank, folder = int(sys.argv[1]), sys.argv[2]
store = dist.TCPStore("localhost", int(sys.argv[3]), 2, rank == 0, timeout=timedelta(seconds=100))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=100))
first_process.SECONDS, first_process._POLL = 0.5, 0.05

def leave(name):
    open(f"{folder}/{name}", "w").close()

def wait_for(name):
    end = time.monotonic() + 100
    while not os.path.exists(f"{folder}/{name}"):
        assert time.monotonic() < end, f"the other process did not leave {name!r}"
        time.sleep(0.05)

note = first_process.note
def told(text):
    note(text)
    leave("told")
first_process.note = told

def work():
    wait_for("told")
    open(folder + "/built", "w").close()

def fail():
    raise UmedError("image a.png is damaged")

first_process.first_process_does(work, "build the records")
open(folder + "/built").close()
try:
    first_process.first_process_does(fail, "check them")
except UmedError as error:
    print(error)
    if rank == 0:
        wait_for("heard")  # the store lives in this process
    leave("heard")
"""


@pytest.mark.run
def test_the_others_wait_and_share_the_outcome(tmp_path):
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port = str(listening.getsockname()[1])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(rank), str(tmp_path), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for rank in range(2)
    ]
    (first, first_errors), (other, other_errors) = (process.communicate(timeout=300) for process in running)
    assert first.splitlines() == ["image a.png is damaged"], first_errors
    waited, failed = other.splitlines()[0], other.splitlines()[-1]
    assert waited.startswith("umed: waiting for the first process to build the records, for "), other_errors
    assert failed == "the first process could not check them: image a.png is damaged"


def test_a_single_process_does_it_itself():
    done = []
    first_process_does(lambda: done.append(1), "build the records")
    assert done == [1]
