"""LLaVA's conversation templates as Jinja chat templates that produce the same tokens, for other programs.

LLaVA splits a prompt at ``<image>`` and tokenizes the parts separately, so sentencepiece puts a space before the first word of
each part. A transformers tokenizer gets the prompt as a whole. If it puts a space only at the very start (``legacy: false``), the
chat template writes the other spaces as a ``gap``, and the token ids are the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from umed_plugin.checkpoints.prompt_templates import conversation_template
from umed_plugin.errors import UmedError

IMAGE = "<image>"
START, END = "<im_start>", "<im_end>"  # around <image> if mm_use_im_start_end is set

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
    """The text around system text, questions and answers, as LLaVA's ``Conversation.get_prompt`` writes it."""

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
    """The chat template for one of LLaVA's conversation templates or ours.

    It begins with BOS. If you render it to text and tokenize that text, do not add special tokens;
    ``apply_chat_template(tokenize=True)`` and vLLM do not either. A system message replaces the template's own system text.
    Images appear where the message has them, one per line.

    Args:
        name: such as ``umed_mistral``.
        gap: gives a space to the token after BOS: ``""`` or ``" "``.
        image: placeholder of an image in the text, with its own gap.

    Raises:
        UsageError: there is no such template.
        UmedError: it is not a conversation (``plain``).
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
        f"--template {name}: is not a conversation (it is for pretraining), so it has no chat template. Name the template with "
        "which the checkpoint is prompted, such as umed_mistral or llava_v1."
    )
