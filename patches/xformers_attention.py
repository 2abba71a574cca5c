"""Run ``train_xformers.py`` without xformers.

Target: `replace_llama_attn_with_xformers_attn` in `llava.train.llama_xformers_attn_monkey_patch`.
Why: without xformers it only logs the failed import, and still replaces Llama's attention with a function that needs xformers.
Versions: LLaVA 1.2.x.
Delete when: the function raises an error or does nothing without xformers.
"""

from __future__ import annotations

import importlib.util
import sys

from umed_plugin.errors import note
from umed_plugin.patches.training_run import LLAVA
from umed_plugin.patching import Patch, Recorder, Target

_MODULE = "llava.train.llama_xformers_attn_monkey_patch"
_FUNCTION = "replace_llama_attn_with_xformers_attn"


def change(recorder: Recorder) -> None:
    """Replace the attention only if xformers is installed."""
    module = sys.modules[_MODULE]
    stock = getattr(module, _FUNCTION)

    def replace_llama_attn_with_xformers_attn() -> None:
        if importlib.util.find_spec("xformers") is None:
            note("xformers is missing. Training with the attention that transformers chooses.")
            return
        stock()

    recorder.replace(module, _FUNCTION, replace_llama_attn_with_xformers_attn)


PATCH = Patch(
    name="xformers_attention",
    targets=(
        Target(f"{_MODULE}:{_FUNCTION}", LLAVA, ("370fa6a84f46b318f3a31b032c1bbecc8af0379d08a604ff12f962ca91770b87",)),
    ),
    why="train_xformers.py installs an attention that fails without xformers",
    delete_when="LLaVA checks for xformers before it replaces the attention",
    change=change,
    trigger=_MODULE,
)
