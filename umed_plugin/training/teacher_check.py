"""Before the model is loaded: whether the teachers that stage 1's flags name can teach this checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.folder import STOCK_TEMPLATES, is_lora, read_config
from umed_plugin.checkpoints.prompt_templates import is_of_family
from umed_plugin.checkpoints.sam_encoder import read_sam_file
from umed_plugin.checkpoints.tokenizers import load_tokenizer
from umed_plugin.errors import UmedError


def find_teacher_faults(flags: Any, model_args: Any, cache_dir: str | None = None) -> list[str]:
    """All that is wrong with ``--umed_teacher`` and ``--umed_tower_teacher``, one sentence or two each.

    Args:
        flags: the plugin's.
        model_args: LLaVA's.
        cache_dir: where files from the Hub are cached.
    """
    faults = []
    if flags.umed_teacher is not None and Path(flags.umed_teacher).is_dir():
        faults += _faults_of_teacher(flags.umed_teacher, model_args, cache_dir)
    if flags.umed_tower_teacher is not None and flags.umed_tower_teacher_weight > 0:
        try:
            read_sam_file(flags.umed_tower_teacher)
        except UmedError as error:
            faults.append(f"--umed_tower_teacher {error}")
    return faults


def _faults_of_teacher(teacher: str, model_args: Any, cache_dir: str | None) -> list[str]:
    where = f"--umed_teacher {teacher}"
    if is_lora(teacher):
        return [
            f"{where}: is a LoRA folder. Merge it first: umed merge {shlex.quote(str(teacher))} --base CKPT --out DIR"
        ]
    try:
        config = read_config(teacher)
    except UmedError as error:
        return [f"--umed_teacher {error}"]
    faults = []
    if not is_of_family(model_args.version, config["model_type"]):
        faults.append(
            f"{where}: is a {config['model_type']}, asked under the template {STOCK_TEMPLATES[config['model_type']]}, but "
            f"--version {model_args.version} trains under another. Needed: a teacher of the same template."
        )
    try:
        own = load_tokenizer(model_args.model_name_or_path, cache_dir=cache_dir)
        fault = tokenizer_fault(own, load_tokenizer(teacher))
    except UmedError as error:
        return [*faults, f"{where}: {error}"]
    return faults if fault is None else [*faults, f"{where}: {fault}"]


def tokenizer_fault(own: Any, other: Any) -> str | None:
    """Where two tokenizers first differ, as a sentence; None if every token of one is the same token of the other."""
    words, others = ({index: word for word, index in t.get_vocab().items()} for t in (own, other))
    differing = [index for index in sorted({*words, *others}) if words.get(index) != others.get(index)]
    if not differing:
        return None
    first = differing[0]
    return (
        f"has another tokenizer. Token {first} is {others.get(first)!r} there, and {words.get(first)!r} in the checkpoint that "
        f"learns ({len(differing)} tokens differ). Needed: a teacher of the same tokenizer."
    )
