"""Tokens for images that LLaVA's flags add to a checkpoint that lacks them. Only full fine-tuning saves their rows.

`umed_plugin.checkpoints.merging` refuses such a training, and `umed_plugin.patches.lora_resume` says so before it begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.folder import TOKENIZER_FILES

# LLaVA's flag, and key of config.json -> the tokens that it adds.
REQUESTED = {"mm_use_im_patch_token": ("<im_patch>",), "mm_use_im_start_end": ("<im_start>", "<im_end>")}


def flags_that_add(asked: Mapping[str, Any], base: Path | str, cache_dir: str | None = None) -> list[str]:
    """Those flags that are true in ``asked`` and whose tokens the base's tokenizer files do not name.

    Args:
        asked: values of the keys of `REQUESTED`, such as ``config.json``.
        base: a checkpoint: a folder, or a name on the Hugging Face Hub.
        cache_dir: where files from the Hub are cached.
    """
    wanted = [flag for flag in REQUESTED if asked.get(flag)]
    if not wanted:
        return []
    known = b"".join(file.read_bytes() for file in tokenizer_files(base, cache_dir))
    return [flag for flag in wanted if not all(token.encode() in known for token in REQUESTED[flag])]


def tokenizer_files(checkpoint: Path | str, cache_dir: str | None = None) -> list[Path]:
    """The tokenizer files that a checkpoint has."""
    if Path(checkpoint).is_dir():
        found = [Path(checkpoint) / name for name in TOKENIZER_FILES]
        return [file for file in found if file.is_file()]
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        cached = [cached_file(str(checkpoint), name, cache_dir=cache_dir, **quiet) for name in TOKENIZER_FILES]
    except (OSError, ValueError):  # no such folder, and no name on the Hub
        return []
    return [Path(file) for file in cached if file is not None]


def why_lost(flag: str, base: Any) -> str:
    """Why a training without all weights must not add tokens, and what to do: the end of a sentence, and others."""
    return (
        f"tokens that {base} does not have. LLaVA saves the rows of added tokens with full fine-tuning only. Train with "
        f"--{flag} False, as LLaVA's own checkpoints were."
    )
