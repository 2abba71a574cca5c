"""Start DeepSpeed on a CPU without compiling an extension that training never calls.

Target: `build_shm_op` in `deepspeed.comm.torch`.
Why: on a CPU each process group is preceded by the build of DeepSpeed's all-reduce through shared memory, which inference alone
uses. It needs a C++ compiler and minutes, and a start that is interrupted in it leaves a lock that every later one waits for
without an end.
Versions: DeepSpeed 0.19.
Delete when: DeepSpeed builds it where it is first called.
"""

from __future__ import annotations

import sys

from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Rebind the function to what it gives where the extension does not fit: gloo then does all."""
    recorder.replace(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None)


PATCH = Patch(
    name="shared_memory_build",
    targets=(
        Target(
            "deepspeed.comm.torch:build_shm_op",
            ">=0.19,<0.20",
            ("2bf3cff9e3d1f05863cf534d298028210a541824eb8b9832ca37877183d60395",),
        ),
    ),
    why="on a CPU DeepSpeed compiles an extension that training never calls, and once interrupted in it waits for ever",
    delete_when="DeepSpeed builds the extension where it is first called",
    change=change,
    trigger="deepspeed.comm.torch",
    needed=("deepspeed", ">=0.19"),
)
