"""A real vLLM server for tests/engine/ and benchmarks: `umed rollout-server`, and its counters."""

from __future__ import annotations

import ctypes
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from support.umed_runs import environment

_PR_SET_PDEATHSIG = 1
START_SECONDS = 400  # on two busy cores; imports alone take half a minute


class Engine:
    """A server that runs.

    Attributes:
        url: its address.
        process: the command, which has become the server.
    """

    def __init__(self, process: subprocess.Popen, port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log
        self.url = f"http://127.0.0.1:{port}/v1"

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def counter(self, name: str) -> float:
        """The sum of a Prometheus counter such as ``prefix_cache_hits``."""
        return sum(
            map(float, re.findall(rf"^vllm:{name}_total{{[^}}]*}} (\S+)$", self.get("/metrics")[1], re.MULTILINE))
        )

    def wait(self) -> Engine:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                if self.get("/health")[0] == 200:
                    return self
            except OSError:
                time.sleep(1)
        raise AssertionError(f"no answer within {START_SECONDS} s: {self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        """``kill -9`` of the server and of its workers."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _end_with_parent() -> None:
    """Let the kernel kill the server if the tests are killed, also after it has become vLLM."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def engine(checkpoint: Path, python: str, folder: Path, *more: str) -> Iterator[Engine]:
    """`umed rollout-server CKPT` in a session of its own; ended with the block.

    Args:
        checkpoint: a LLaVA checkpoint.
        python: of the environment with vLLM.
        folder: for its log and the language model.
        more: further arguments.
    """
    port, log = free_port(), folder / "server.log"
    arguments: Sequence[str] = [
        *("rollout-server", str(checkpoint), "--python", python, "--port", str(port), "--dtype", "float32"),
        *("--kv-cache-gb", "1", "--language-model", str(folder / "language-model"), *more),
        *("--vllm", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "96"),
    ]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "umed_plugin.cli", *arguments],
            env={**environment(), "VLLM_ENGINE_ITERATION_TIMEOUT_S": "300"},
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 (it calls the kernel alone)
        )
    running = Engine(process, port, log)
    try:
        yield running.wait()
    finally:
        running.kill()
