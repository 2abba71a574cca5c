"""Load pickles of a checkpoint without executing code in them.

Target: `torch.load`, only for calls from LLaVA and the libraries that it calls.
Why: ``non_lora_trainables.bin``, ``mm_projector.bin``, ``pytorch_model.bin``, a tower's weights, optimizer and scheduler states
are pickles, and a pickle from the internet can execute any code. torch before 2.6 loads them without a check, and runs
TorchScript archives even with ``weights_only``. DeepSpeed switches the check of newer versions off.
Versions: torch 2.0 and newer.
Delete when: LLaVA, transformers, accelerate, peft and DeepSpeed all load with ``weights_only=True`` on torch 2.6 or newer.

The call goes through `umed_plugin.checkpoints.safe_loading`. Other callers, such as a reward of your own, get `torch.load` as it
is. Where no patch is applied, `safe_loading.behind_the_door` does the same for the time in which the package loads a checkpoint.
"""

from __future__ import annotations

from umed_plugin.checkpoints.safe_loading import with_door
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Wrap `torch.load`."""
    import torch

    load = with_door(torch.load)
    recorder.replace(torch, "load", load)
    recorder.replace(torch.serialization, "load", load)


PATCH = Patch(
    name="torch_load",
    targets=(
        # No hash: the change passes a file and a flag on, and their names are the same in every version since 2.0.
        Target("torch:load", ">=2.0,<3", ()),
    ),
    why="checkpoint pickles (weights, tower, projector, optimizer) can execute any code when loaded",
    delete_when="LLaVA and the libraries that it calls load with weights_only=True on torch 2.6 or newer",
    change=change,
    trigger="llava.model",
)
