"""Reading the images of a build: what a record needs of each (`look`), by several processes (`pool`), kept for later (`kept`).

`look_at_all` joins the three. Boxes are fitted afterwards by `umed_plugin.data.build`, in one process and in order, so records do
not depend on how many processes read images, or on what was kept.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Optional

from umed_plugin.data.leaks import Pictures
from umed_plugin.data.reading.kept import KeptLooks
from umed_plugin.data.reading.looks import Dated, Request, Seen, look
from umed_plugin.data.reading.pool import in_processes, sensible_workers
from umed_plugin.data.shards import Shard

__all__ = ["Request", "Seen", "look_at_all", "sensible_workers"]

# Images from which starting other processes takes less time than it saves.
_WORTH_A_POOL = 200


def look_at_all(
    requests: Sequence[Request],
    evaluated: Pictures,
    *,
    kept_in: Path,
    workers: Optional[int] = None,
    shard: Optional[Shard] = None,
) -> Generator[Seen, None, None]:
    """What is seen of every image, in the order of the requests. Only what is not known from an earlier build is read.

    Args:
        evaluated: images of evaluation sets, with which each image is compared.
        kept_in: folder of the file that keeps what was seen; it grows with every image, so an interrupted build goes on.
        workers: processes that read images. 1: this one. None: by the number of CPUs and images.
        shard: this process's share; what it saw is kept in a file of its own.

    Raises:
        UmedError: a process that reads images was ended from outside.
    """
    with KeptLooks(kept_in, evaluated.digest(), shard) as kept:
        found = [kept.find(request) for request in requests]
        missing = [request for request, seen in zip(requests, found) if seen is None]
        read = iter(_read(missing, evaluated, workers))
        for request, known in zip(requests, found):
            if known is not None:
                yield known
                continue
            dated = next(read)
            kept.add(request, dated)
            yield dated.seen
        if shard is None:
            kept.tidy()


def _read(requests: Sequence[Request], evaluated: Pictures, workers: Optional[int]) -> Iterator[Dated]:
    if workers is None:
        workers = sensible_workers() if len(requests) >= _WORTH_A_POOL else 1
    if workers == 1 or len(requests) < 2:
        return (look(request, evaluated) for request in requests)
    return in_processes(look, requests, evaluated, workers)
