"""Let the threads of the process group end before the interpreter shuts down.

Target: `train` in `llava.train.train`.
Why: it returns, and the process exits, without destroying the process group. A gloo thread that has just finished a collective
then waits for the GIL to release its tensors. If the interpreter shuts down meanwhile, the process aborts (torch 2.13, see
pytorch/pytorch#179291) or hangs (torch 2.0 and 2.1). Everything is saved by then, but torchrun stops the other processes.
Versions: LLaVA 1.2.x.
Delete when: PyTorch destroys the group itself when a process exits.
"""

from __future__ import annotations

import atexit
import functools
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from umed_plugin.patches.training_run import TRAIN
from umed_plugin.patching import Patch, Recorder, version_fits

# Earlier versions are not known to release the GIL while they wait for their threads: destroying the group could deadlock.
_CAN_LEAVE = ">=2.13"
_LONG_ENOUGH_SECONDS = 0.3


def change(recorder: Recorder) -> None:
    """Wrap the function that training scripts call."""
    llava_train = sys.modules["llava.train.train"]
    stock = llava_train.train
    leave = way_to_leave()

    @functools.wraps(stock)
    def train(*positional: Any, **keywords: Any) -> Any:
        trained = stock(*positional, **keywords)
        # At exit, since a script may still use the group. Not after a failure, when other ranks may be waiting in a collective.
        atexit.register(leave)
        return trained

    recorder.replace(llava_train, "train", train)


def way_to_leave() -> Callable[[], None]:
    """How the installed torch can get rid of its threads when a process exits."""
    return _leave_group if version_fits(version("torch"), _CAN_LEAVE) else _let_threads_finish


def _leave_group() -> None:
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _let_threads_finish() -> None:
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(_LONG_ENOUGH_SECONDS)  # releases the GIL


PATCH = Patch(
    name="process_group",
    targets=(TRAIN,),
    why="one of several processes sometimes aborts or hangs at exit, because it does not destroy its process group",
    delete_when="PyTorch destroys the process group itself when a process exits",
    change=change,
)
