"""Work that one process does for all: the others wait for it however long it takes, and fail if it fails.

`torch.distributed.barrier` ends a run after ``--ddp_timeout`` (30 minutes), which building the records of 100,000 images exceeds,
and does not say what it waited for. Here the others ask the run's key-value store, which works across machines too.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch.distributed as dist

from umed_plugin.errors import UmedError, note
from umed_plugin.terminal.progress import duration

SECONDS = 30.0  # between two lines of a waiting process
_POLL = 0.5
_DONE, _FAILED = 1, 2
_numbers = itertools.count()


def first_process_does(work: Callable[[], None], what: str) -> None:
    """Do the work in the first process; every process returns when it is done. All processes must call this.

    Args:
        what: the work in words, for messages: ``build the records``.

    Raises:
        UmedError: in the other processes, with the message of what the first one raised.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        work()
        return
    store = dist.distributed_c10d._get_default_store()
    key = f"umed/first_process/{next(_numbers)}"
    if dist.get_rank() != 0:
        _wait(store, key, what)
        return
    try:
        work()
    except BaseException as error:
        store.set(f"{key}/error", str(error) or type(error).__name__)
        store.add(key, _FAILED)
        raise
    store.add(key, _DONE)


def _wait(store: dist.Store, key: str, what: str) -> None:
    began = told = time.monotonic()
    while True:
        try:
            state = store.add(key, 0)
        except Exception as error:  # the store ended with the first process
            raise UmedError(f"the first process ended before it could {what}. Its own message says why.") from error
        if state == _FAILED:
            raise UmedError(f"the first process could not {what}: {store.get(f'{key}/error').decode()}")
        if state == _DONE:
            return
        now = time.monotonic()
        if now - told >= SECONDS and dist.get_rank() == 1:
            told = now
            note(f"waiting for the first process to {what}, for {duration(now - began)} so far")
        time.sleep(_POLL)
