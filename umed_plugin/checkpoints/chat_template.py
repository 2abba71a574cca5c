"""LLaVA's conversation templates in the form that other programs read: a Jinja chat template with the same tokens.

LLaVA cuts a prompt at ``<image>`` and tokenizes the parts by themselves, so sentencepiece puts a space before the first word of
each part. A tokenizer of transformers sees the prompt in one piece. Where it puts a space only at the very start
(``legacy: false``), the chat template writes the other ones as a ``gap``, and the ids come out the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from umed_plugin.checkpoints.prompt_templates import conversation_template
from umed_plugin.errors import UmedError

IMAGE = "<image>"
START, END = "<im_start>", "<im_end>"  # what LLaVA's callers write around it where mm_use_im_start_end is set

_FRAME = """\
{%- macro words(message) -%}
  {%- if message['content'] is string -%}
    {{- message['content'] | replace('<image>', IMAGE) -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' -%}{{- part['text'] | replace('<image>', IMAGE) -}}
      {%- else -%}{{- IMAGE + '\\n' -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = words(messages[0]) -%}{%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = SYSTEM -%}{%- set turns = messages -%}
{%- endif -%}
{{- bos_token + GAP + BEFORE_SYSTEM -}}
{%- if system or SYSTEM_ALWAYS -%}{{- SYSTEM_OPEN + system + SYSTEM_CLOSE -}}{%- endif -%}
{%- for message in turns -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('roles must take turns: user, assistant, user, ...') -}}
  {%- elif message['role'] == 'user' -%}
    {{- ('' if loop.first else USER_AGAIN) + USER_OPEN + words(message) + USER_CLOSE -}}
  {%- else -%}
    {{- ANSWER_OPEN + words(message) + ANSWER_CLOSE -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ANSWER_BEGINS -}}{%- endif -%}
"""


@dataclass(frozen=True)
class _Parts:
    """What stands around system text, questions and answers, as ``Conversation.get_prompt`` of LLaVA puts it there."""

    before_system: str = ""
    system_always: bool = True
    system_open: str = ""
    system_close: str = ""
    user_again: str = ""
    user_open: str = ""
    user_close: str = ""
    answer_open: str = ""
    answer_close: str = ""
    answer_begins: str = ""


def jinja_template(name: str, *, gap: str, image: str) -> str:
    """The chat template for a conversation template of LLaVA's or ours.

    It begins with BOS, so its text is tokenized without adding special tokens, as ``apply_chat_template(tokenize=True)`` and vLLM
    do. A system message takes the place of the template's own system text. Images stand where the message has them, a line each.

    Args:
        name: such as ``umed_mistral``.
        gap: what gives a space to the tokens behind BOS: ``""`` or ``" "``.
        image: what stands for an image in the text, with a gap of its own.

    Raises:
        UsageError: there is no such template.
        UmedError: it is no conversation (``plain``).
    """
    conversation = conversation_template(name)
    words = {key.upper(): value for key, value in vars(_parts(conversation, name)).items()}
    words.update(SYSTEM=conversation.system, GAP=gap, IMAGE=image)
    # Jinja reads JSON's strings and true/false.
    return "".join(f"{{%- set {key} = {json.dumps(value)} -%}}\n" for key, value in words.items()) + _FRAME


def _parts(conversation: Any, name: str) -> _Parts:
    from llava.conversation import SeparatorStyle

    (user, assistant), sep, sep2 = conversation.roles, conversation.sep, conversation.sep2
    style = conversation.sep_style
    if style == SeparatorStyle.LLAMA_2:
        return _Parts(
            before_system="[INST] ", system_always=False, system_open="<<SYS>>\n", system_close="\n<</SYS>>\n\n",
            user_again=f"{sep}[INST] ", user_close=" [/INST]", answer_open=" ", answer_close=f" {sep2}",
        )  # fmt: skip
    if style in (SeparatorStyle.TWO, SeparatorStyle.SINGLE):
        return _Parts(
            system_close=sep, user_open=f"{user}: ", user_close=sep, answer_open=f"{assistant}: ",
            answer_close=sep2 if style == SeparatorStyle.TWO else sep, answer_begins=f"{assistant}:",
        )  # fmt: skip
    if style == SeparatorStyle.MPT:
        return _Parts(
            system_close=sep, user_open=user, user_close=sep, answer_open=assistant, answer_close=sep,
            answer_begins=assistant,
        )  # fmt: skip
    raise UmedError(
        f"--template {name}: holds no conversation (it is for pretraining), so there is no chat to convert. Name the template "
        "that the checkpoint is asked with, such as umed_mistral or llava_v1."
    )
