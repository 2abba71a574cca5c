"""How stock LLaVA reads a folder's name: `llava.model.builder` and its programs take class, LoRA and template from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from umed_plugin.checkpoints.folder import FAMILIES
from umed_plugin.commands.doctor.catalogue import finding
from umed_plugin.commands.doctor.configuration import MISTRAL, is_transformers_form
from umed_plugin.commands.doctor.contents import FULL, LORA, NOTHING, Contents
from umed_plugin.commands.doctor.findings import Finding
from umed_plugin.commands.doctor.identity import stock_template

# llava.serve.cli and llava.eval.run_llava choose the template by the first of these words in the name.
_TEMPLATES = (
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
)


def stock_name(path: Path) -> str:
    """The name that LLaVA reads, in lower case; for a ``checkpoint-N`` folder it includes the parent folder's name."""
    name = f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name
    return name.lower()


def template_by_name(name: str) -> str:
    """The template that LLaVA's programs choose for a folder with this `stock_name`."""
    return next((template for word, template in _TEMPLATES if word in name), "llava_v0")


def check_name(contents: Contents) -> Iterator[Finding]:
    """Check whether LLaVA's loader and programs draw the right conclusions from the name."""
    config = contents.config
    if contents.kind == NOTHING or is_transformers_form(config) or config.get("model_type") not in FAMILIES:
        return
    path, name = contents.path, stock_name(contents.path)
    mistral = config["model_type"] == MISTRAL
    good = f"{path.parent}/llava{'-mistral' if mistral else '-v1'}{'-lora' if contents.kind == LORA else ''}-{_plain(path.name)}"
    advice = f"Rename the folder, or use it through a symbolic link with another name: ln -s {path} {good}"
    where = str(path)
    if contents.is_intermediate:  # it is merged under another name, and LLaVA never loads this folder
        return
    if "llava" not in name:
        yield finding("name-without-llava", f"the name is {name!r}", where, advice=advice)
    if contents.kind == LORA:
        if "lora" not in name:
            yield finding("name-of-adapter", f"the name {name!r} does not contain 'lora'", where, advice=advice)
    else:
        if "lora" in name:
            yield finding("name-of-adapter", f"the name {name!r} contains 'lora'", where, advice=advice)
    if contents.kind == FULL:
        yield from _class_by_name(name, mistral, where, advice)
    if "mpt" in str(path) and "mpt" not in name:
        tail = "-mistral" if mistral else ""
        yield finding("path-with-mpt", f"the path is {path}", where, checkpoint=path, mistral=tail)
    wanted = stock_template(contents)
    if template_by_name(name) not in wanted:
        found = f"the name {name!r} selects {template_by_name(name)}, but the model was trained with {wanted[0]}"
        yield finding("name-template", found, where, template=wanted[0])


def _class_by_name(name: str, mistral: bool, where: str, advice: str) -> Iterator[Finding]:
    chosen = "MPT" if "mpt" in name else "Mistral" if "mistral" in name else "Llama"
    needed = "Mistral" if mistral else "Llama"
    if chosen != needed:
        code = "name-of-mpt" if chosen == "MPT" else "name-of-other-class"
        found = f"the name {name!r} makes LLaVA load it as {chosen}, but it is a {needed} model"
        yield finding(code, found, where, advice=advice)


def _plain(name: str) -> str:
    """The name without the words that LLaVA looks for."""
    for word in ("llava", "mistral", "lora", "mpt", "v1"):
        name = name.replace(word, "")
    return name.strip("-_. ") or "model"
