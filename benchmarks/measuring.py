"""Shared by the benchmarks of stage 2: times of two sides that run in turns, their ratios, and peak memory.

On a machine with other load both sides of a turn slow down, so the ratio within a turn is more robust than seconds. Processor
time excludes other load, and also excludes the cost of waiting.
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

from machine import machine
from torch.utils._python_dispatch import TorchDispatchMode

Seconds = tuple[float, float]  # wall time, processor time


def now() -> Seconds:
    """Wall time and processor time of this process, from an arbitrary start."""
    return time.perf_counter(), time.process_time()


def since(start: Seconds) -> Seconds:
    """Time since `now` returned ``start``."""
    end = now()
    return end[0] - start[0], end[1] - start[1]


def seconds(run: Callable[[], Any]) -> Seconds:
    """Time of one call."""
    start = now()
    run()
    return since(start)


def add(*parts: Seconds) -> Seconds:
    """Sum of several times."""
    return sum(wall for wall, _ in parts), sum(processor for _, processor in parts)


def ratios(slow: Sequence[Seconds], fast: Sequence[Seconds]) -> dict[str, Any]:
    """Medians over the turns of two sides: seconds of each, and the ratios of their wall times and processor times."""
    wall, processor = ([a[clock] / b[clock] for a, b in zip(slow, fast)] for clock in (0, 1))
    return {
        "slow_s": statistics.median(a for a, _ in slow),
        "fast_s": statistics.median(b for b, _ in fast),
        "ratio": statistics.median(wall),
        "ratio_range": [min(wall), max(wall)],
        "processor_ratio": statistics.median(processor),
    }


def peak_bytes(run: Callable[[], Any]) -> int:
    """Peak memory of ``run`` in a forked process, above what this process already has.

    Call it before anything has run on several threads: a fork does not have them.
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
    # Return freed tensors to the system at once, so that the peak counts live memory only (malloc.h).
    libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3
    libc.mallopt(trim_threshold, 0)
    libc.mallopt(mmap_threshold, 65536)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    run()
    sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def stack(*more: str) -> str:
    """Versions of the libraries that the results depend on, and the machine."""
    return ", ".join([*(f"{name} {version(name)}" for name in ("torch", "transformers", *more)), machine()])


def matrix_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of all matrix products and fused attention calls in ``run``, backward passes included."""
    counted = _Products()
    with counted:
        run()
    return counted.flops


class _Products(TorchDispatchMode):
    """Counts each product of [n, k] and [k, m] as 2*n*k*m, also inside fused attention, where its whole square counts."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.flops += 2 * args[1].numel() * args[2].shape[-1]
        elif "scaled_dot_product" in name:
            backward = "backward" in name
            queries, keys = args[1:3] if backward else args[:2]
            self.flops += (10 if backward else 4) * queries.numel() * keys.shape[-2]
        return function(*args, **(kwargs or {}))
