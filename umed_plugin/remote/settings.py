"""Flags that the judge and the diagnosis writer share, because both send requests to a paid server: parsing and checks.

Like `umed_plugin.flags.definition`, this module imports only the standard library.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from umed_plugin.files import parse_json
from umed_plugin.remote.keys import key_faults, key_in
from umed_plugin.terminal.text import one_line

UNITS = ("requests", "tokens", "usd")
KEY_VARIABLE = "OPENAI_API_KEY"
ADDRESS_VARIABLE = "OPENAI_BASE_URL"
OPENAI_ADDRESS = "https://api.openai.com/v1"
ROLLOUT_KEY_VARIABLE = "UMED_ROLLOUT_API_KEY"
# Largest mean difference of a rollout server's log-probabilities from ours, in nats a token, unless a flag says otherwise.
ROLLOUT_MAX_DIFFERENCE = 0.1
SET_BY_US = ("model", "messages", "stream", "n")

_MOST_TOKENS = 2**53  # above it, a sum of floats is no longer exact
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)")


@dataclass(frozen=True)
class ServerSettings:
    """Which model is asked, where, and with which requests.

    Attributes:
        model: the model's name on the server.
        base_url: address of the server. ``None`` is OpenAI's, or what ``OPENAI_BASE_URL`` says.
        options: further fields of each request, such as ``temperature``.
        timeout: seconds for one attempt.
        retries: further attempts after the first.
    """

    model: str
    base_url: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 120.0
    retries: int = 5


def parse_budget(text: str) -> tuple[float, str]:
    """``20usd`` as amount and unit.

    Raises:
        ValueError: the text is not a budget.
    """
    match = _BUDGET.fullmatch(text.strip().lower())
    if match is None or match.group(2) not in UNITS or not float(match.group(1)):
        raise ValueError("must be a number above 0 and a unit, such as 5000requests, 2000000tokens or 20usd")
    return float(match.group(1)), match.group(2)


def parse_prices(text: str) -> tuple[float, float]:
    """``0.15,0.60``: US dollars per million prompt tokens and per million completion tokens.

    Raises:
        ValueError: the text is not a pair of prices.
    """
    try:
        prompt, completion = (float(part) for part in text.split(","))
        fits = all(math.isfinite(price) and price >= 0 for price in (prompt, completion)) and prompt + completion > 0
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            "must be two numbers, US dollars per million prompt tokens and per million completion tokens, such as 0.15,0.60"
        )
    return prompt, completion


def parse_options(text: str) -> dict[str, Any]:
    """Further fields of a request, from JSON.

    Raises:
        ValueError: the text is not a JSON object.
    """
    options = parse_json(text)
    if not isinstance(options, dict):
        raise ValueError("not an object")
    return options


def is_count(value: Any) -> bool:
    """Whether what a server or a ledger gives as a number of tokens can be one; anything else counts as not given."""
    return type(value) is int and 0 <= value <= _MOST_TOKENS


def cost(tokens: Mapping[str, float], prices: tuple[float, float]) -> float:
    """US dollars for ``prompt_tokens`` and ``completion_tokens``; ``prices`` are dollars per million tokens of each."""
    return (tokens.get("prompt_tokens", 0) * prices[0] + tokens.get("completion_tokens", 0) * prices[1]) / 1e6


def spent(counts: Mapping[str, float], unit: str, prices: tuple[float, float] | None) -> float:
    """How much of a budget ``requests``, ``prompt_tokens`` and ``completion_tokens`` use, in the budget's unit."""
    if unit == "usd":
        return cost(counts, prices or (0.0, 0.0))
    if unit == "requests":
        return counts.get("requests", 0)
    return counts.get("prompt_tokens", 0) + counts.get("completion_tokens", 0)


def package_fault(requester: str) -> list[str]:
    """A fault if the ``openai`` package is missing or too old; ``requester`` is the flag that needs it."""
    if importlib.util.find_spec("openai") is None or importlib.util.find_spec("openai.types.chat") is None:
        return [f"{requester} needs the package openai, 1.40 or newer: pip install 'openai>=1.40'"]
    return []


def is_loopback(host: str) -> bool:
    """Whether a server on ``host`` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def rollout_server_faults(flag: str, url: str, remote_flag: str, remote: bool) -> list[str]:
    """Faults of the address of a rollout server, which gets embedded images, as sentences.

    Args:
        flag: the flag that gives the address.
        url: the address.
        remote_flag: the flag that allows another machine.
        remote: whether it is set.
    """
    faults = server_faults(flag, flag, url, key_variable=ROLLOUT_KEY_VARIABLE)
    host = None if faults else urlsplit(url).hostname
    if host is None or remote or is_loopback(host):
        return faults
    return [
        f"{flag} {url}: is another machine, and it would get the embedded images of the studies. Allowed without asking: "
        f"127.0.0.1, ::1 and localhost. An ssh tunnel makes another machine such an address; {remote_flag} allows this one."
    ]


def server_faults(
    requester: str,
    flag: str,
    url: str | None,
    environment: Mapping[str, str] = os.environ,
    key_variable: str = KEY_VARIABLE,
) -> list[str]:
    """Faults of a server's address and key, as sentences.

    Args:
        requester: the flag that needs a server.
        flag: the flag that gives the address.
        url: the address, or None.
        key_variable: the environment variable for the server's key.
    """
    bad_key = [f"{requester}: {fault}" for fault in key_faults(key_variable, environment)]
    if bad_key:
        return bad_key
    if url is not None:
        return _address_faults(flag, url, key_variable)
    if key_in(key_variable, environment) is None:
        return [
            f"{requester}: the environment variable {key_variable} is not set. It is the only place for the API key. "
            f"If your own server needs no key, give its address with {flag}."
        ]
    return _address_faults_of_environment(environment)


def _address_faults(flag: str, url: str, key_variable: str) -> list[str]:
    if "@" in _host_part(url):  # also in what is otherwise no address: it is shown below
        return [
            f"{flag} contains a user name or password, and flags are saved and logged. Put the key into the environment "
            f"variable {key_variable}, and only the address here."
        ]
    reason = _no_address(url)
    if reason is None:
        return []
    shown = one_line(url.partition("?")[0])  # a query may hold a key
    return [f"{flag} {shown}: must be an address such as http://localhost:8000/v1; {reason}."]


def _host_part(url: str) -> str:
    """What stands before the path, where a name and a password would be; all of a text without //."""
    return url.partition("//")[2].partition("/")[0] if "//" in url else url


def _address_faults_of_environment(environment: Mapping[str, str]) -> list[str]:
    """Faults of the address that the ``openai`` package takes from the environment; it may hold a password and is not shown."""
    url = address_from_environment(environment)
    reason = None if url is None else _no_address(url)
    if reason is None:
        return []
    return [
        f"the environment variable {ADDRESS_VARIABLE} must be an address such as http://localhost:8000/v1; {reason}. Correct it, "
        "or remove it to ask OpenAI's server."
    ]


def address_from_environment(environment: Mapping[str, str] = os.environ) -> str | None:
    """What ``OPENAI_BASE_URL`` says, without white space around it; OpenAI's address if that is empty; None if it is not set.

    The ``openai`` package would take the variable as it is written, a line's end or an empty text too.
    """
    written = environment.get(ADDRESS_VARIABLE)
    return None if written is None else written.strip() or OPENAI_ADDRESS


def _no_address(url: str) -> str | None:
    """Why a text is no address that requests can go to, to follow a semicolon; None if it is one."""
    if any(letter.isspace() or not letter.isprintable() for letter in url):
        return "this one holds white space or a control character"
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return "this one's host cannot be read"
    if parts.scheme not in ("http", "https"):
        return "it begins with http:// or https://"
    if not host:
        return "this one has no host"
    if "?" in url or "#" in url:
        return "a ? or # and what follows it cannot be part of it"
    try:
        port = parts.port
    except ValueError:
        port = 0
    return "its port must be a number from 1 to 65535" if port == 0 else None
