"""What stock LLaVA makes of a folder's name: `llava.model.builder` and its programs read class, LoRA and template from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from umed_plugin.checkpoints.loading import FAMILIES
from umed_plugin.commands.doctor.catalogue import finding
from umed_plugin.commands.doctor.configuration import MISTRAL, is_transformers_form
from umed_plugin.commands.doctor.contents import FULL, LORA, NOTHING, Contents
from umed_plugin.commands.doctor.findings import Finding
from umed_plugin.commands.doctor.identity import stock_template

# The template that llava.serve.cli and llava.eval.run_llava take, by the first of these words in the name.
_TEMPLATES = (
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
)


def stock_name(path: Path) -> str:
    """The name that LLaVA reads, in small letters; that of a ``checkpoint-N`` includes the folder above."""
    name = f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name
    return name.lower()


def template_by_name(name: str) -> str:
    """The template that LLaVA's programs choose for a folder."""
    return next((template for word, template in _TEMPLATES if word in name), "llava_v0")


def check_name(contents: Contents) -> Iterator[Finding]:
    """Whether the name leads LLaVA's loader and programs to what the folder is."""
    config = contents.config
    if contents.kind == NOTHING or is_transformers_form(config) or config.get("model_type") not in FAMILIES:
        return
    path, name = contents.path, stock_name(contents.path)
    mistral = config["model_type"] == MISTRAL
    good = f"{path.parent}/llava{'-mistral' if mistral else '-v1'}{'-lora' if contents.kind == LORA else ''}-{_plain(path.name)}"
    advice = f"Rename it, or ask for it through a link with another name: ln -s {path} {good}"
    where = str(path)
    if "llava" not in name:
        yield finding("name-without-llava", f"the name is {name!r}", where, advice=advice)
    if contents.kind == LORA:
        if "lora" not in name:
            yield finding("name-of-adapter", f"the name {name!r} does not hold 'lora'", where, advice=advice)
    else:
        if "lora" in name:
            yield finding("name-of-adapter", f"the name {name!r} holds 'lora'", where, advice=advice)
    if contents.kind == FULL:
        yield from _class_by_name(name, mistral, where, advice)
    if "mpt" in str(path) and "mpt" not in name:
        tail = "-mistral" if mistral else ""
        yield finding("path-with-mpt", f"the path is {path}", where, checkpoint=path, mistral=tail)
    wanted = stock_template(contents)
    if template_by_name(name) not in wanted:
        found = f"by the name {name!r} it is {template_by_name(name)}, and the model was trained with {wanted[0]}"
        yield finding("name-template", found, where, template=wanted[0])


def _class_by_name(name: str, mistral: bool, where: str, advice: str) -> Iterator[Finding]:
    chosen = "MPT" if "mpt" in name else "Mistral" if "mistral" in name else "Llama"
    needed = "Mistral" if mistral else "Llama"
    if chosen != needed:
        code = "name-of-mpt" if chosen == "MPT" else "name-of-other-class"
        found = f"by the name {name!r} it would be loaded as {chosen}, and it is {needed}"
        yield finding(code, found, where, advice=advice)


def _plain(name: str) -> str:
    """The name without the words that LLaVA reads."""
    for word in ("llava", "mistral", "lora", "mpt", "v1"):
        name = name.replace(word, "")
    return name.strip("-_. ") or "model"
