"""Save a LoRA checkpoint where deepspeed is not installed.

Target: `maybe_zero_3` in `llava.train.train` and `llava.train.llava_trainer`.
Why: it imports deepspeed before it checks whether the parameter is partitioned. So a LoRA run without deepspeed fails at its very
end, when it saves hours of training.
Versions: LLaVA 1.2.x.
Delete when: the import is inside the branch ``hasattr(param, "ds_id")``.
"""

from __future__ import annotations

import sys
from typing import Any

from umed_plugin.patches.training_run import LLAVA
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Rebind the function in both modules."""
    for name in ("llava.train.train", "llava.train.llava_trainer"):
        module = sys.modules[name]
        recorder.replace(module, "maybe_zero_3", _without_import(module.maybe_zero_3))


def _without_import(stock: Any) -> Any:
    def maybe_zero_3(param: Any, ignore_status: bool = False, name: str | None = None) -> Any:
        if hasattr(param, "ds_id"):
            return stock(param, ignore_status=ignore_status, name=name)
        return param.detach().cpu().clone()

    return maybe_zero_3


PATCH = Patch(
    name="zero_3",
    targets=(
        Target(
            "llava.train.train:maybe_zero_3",
            LLAVA,
            ("5102eb86c1ba51005c5ecfc9a83f36db36ecd1d78b47d2ae279e0676f509b224",),
        ),
        Target(
            "llava.train.llava_trainer:maybe_zero_3",
            LLAVA,
            ("2a26d245a9fb508027879f23d4550112c28d4bbef9a3a735877adee5f1d8de7e",),
        ),
    ),
    why="saving a LoRA run imports deepspeed even where it is not needed, and fails without it",
    delete_when="LLaVA imports deepspeed only for parameters that DeepSpeed has partitioned",
    change=change,
)
