"""Seconds of things that take turns with their ratios, and peak memory: what the benchmarks of stage 2 share.

A machine that works for others too stretches both sides of a turn, so the ratio of a turn says more than seconds do; processor
time leaves the others out, and with them what waiting costs.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Seconds = tuple[float, float]  # wall time, processor time


def now() -> Seconds:
    """Wall time and processor time of this process, from some beginning on."""
    return time.perf_counter(), time.process_time()


def since(start: Seconds) -> Seconds:
    """What has gone by since `now` said ``start``."""
    end = now()
    return end[0] - start[0], end[1] - start[1]


def seconds(run: Callable[[], Any]) -> Seconds:
    """What one call takes."""
    start = now()
    run()
    return since(start)


def add(*parts: Seconds) -> Seconds:
    """What several things take together."""
    return sum(wall for wall, _ in parts), sum(processor for _, processor in parts)


def ratios(slow: Sequence[Seconds], fast: Sequence[Seconds]) -> dict[str, Any]:
    """Medians over the turns of two sides: seconds of each, and the ratios of their wall and of their processor times."""
    wall, processor = ([a[clock] / b[clock] for a, b in zip(slow, fast)] for clock in (0, 1))
    return {
        "slow_s": statistics.median(a for a, _ in slow),
        "fast_s": statistics.median(b for b, _ in fast),
        "ratio": statistics.median(wall),
        "ratio_range": [min(wall), max(wall)],
        "processor_ratio": statistics.median(processor),
    }


def peak_bytes(run: Callable[[], Any]) -> int:
    """Peak memory of ``run`` above what this process has already, in a process of its own.

    To be called before anything has run on several threads, which a fork would not have.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_send_peak, args=(run, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit("measuring memory failed; see above.") from None
    finally:
        child.join()


def _send_peak(run: Callable[[], Any], sender: Any) -> None:
    # Freed tensors go back to the system at once, so that the peak is that of what was alive (malloc.h).
    libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3
    libc.mallopt(trim_threshold, 0)
    libc.mallopt(mmap_threshold, 65536)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    run()
    sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def stack(*more: str) -> str:
    """Versions of the libraries that the figures depend on."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", *more))
