"""Untrusted text as it may be shown: control characters, bidirectional overrides and broken Unicode are escaped."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

# Control and format characters, lone surrogates, and Unicode's line and paragraph separators.
_UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Hindi and Persian need the joiners; text has lines and tabs.
_SAFE = "\n\t\u200c\u200d"
_NOT_ASCII_TEXT = re.compile(r"[^\n\t\x20-\x7e]")
# Colours and the cursor movements of tqdm's bars, as libraries print them.
_LIBRARY_SEQUENCE = re.compile(r"\x1b\[[0-9;]*[mAK]")


def printable(text: str) -> str:
    r"""``text`` with every character that a terminal could obey shown as a Python escape; lines and tabs stay.

    Example:
        >>> print(printable("no" + chr(27) + "[2J.png"))
        no\x1b[2J.png
    """
    return _NOT_ASCII_TEXT.sub(_escaped, text)


def one_line(text: object) -> str:
    """As `printable`, and lines and tabs are escaped too: for a name inside a message."""
    return printable(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def printable_json(value: Any) -> str:
    """JSON in which the letters of all languages are readable, and unsafe characters are JSON escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return _NOT_ASCII_TEXT.sub(lambda match: json.dumps(match[0])[1:-1] if _is_unsafe(match[0]) else match[0], text)


def of_library(text: str) -> str:
    """What a library prints: colours are removed, other control characters escaped.

    A carriage return stays where tqdm writes it: at the beginning or the end.
    """
    plain = _LIBRARY_SEQUENCE.sub("", text)
    inner = plain.strip("\r")
    if inner == plain:
        return printable(plain)
    start = len(plain) - len(plain.lstrip("\r"))
    return plain[:start] + printable(inner) + plain[start + len(inner) :]


def _is_unsafe(character: str) -> bool:
    return character not in _SAFE and unicodedata.category(character) in _UNSAFE


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    return character.encode("unicode_escape").decode() if _is_unsafe(character) else character
