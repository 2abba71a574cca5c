"""The prompt templates of training and evaluation: LLaVA's stock templates with another system text.

Stock LLaVA does not know the ``umed_*`` templates and prompts an exported checkpoint with its own. Roles and separators must then
match those of training, so the templates differ only in the system text.
"""

from __future__ import annotations

from dataclasses import dataclass
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
