"""Let the threads of the process group go before Python takes itself down.

Target: `train` in `llava.train.train`.
Why: it ends with the process group alive, and so does the process. A thread of gloo's that has just finished a collective
then waits for Python's lock to let go of its tensors. If Python takes itself down meanwhile, the process aborts (torch 2.13, see
pytorch/pytorch#179291) or hangs (torch 2.0 and 2.1), after all has been saved, and torchrun stops the other processes.
Versions: LLaVA 1.2.x.
Delete when: PyTorch leaves the group by itself when a process ends.
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

# Of others torch is not known to give Python's lock away while it waits for its threads: leaving the group would hang for ever.
_CAN_LEAVE = ">=2.13"
_LONG_ENOUGH_SECONDS = 0.3


def change(recorder: Recorder) -> None:
    """Wrap the function that a training script calls."""
    llava_train = sys.modules["llava.train.train"]
    stock = llava_train.train
    leave = way_to_leave()

    @functools.wraps(stock)
    def train(*positional: Any, **keywords: Any) -> Any:
        trained = stock(*positional, **keywords)
        # At the exit, as a script may still use the group. Not after a failure, when others may wait in it for this process.
        atexit.register(leave)
        return trained

    recorder.replace(llava_train, "train", train)


def way_to_leave() -> Callable[[], None]:
    """What the installed torch allows to be done with its threads at the exit of a process."""
    return _leave_group if version_fits(version("torch"), _CAN_LEAVE) else _let_threads_finish


def _leave_group() -> None:
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _let_threads_finish() -> None:
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(_LONG_ENOUGH_SECONDS)  # gives Python's lock away


PATCH = Patch(
    name="process_group",
    targets=(TRAIN,),
    why="one of several processes now and then aborts or hangs at its exit, as it leaves its process group to Python's end",
    delete_when="PyTorch leaves the process group by itself when a process ends",
    change=change,
)
