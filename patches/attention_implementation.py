"""Choose the attention that LLaVA's scripts train with: ``--umed_attention``, or what the script requests and can have here.

Target: `train` in `llava.train.train`, which ``train_mem.py`` imports and calls with ``flash_attention_2``.
Why: loading the model fails on every machine without a GPU and in every environment without flash-attn, and no flag can ask for
another attention.
Versions: LLaVA 1.2.x.
Delete when: ``train_mem.py`` requests an attention that is available, and LLaVA has a flag for it.

Without a request, transformers uses SDPA if it has it for the model and this torch, else eager attention. With each of them, a
question's answers can share its prompt (`umed_plugin.model.split_attention`), so ``auto`` keeps what the script requests.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from umed_plugin.checkpoints.precision import has_ampere
from umed_plugin.errors import note
from umed_plugin.patches.model_class import FAMILIES, read_config
from umed_plugin.patches.training_run import TRAIN, TrainingRun
from umed_plugin.patching import Patch, Recorder

FLASH = "flash_attention_2"
NAMES = {"eager": "eager", "sdpa": "sdpa", "flash": FLASH}  # of --umed_attention


def change(recorder: Recorder) -> None:
    """Wrap `train` before ``train_mem.py`` imports it."""
    llava_train = sys.modules["llava.train.train"]
    stock = llava_train.train

    def train(attn_implementation: str | None = None) -> Any:
        return stock(attn_implementation=requested_attention(attn_implementation, _options(llava_train)))

    recorder.replace(llava_train, "train", train)


def _options(llava_train: Any) -> Any:
    """The flags as argparse reads them, abbreviated ones too. `train()` parses and checks them only later."""
    classes = llava_train.ModelArguments, llava_train.DataArguments, llava_train.TrainingArguments
    return llava_train.transformers.HfArgumentParser(classes).parse_known_args()[0]


def requested_attention(requested: str | None, options: Any) -> str | None:
    """What to request from transformers.

    Args:
        requested: by the script.
        options: all flags.

    Returns:
        The attention that ``--umed_attention`` names; `find_faults` refuses one that cannot run. With ``auto``, ``requested``; or
        None (transformers' own choice), with a note, where flash attention cannot run.
    """
    chosen = getattr(options, "umed_attention", "auto")
    if chosen != "auto":
        return NAMES.get(chosen, requested)
    reason = _no_flash(options) if requested == FLASH else None
    if reason is None:
        return requested
    instead = "sdpa if the model supports it, else eager" if _has_sdpa() else f"eager ({_NO_SDPA})"
    note(f"{FLASH} was requested, but {reason}. Training with {instead}.")
    return None


def find_faults(run: TrainingRun) -> list[str]:
    """Why the attention that ``--umed_attention`` names cannot be used; none with ``auto`` or ``eager``."""
    chosen = run.flags.umed_attention
    reason = None
    if run.active and chosen == "flash":
        reason = _no_flash(run.training_args)
    elif run.active and chosen == "sdpa":
        reason = _no_sdpa(run)
    return [] if reason is None else [f"--umed_attention {chosen}: {reason}. Use another one, or auto."]


_NO_SDPA = "transformers has no sdpa for this torch"


def _no_flash(options: Any) -> str | None:
    """Why flash attention cannot run, in words."""
    import torch
    from transformers import utils

    if options.use_cpu or getattr(options, "no_cuda", False):
        return "--use_cpu was given"
    if not utils.is_flash_attn_2_available():
        return "flash-attn 2 or CUDA is missing"
    if not (options.bf16 or options.fp16 or getattr(options, "bits", 16) < 16):
        return "it computes in 16 bits alone, and neither --bf16 nor --fp16 is given"
    # ROCm's flash-attn knows its own GPUs.
    return None if torch.version.hip is not None or has_ampere() else "it needs a GPU of Ampere or later"


def _has_sdpa() -> bool:
    """Whether transformers has SDPA with this torch."""
    from transformers import modeling_utils, utils

    if hasattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS"):  # transformers 5
        return "sdpa" in modeling_utils.ALL_ATTENTION_FUNCTIONS
    return getattr(utils, "is_torch_sdpa_available", lambda: False)()  # before 4.36: neither the function nor SDPA


def _no_sdpa(run: TrainingRun) -> str | None:
    """Why the model cannot use SDPA, in words."""
    if not _has_sdpa():
        return _NO_SDPA
    try:
        config = read_config(run.model_args.model_name_or_path, run.training_args.cache_dir)
    except (OSError, ValueError):
        return None  # another check reports it
    kind = str(config.get("model_type"))
    module, name = FAMILIES.get(kind, FAMILIES["llava_llama"])
    has_it = getattr(getattr(importlib.import_module(module), name), "_supports_sdpa", False)
    return None if has_it else f"this transformers has no sdpa for {kind} models"


PATCH = Patch(
    name="attention_implementation",
    targets=(TRAIN,),
    why="train_mem.py requests flash_attention_2, fails if flash-attn or CUDA is missing, and has no flag for another",
    delete_when="train_mem.py requests an attention that is available, and LLaVA has a flag for it",
    change=change,
)
