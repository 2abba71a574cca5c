"""Which requests are allowed: only those of the server's own page. This protects against CSRF and DNS rebinding.

And whose they are: each browser gets a random cookie with the page, and sees the studies alone that it has uploaded itself.

Any website can make the browser send requests to programs on its user's machine. Two checks stop this:

- ``Origin``: requests from a foreign page's scripts carry that page's origin, not ours.
- ``Host``: under DNS rebinding a foreign name resolves to 127.0.0.1, and ``Host`` is that name. Allowed are only IP addresses,
  ``localhost`` and the name that the server was started with. The port is not checked, because a tunnel may use another one.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from http.cookies import CookieError, SimpleCookie
from typing import Optional
from urllib.parse import SplitResult, urlsplit


def refusal(
    host_header: Optional[str], origin: Optional[str], fetch_site: Optional[str], own_name: str
) -> Optional[str]:
    """The reason to refuse a request, or None if it is allowed.

    Args:
        host_header, origin, fetch_site: the headers ``Host``, ``Origin`` and ``Sec-Fetch-Site``; None if missing.
        own_name: the host name or address that the server listens on.
    """
    if not host_header or not _is_ours(_name_of(host_header), own_name):
        return "Wrong Host header. Allowed: an IP address, localhost, or the name that the server was started with."
    if origin is not None and not _is_same_host(origin, host_header):
        return "This request comes from another website. Allowed: requests from this server's own page."
    if fetch_site not in (None, "same-origin", "none"):
        return "This request comes from another website. Allowed: requests from this server's own page."
    return None


def split_or_none(address: str) -> Optional[SplitResult]:
    """The parts of an address that a client has sent; None if it is malformed, such as ``http://[``."""
    try:
        return urlsplit(address)
    except ValueError:
        return None


def _name_of(host_header: str) -> str:
    """The host without its port and without the brackets of IPv6; empty if malformed."""
    parts = split_or_none(f"//{host_header}")
    return (parts.hostname or "") if parts is not None else ""


def _is_same_host(origin: str, host_header: str) -> bool:
    parts = split_or_none(origin)
    return parts is not None and parts.netloc.lower() == host_header.lower()


def _is_ours(name: str, own_name: str) -> bool:
    if name in ("localhost", own_name.lower()):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


_COOKIE = "umed-serve"
_TOKEN = re.compile(r"[\w-]{22,64}", re.ASCII)


def person(cookie_header: Optional[str], address: str) -> str:
    """Whose request it is: the token in the browser's cookie, or the address of a client without one."""
    return _token(cookie_header) or f"address {address}"


def new_cookie(cookie_header: Optional[str]) -> Optional[str]:
    """The ``Set-Cookie`` header for a browser without a token; None if it has one.

    Scripts cannot read the cookie, other sites cannot send it, and it ends with the browser's session.
    """
    if _token(cookie_header):
        return None
    return f"{_COOKIE}={secrets.token_urlsafe(16)}; Path=/; HttpOnly; SameSite=Strict"


def _token(cookie_header: Optional[str]) -> Optional[str]:
    try:
        morsel = SimpleCookie(cookie_header or "").get(_COOKIE)
    except CookieError:
        return None
    return morsel.value if morsel is not None and _TOKEN.fullmatch(morsel.value) else None
