"""Who may speak to the server: pages of its own, by an address that no foreign name server can have turned to this machine.

A page on the internet can send requests to programs on its reader's machine. Two checks stop it. Its scripts' requests carry its
own ``Origin``, which is not ours. And under DNS rebinding, where its name suddenly stands for 127.0.0.1, the ``Host`` is that
name: here only numbers, ``localhost`` and the name that the server was started with are taken. A port is not checked, since a
tunnel may have another at its end.
"""

from __future__ import annotations

import ipaddress
from typing import Optional
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refusal(
    host_header: Optional[str], origin: Optional[str], fetch_site: Optional[str], own_name: str
) -> Optional[str]:
    """Why a request is not answered, or None.

    Args:
        host_header, origin, fetch_site: headers ``Host``, ``Origin`` and ``Sec-Fetch-Site``; None where there is none.
        own_name: what the server was told to listen on.
    """
    if not host_header or not _is_ours(_name_of(host_header), own_name):
        return "This server answers only under a numeric address, localhost, or the name it was started with."
    if origin is not None and urlsplit(origin).netloc.lower() != host_header.lower():
        return "This request comes from another page."
    if fetch_site not in (None, "same-origin", "none"):
        return "This request comes from another page."
    return None


def _name_of(host_header: str) -> str:
    """The host without its port and without the brackets of IPv6; empty where it is malformed."""
    try:
        return urlsplit(f"//{host_header}").hostname or ""
    except ValueError:
        return ""


def _is_ours(name: str, own_name: str) -> bool:
    if name in ("localhost", own_name.lower()):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
