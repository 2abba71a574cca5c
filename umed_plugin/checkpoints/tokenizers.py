"""A checkpoint's tokenizer as LLaVA's training loads it, without the Python code that a checkpoint may bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.utf8_paths import in_utf8
from umed_plugin.errors import UmedError

# What transformers' refusals hold: an option that no command of the plugin has, or the class that it has not.
_REFUSED = ("trust_remote_code", "Tokenizer class")


def load_tokenizer(checkpoint: Path | str, **options: Any) -> Any:
    """The slow tokenizer of a checkpoint, a folder or a name on the Hub.

    Args:
        checkpoint: with tokenizer files.
        options: further ones of ``from_pretrained``.

    Raises:
        UmedError: its tokenizer is a class of its own code.
    """
    from transformers import AutoTokenizer

    try:
        with in_utf8(Path(checkpoint)) as readable:
            return AutoTokenizer.from_pretrained(readable, use_fast=False, trust_remote_code=False, **options)
    except ValueError as error:
        if not any(words in str(error) for words in _REFUSED):
            raise
        raise UmedError(own_code(checkpoint)) from error


def own_code(checkpoint: Any) -> str:
    """The message that a checkpoint's own Python would have to run."""
    return (
        f"{checkpoint}: its tokenizer_config.json or config.json names a class that only Python code beside it has (auto_map, or "
        "tokenizer_class). Code of a checkpoint is never run. Allowed: classes of transformers, such as LlamaTokenizer. Set "
        "tokenizer_class to one of them, and remove auto_map."
    )
