"""The language model of a LLaVA checkpoint alone, as a plain Mistral or Llama folder: what a rollout server holds.

Tensors keep their names, values and dtypes; vision tower and projector are left out, since the plugin embeds the prompts itself.
LLaVA's adapters name their tensors ``base_model.model.model.layers...``, which fits this folder as it is.

How to run: ``umed convert CKPT --language-model-only --out DIR``.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.folder import (
    BYTE_PAIR_FILES,
    EMBEDDING,
    HEAD,
    TOKENIZER_FILES,
    is_buffer,
    is_lora,
    read_config,
    weight_files,
)
from umed_plugin.checkpoints.generation import with_ends
from umed_plugin.checkpoints.hf_processor import read_json
from umed_plugin.checkpoints.missing_tensors import refuse_missing
from umed_plugin.checkpoints.rope import old_rope
from umed_plugin.checkpoints.to_transformers import LLAVA_KEYS, OF_THE_FILE
from umed_plugin.checkpoints.weight_shards import ShardWriter, of_all_bytes, stream
from umed_plugin.checkpoints.writing import LANGUAGE_MODEL_OF, writing_checkpoint
from umed_plugin.errors import UmedError
from umed_plugin.files import write_json

# Each is enough. The other files of a tokenizer hold no vocabulary, but for a pair of them.
_VOCABULARIES = ("tokenizer.model", "tokenizer.json")
_CLASSES = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
_LANGUAGE = re.compile(r"(model\.(embed_tokens|layers|norm)|lm_head)\..*")


def to_language_model(
    checkpoint: Path | str,
    out: Path | str,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the language model of a LLaVA checkpoint as ``MistralForCausalLM`` or ``LlamaForCausalLM``; return the folder.

    Args:
        checkpoint: in LLaVA's layout.
        out: must not exist, unless ``overwrite``.
        overwrite: replace ``out``.
        progress: called with (bytes done, bytes in all).

    Raises:
        UmedError: the checkpoint is a LoRA folder or has no tokenizer or embeddings, or ``out`` exists.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    config, tokenizer = check_source(checkpoint)
    refuse_missing(checkpoint, config, projector=False)
    with writing_checkpoint(out, overwrite=overwrite, inputs=(checkpoint,)) as folder:
        writer = ShardWriter(folder, of_all_bytes(weight_files(checkpoint), progress))
        rows = None
        for file in weight_files(checkpoint):
            for name, tensor in stream(file):
                if not _LANGUAGE.fullmatch(name) or is_buffer(name):
                    continue
                rows = tensor.shape[0] if name == EMBEDDING else rows
                if name != HEAD or not config.get("tie_word_embeddings"):
                    writer.add(name, tensor)
        if rows is None:
            raise UmedError(f"{checkpoint}: its weights hold no {EMBEDDING}. Copy or download it again.")
        writer.finish()
        for file in tokenizer:
            shutil.copy2(file, folder / file.name)
        new = _language_config(config, rows, checkpoint)
        write_json(folder / "config.json", new, indent=2)
        padding = {} if new.get("pad_token_id") is None else {"pad_token_id": new["pad_token_id"]}
        write_json(folder / "generation_config.json", with_ends(padding, new), indent=2)
    return out


def check_source(checkpoint: Path) -> tuple[dict[str, Any], list[Path]]:
    """Configuration and tokenizer files of a checkpoint whose language model can be written.

    Raises:
        UmedError: the checkpoint is a LoRA folder, has no tokenizer, or is none.
    """
    if is_lora(checkpoint):
        raise UmedError(
            f"{checkpoint}: is a LoRA folder. Take the checkpoint on which it was trained, and load the adapter at run time. Or "
            f"merge it first: umed merge {shlex.quote(str(checkpoint))} --base CKPT --out DIR"
        )
    config = read_config(checkpoint)
    tokenizer = [checkpoint / name for name in TOKENIZER_FILES if (checkpoint / name).is_file()]
    held = {file.name for file in tokenizer}
    if held.isdisjoint(_VOCABULARIES) and not held.issuperset(BYTE_PAIR_FILES):
        raise UmedError(
            f"{checkpoint}: has no tokenizer. Needed: {' or '.join(_VOCABULARIES)}, or both {' and '.join(BYTE_PAIR_FILES)}. "
            "Copy the tokenizer's files there."
        )
    return config, tokenizer


def _language_config(config: dict[str, Any], rows: int, checkpoint: Path) -> dict[str, Any]:
    kind = "mistral" if config["model_type"] == "llava_mistral" else "llama"
    kept = {k: v for k, v in config.items() if not LLAVA_KEYS.fullmatch(k) and k not in OF_THE_FILE}
    return {
        **old_rope(kept),
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": rows,
        "torch_dtype": config.get("torch_dtype", config.get("dtype", "float16")),
        LANGUAGE_MODEL_OF: _mark(checkpoint),
    }


def _mark(checkpoint: Path) -> dict[str, Any]:
    """What tells a checkpoint from another, or from what it was before: sizes and times of its weight files."""
    status = [(file.name, file.stat()) for file in weight_files(checkpoint)]
    return {
        "name": checkpoint.resolve().name,
        "weights": [[name, found.st_size, found.st_mtime_ns] for name, found in status],
    }


def is_language_model(folder: Path | str) -> bool:
    """Whether `to_language_model` has written the folder."""
    return LANGUAGE_MODEL_OF in read_json(Path(folder) / "config.json")


def is_of(folder: Path | str, checkpoint: Path | str) -> bool:
    """Whether the folder is the language model of the checkpoint as it is now."""
    return read_json(Path(folder) / "config.json").get(LANGUAGE_MODEL_OF) == _mark(Path(checkpoint))
