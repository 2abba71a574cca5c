"""Where a server may send a request on to: to another path of its own, and to no other server.

Proxies and web frameworks do so, often only to add a slash. Texts and images of patients must not go elsewhere.
Only 307 and 308 keep the method and the body. Imports the standard library alone.
"""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

MOST_HOPS = 3  # of one request
_KEPT = (307, 308)
_PORTS = {"http": 80, "https": 443}


def may_follow(status: int, asked: str, target: str) -> bool:
    """Whether a reply of this status may send a request from one address on to another.

    Example:
        >>> may_follow(308, "http://host:8000/v1", "http://host:8000/v1/"), may_follow(308, "http://host/v1", "http://other/v1")
        (True, False)
    """
    try:
        return status in _KEPT and _server(urlsplit(asked)) == _server(urlsplit(target))
    except ValueError:  # no address
        return False


def origin(address: str) -> str:
    """Scheme, host and port of an address, without a name and password.

    Raises:
        ValueError: it is no address.

    Example:
        >>> origin("http://me:secret@host:81/api/v1/models")
        'http://host:81'
    """
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _server(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)
