"""The prompt templates of training and evaluation: LLaVA's stock templates with another system text.

Stock LLaVA does not know the ``umed_*`` templates and prompts an exported checkpoint with its own. Roles and separators must then
match those of training, so the templates differ only in the system text.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from umed_plugin.checkpoints.folder import STOCK_TEMPLATES, UMED_TEMPLATES
from umed_plugin.errors import UsageError, unknown_name, warn

if TYPE_CHECKING:
    from llava.conversation import Conversation


SYSTEM = "You read medical images. Mark what is abnormal with its box, then name it."


@dataclass(frozen=True)
class TemplateSpec:
    """A prompt template: LLaVA's template ``stock`` with another ``system`` text."""

    stock: str
    system: str


TEMPLATES: dict[str, TemplateSpec] = {
    "umed_v1": TemplateSpec("llava_v1", SYSTEM),
    "umed_mistral": TemplateSpec("mistral_instruct", SYSTEM),
}

_OF_MISTRAL = ("mistral_instruct",)


def conversation_template(name: str) -> Conversation:
    """A new, empty LLaVA conversation for one of our templates or a stock one.

    Raises:
        UsageError: there is no such template.
    """
    from llava.conversation import conv_templates

    stock = TEMPLATES[name].stock if name in TEMPLATES else name
    if stock not in conv_templates:
        raise UsageError(unknown_name("template", name, {*conv_templates, *TEMPLATES}))
    conversation = conv_templates[stock].copy()
    if name in TEMPLATES:
        conversation.system = TEMPLATES[name].system
    return conversation


def check_template(name: str | None) -> None:
    """Refuse an unknown template before LLaVA is imported or a checkpoint is read, both of which take long.

    The names are read from LLaVA's source. Where they cannot be read so, `conversation_template` checks them later.

    Raises:
        UsageError: there is no such template.
    """
    stock = _names_in_source()
    if name is not None and stock and name not in {*stock, *TEMPLATES}:
        raise UsageError(f"--template: {unknown_name('template', name, {*stock, *TEMPLATES})}")


def _names_in_source() -> set[str]:
    """The keys of ``conv_templates`` in LLaVA's ``conversation.py``, which is not imported; empty if they are not found."""
    try:
        package = importlib.util.find_spec("llava")
        folders = (package and package.submodule_search_locations) or []
        module = ast.parse(b"".join((Path(folder) / "conversation.py").read_bytes() for folder in folders))
    except (OSError, SyntaxError, ValueError):
        return set()
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "conv_templates":
            keys = node.value.keys if isinstance(node.value, ast.Dict) else []
            return {str(key.value) for key in keys if isinstance(key, ast.Constant)}
    return set()


def is_of_family(name: str, model_type: str) -> bool:
    """Whether a template is of the family (Mistral or Llama) of a checkpoint's ``model_type``."""
    stock = TEMPLATES[name].stock if name in TEMPLATES else name
    return (stock in _OF_MISTRAL) == ("mistral" in model_type)


def warn_of_other_family(name: str | None, model_type: str) -> None:
    """Warn if the template that a user chose is not of the checkpoint's family. None: the user chose none."""
    if name is not None and not is_of_family(name, model_type):
        warn(
            f"--template {name}: is not of the family of the checkpoint, whose model_type is {model_type!r}. A checkpoint that "
            f"was not trained under it gives empty or garbled answers. Its own: {STOCK_TEMPLATES.get(model_type)}, or "
            f"{UMED_TEMPLATES.get(model_type)} after an upgrade."
        )


def separators(name: str) -> tuple[str, ...]:
    """The texts at which LLaVA's masking cuts a conversation under a template. In a turn, they would shift what is supervised.

    Raises:
        UsageError: there is no such template.
    """
    from llava.conversation import SeparatorStyle

    conversation = conversation_template(name)
    if conversation.sep_style == SeparatorStyle.TWO:
        return (conversation.sep2, f"{conversation.sep}{conversation.roles[1]}: ")
    if conversation.sep_style == SeparatorStyle.LLAMA_2:
        return (conversation.sep2, "[INST]", "[/INST]")
    # The other styles are masked by the lengths of their turns, or by tokens that no text holds.
    return (conversation.sep,) if conversation.sep_style == SeparatorStyle.MPT else ()


def question_prompt(question: str, template_name: str) -> str:
    """The prompt up to the beginning of the answer; ``<image>`` and a newline are prepended if they are missing."""
    conversation = conversation_template(template_name)
    if "<image>" not in question:
        question = "<image>\n" + question
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()
