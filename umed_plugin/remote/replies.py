"""What comes back from a model's server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

# A chat message as the server takes it: ``role`` and ``content``, text or a list of parts.
Message = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What the model wrote.

    Attributes:
        text: ``None`` when it refused or wrote nothing.
        usage: ``prompt_tokens`` and ``completion_tokens``, as far as the server counted them.
        finish_reason: ``stop``, ``length`` when the text was cut off, ...
        model: that answered, as the server calls it.
    """

    text: str | None
    usage: dict[str, int]
    finish_reason: str
    model: str = ""


@dataclass(frozen=True)
class Failure:
    """Why there is no reply; ``status`` is the HTTP status where there was one."""

    reason: str
    status: int | None = None


@dataclass(frozen=True)
class Unreadable(Failure):
    """The server said 200 and sent what is no chat completion: it may have counted it all the same."""


Answer = Union[Reply, Failure]
