"""Start DeepSpeed on a CPU without compiling an extension that training never uses.

Target: `build_shm_op` in `deepspeed.comm.torch`.
Why: on a CPU, DeepSpeed compiles its shared-memory all-reduce before it creates a process group, although only inference uses it.
That needs a C++ compiler and takes minutes. A start that is interrupted meanwhile leaves a lock for which all later ones wait
forever.
Versions: DeepSpeed 0.19.
Delete when: DeepSpeed compiles it on first use.
"""

from __future__ import annotations

import sys

from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Rebind the function to return None, as it does where the extension is not supported: gloo then does the work."""
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
    why="on a CPU, DeepSpeed compiles an extension that training never uses, and after an interrupted build it waits forever",
    delete_when="DeepSpeed compiles the extension on first use",
    change=change,
    trigger="deepspeed.comm.torch",
    needed=("deepspeed", ">=0.19"),
)
