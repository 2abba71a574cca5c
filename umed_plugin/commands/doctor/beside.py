"""What lies in a checkpoint's folder beside the weights that are loaded: Python code, and pickles.

A weight file that is not loaded is one of these too, such as ``pytorch_model.bin`` beside ``model.safetensors``: the next command
may load it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from umed_plugin.checkpoints.archives import PROGRAM
from umed_plugin.checkpoints.pickles import read_pickle
from umed_plugin.checkpoints.stored import BadFile
from umed_plugin.commands.doctor.catalogue import finding
from umed_plugin.commands.doctor.contents import Contents, is_weight_file, read_object
from umed_plugin.commands.doctor.findings import Finding

# Modules that pickles of transformers, PyTorch, DeepSpeed and LLaVA name; a pickle with other names has another origin.
_TRAINING = re.compile(
    r"(transformers|torch|accelerate|deepspeed|llava|numpy|collections|_codecs|datetime|pathlib|argparse|umed_plugin)\b"
)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_SETTINGS = ("config.json", "tokenizer_config.json")  # whose auto_map names Python in the checkpoint, or on the Hub
_SHOWN = 5
# Names that no trainer saves, in whichever library.
_CALLS = re.compile(
    r"(torch\.(hub|jit|load|package|classes|ops)|torch\.serialization\.load|numpy\.load|torch\.utils\.cpp_extension|numpy\.(f2py|distutils|testing)|.*\.(system|popen|exec|eval))\b"
)


def check_beside(contents: Contents) -> Iterator[Finding]:
    """Report Python code, and pickles that no check has read, in the folder and in those below it (towers, checkpoint-N)."""
    path = contents.path
    scripts = sorted(str(file.relative_to(path)) for file in path.rglob("*.py"))
    settings = [
        name
        for name in _SETTINGS
        if "auto_map" in (contents.config if name == "config.json" else read_object(path / name))
    ]
    if scripts or settings:
        found = ", ".join([*scripts[:_SHOWN], *(f"auto_map in {name}" for name in settings)])
        yield finding("code-inside", found, str(path))
    for file in sorted(path.rglob("*")):
        if file.suffix not in _PICKLES or file.resolve() in contents.read or not file.is_file():
            continue
        odd = _odd_names(file)
        if odd:
            yield finding("pickle-beside", f"it {odd}", str(file), file=file.relative_to(path))


def _odd_names(file: Path) -> str | None:
    """What a pickle holds that no trainer saves, in words; None if nothing."""
    try:
        foreign = read_pickle(file).foreign
    except BadFile as error:
        # Only a resumed training run reads it, and reports that it cannot be read.
        return error.found if error.code == PROGRAM else None
    odd = [name for name in foreign if is_weight_file(file) or not _TRAINING.match(name) or _CALLS.match(name)]
    return f"names {', '.join(odd[:_SHOWN])}" if odd else None
