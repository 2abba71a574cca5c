"""What a request to a model's server returns: a reply, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

# A chat message as the server takes it: ``role`` and ``content``, text or a list of parts.
Message = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What the model wrote.

    Attributes:
        text: ``None`` when the model refused or wrote nothing.
        usage: ``prompt_tokens`` and ``completion_tokens``, as far as the server counted them.
        finish_reason: ``stop``, ``length`` when the text was cut off, ...
        model: the model that replied, as the server names it.
    """

    text: str | None
    usage: dict[str, int]
    finish_reason: str
    model: str = ""


@dataclass(frozen=True)
class Failure:
    """Why there is no reply. ``status`` is the HTTP status, if there was one."""

    reason: str
    status: int | None = None


@dataclass(frozen=True)
class Unreadable(Failure):
    """The server returned 200, but the body is not a chat completion. The server may have charged for it."""


RequestResult = Union[Reply, Failure]
