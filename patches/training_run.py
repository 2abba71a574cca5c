"""What the patches of one training run share: LLaVA's parsed arguments, and the function whose globals they rebind.

LLaVA passes its arguments on in parts (`make_supervised_data_module` never sees the TrainingArguments). So the run is attached to
``model_args.umed_run`` and ``data_args.umed_run``, but not to the TrainingArguments, which every checkpoint pickles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from umed_plugin.errors import note
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.patching import Target

LLAVA = ">=1.1.3,<1.3"
TRANSFORMERS_4, TRANSFORMERS_5 = ">=4.36,<4.38", ">=5.23,<5.24"
TRANSFORMERS = f"{TRANSFORMERS_4} || {TRANSFORMERS_5}"
BEFORE_5, ON_5 = ("transformers", "<5"), ("transformers", ">=5")
# It reads its globals when it runs, so they can be rebound. Each patch that does so relies on how it reads them.
TRAIN = Target("llava.train.train:train", LLAVA, ("0ef232c0a416a4da43871d171405fcd795562314a31dbd988f4cb68d07d01dd7",))

# The loop over epochs, for patches that transformers 5 needs no more.
TRAINING_LOOP_4 = Target(
    "transformers.trainer:Trainer._inner_training_loop",
    TRANSFORMERS_4,
    (
        "000dd3ec22eb914329e49b64992a634fba491d70372e0b20482289a824289987",  # 4.36
        "9caed1a498d1c257550f7507ec8b29ff4bab559583f3f439c663769dce1dbcf4",  # 4.37
    ),
)


@dataclass
class TrainingRun:
    """One call of LLaVA's ``train()``."""

    model_args: Any
    data_args: Any
    training_args: Any

    @property
    def flags(self) -> UmedFlags:
        """The ``--umed_*`` flags."""
        return self.training_args.umed

    @property
    def active(self) -> bool:
        """Whether ``--umed_stage`` was given; otherwise LLaVA trains as if the plugin were not installed."""
        return self.flags.umed_stage is not None

    def say(self, text: str) -> None:
        """`umed_plugin.errors.note` on rank 0: once per run, not once per process."""
        if self.training_args.process_index == 0:
            note(text)
