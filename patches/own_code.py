"""Never run, and never ask to run, the Python code that a checkpoint brings.

Target: what `resolve_trust_remote_code` in `transformers.dynamic_module_utils` does where its caller says nothing.
Why: LLaVA loads its tokenizer without ``trust_remote_code``. If tokenizer_config.json names a class in a file of the checkpoint,
transformers asks at the terminal, and imports that file if the answer is yes. A script with ``yes |`` before it answers so.
Versions: transformers 4.36, 4.37 and 5.23.
Delete when: LLaVA's `train()` and its loader pass ``trust_remote_code=False``.

Only the question is taken away. A program that passes ``trust_remote_code=True``, such as a reward of your own, gets its model.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from umed_plugin.checkpoints.tokenizers import own_code
from umed_plugin.errors import UmedError
from umed_plugin.patches.training_run import TRANSFORMERS
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Let the time in which transformers waits for an answer be none, and its end say what was found."""
    module = importlib.import_module("transformers.dynamic_module_utils")
    # Other modules have imported the function itself, but it reads both names when it is called.
    recorder.replace(module, "TIME_OUT_REMOTE_CODE", 0)
    recorder.replace(module, "_raise_timeout_error", _refuse)


def _refuse(signum: Any, frame: Any) -> None:
    asked = sys._getframe(1).f_locals  # of resolve_trust_remote_code, which passes nothing on
    raise UmedError(own_code(asked.get("model_name", "the checkpoint")))


PATCH = Patch(
    name="own_code",
    targets=(
        Target(
            "transformers.dynamic_module_utils:resolve_trust_remote_code",
            TRANSFORMERS,
            (
                "ce116b670734d25799f0cebd3aba33b78acfc37c6ddea42dd7e0bca3dcacdc7f",  # 4.36, 4.37
                "d72459341a7052e6ee810a47571797e94337a2ecc7c4c81e1f558a75c78a4ded",  # 5.23
            ),
        ),
        Target(
            "transformers.dynamic_module_utils:_raise_timeout_error",
            TRANSFORMERS,
            ("7025bdd69f7c489119946758a0d391305bc9870ef6eb18cff1dc67c05b6a70fb",),
        ),
    ),
    why="transformers asks whether a checkpoint's own Python shall run when LLaVA loads its tokenizer, and runs it after a yes",
    delete_when="LLaVA loads its tokenizer with trust_remote_code=False",
    change=change,
    trigger="llava.model",
)
