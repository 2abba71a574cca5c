"""Where answers begin and end, in the generation_config.json of a checkpoint that is written."""

from __future__ import annotations

from typing import Any

END = "eos_token_id"
_ENDS = {"bos_token_id": 1, END: 2}  # with their values in transformers' classes of Llama and Mistral


def with_ends(generation: dict[str, Any], language: dict[str, Any]) -> dict[str, Any]:
    """``generation_config.json`` with the tokens at which an answer begins and ends.

    Without the file, transformers takes them from ``config.json``. With a file that lacks them, no answer ends.

    Args:
        generation: content of the file; empty if there is none.
        language: configuration of the language model.

    Example:
        >>> with_ends({"max_length": 99}, {"bos_token_id": 1, "eos_token_id": 32000})
        {'bos_token_id': 1, 'eos_token_id': 32000, 'max_length': 99}
    """
    ends = {key: language.get(key, value) for key, value in _ENDS.items()}
    told = {key: value for key, value in generation.items() if key not in _ENDS or value is not None}
    return {**{key: value for key, value in ends.items() if value is not None}, **told}
