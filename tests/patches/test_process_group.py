"""Processes that end while a thread of gloo's waits for Python's lock, as happened once in some dozen training runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.llava  # images are read through MONAI, which needs torch

# The last that Python does before it takes itself down: a collective whose thread comes back while the lock is held.
SCRIPT = """
import atexit, sys, time
import torch.distributed as dist
from umed_plugin.patches.process_group import way_to_leave

def end():
    tensor = torch.ones(1000)
    dist.all_reduce(tensor, async_op=True)
    del tensor
    finished = time.perf_counter() + 1
    while time.perf_counter() < finished:
        pass
    leave()

import torch
dist.init_process_group("gloo")
dist.barrier()
leave = way_to_leave()
sys.setswitchinterval(1000)
atexit._clear()  # what others do at the exit gives the lock away, by chance
atexit.register(end)
"""


def test_a_process_ends_although_a_thread_still_holds_a_tensor(tmp_path):
    script = tmp_path / "ends.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **where, "RANK": rank, "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for process in processes:
            said = process.communicate(timeout=60)[1]
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()


def test_a_process_of_several_says_why_it_ends(tmp_path):
    """torch's own hook of a process group collects what ours prints, and would lose it with the exit status."""
    script = f"""
import torch.distributed as dist
from umed_plugin.errors import UsageError
from umed_plugin.patches.main_script import report_errors_plainly
report_errors_plainly()
dist.init_process_group("gloo", init_method="file://{tmp_path}/met", rank=0, world_size=1)
raise UsageError("--no_such_flag")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr.count("umed: error: --no_such_flag")) == (2, 1), run.stderr
