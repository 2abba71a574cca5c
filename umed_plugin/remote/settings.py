"""What the flags of all that asks a paid server have in common, the judge's and the diagnosis writer's: read and checked.

Like `umed_plugin.flags.definition`, this imports the standard library alone.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

UNITS = ("requests", "tokens", "usd")
KEY_VARIABLE = "OPENAI_API_KEY"
SET_BY_US = ("model", "messages", "stream", "n")

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)")


def parse_budget(text: str) -> tuple[float, str]:
    """``20usd`` as amount and unit; ValueError when it is none."""
    found = _BUDGET.fullmatch(text.strip().lower())
    if found is None or found.group(2) not in UNITS or not float(found.group(1)):
        raise ValueError("must be a number above 0 and a unit, such as 5000requests, 2000000tokens or 20usd")
    return float(found.group(1)), found.group(2)


def parse_prices(text: str) -> tuple[float, float]:
    """``0.15,0.60``, US dollars for a million tokens read and written; ValueError when it is none."""
    try:
        read, written = (float(part) for part in text.split(","))
        fits = all(math.isfinite(price) and price >= 0 for price in (read, written)) and read + written > 0
    except ValueError:
        fits = False
    if not fits:
        raise ValueError("must be two numbers, US dollars for a million tokens read and written, such as 0.15,0.60")
    return read, written


def parse_options(text: str) -> dict[str, Any]:
    """Further fields of a request as a dictionary; ValueError when it is none."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found


def cost(tokens: Mapping[str, float], prices: tuple[float, float]) -> float:
    """US dollars for ``prompt_tokens`` and ``completion_tokens``, at dollars for a million of each."""
    return (tokens.get("prompt_tokens", 0) * prices[0] + tokens.get("completion_tokens", 0) * prices[1]) / 1e6


def spent(counts: Mapping[str, float], unit: str, prices: tuple[float, float] | None) -> float:
    """What ``requests``, ``prompt_tokens`` and ``completion_tokens`` come to in a budget's unit."""
    if unit == "usd":
        return cost(counts, prices or (0.0, 0.0))
    if unit == "requests":
        return counts.get("requests", 0)
    return counts.get("prompt_tokens", 0) + counts.get("completion_tokens", 0)


def package_fault(asker: str) -> list[str]:
    """That the ``openai`` package is missing or too old."""
    if importlib.util.find_spec("openai") is None or importlib.util.find_spec("openai.types.chat") is None:
        return [f"{asker} needs the package openai, 1.40 or newer: pip install 'openai>=1.40'"]
    return []


def server_faults(asker: str, flag: str, url: str | None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What is wrong with a server's address and key, as sentences; ``flag`` gives the address, ``asker`` wants it."""
    if url is None:
        if environment.get(KEY_VARIABLE):
            return []
        return [
            f"{asker}: the environment variable {KEY_VARIABLE} is not set, the only place for the key. "
            f"A server of your own that needs none: name it with {flag}."
        ]
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query
        secret = parts.username is not None or parts.password is not None
    except ValueError:
        fits, secret = False, False
    if secret:
        return [
            f"{flag} holds a user name or password; flags are saved and logged. Put the key into the environment "
            f"variable {KEY_VARIABLE}, and the address alone here."
        ]
    return [] if fits else [f"{flag} {url}: must be an address such as http://localhost:8000/v1."]
