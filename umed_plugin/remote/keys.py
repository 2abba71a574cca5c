"""API keys from the environment, at every door the same: read without white space around them, and never shown.

A key that was copied with its line's end, or read from a file of Windows, has a line feed or carriage return behind it. No
HTTP header can hold those, and the libraries that refuse them show the whole header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from umed_plugin.errors import UmedError


def key_in(variable: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key in an environment variable, without white space around it; None: there is none.

    Raises:
        UmedError: no header can hold it; the message names the variable and not the key.
    """
    for fault in key_faults(variable, environment):
        raise UmedError(fault)
    return _stripped(variable, environment)


def key_faults(variable: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence if no header can hold the key in an environment variable; the sentence does not show the key."""
    key = _stripped(variable, environment) or ""
    wrong = [place for place, letter in enumerate(key, 1) if not " " <= letter <= "~"]
    if not wrong:
        return []
    return [
        f"the environment variable {variable} holds a key whose character {wrong[0]} of {len(key)} cannot be sent. Allowed are "
        "ASCII letters, digits and punctuation. Copy the key anew, without line breaks."
    ]


def _stripped(variable: str, environment: Mapping[str, str]) -> str | None:
    return environment.get(variable, "").strip() or None


def without_key(key: str | None, text: str) -> str:
    """``text`` with stars in place of the key, also as Python and JSON write it within quotes."""
    if not key:
        return text
    # The longest form first: in a text that escapes the key, the bare form may be part of it.
    for form in sorted({key, repr(key)[1:-1], json.dumps(key)[1:-1]}, key=len, reverse=True):
        text = text.replace(form, "***")
    return text
