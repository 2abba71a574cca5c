"""HTTP clients for the ``openai`` package that stay with the given address and read no more of a reply than it may hold.

The package's own clients send a request, with its texts and images, wherever a server says, and unpack any reply as a whole. Its
classes come from ``httpx`` or, in later versions, ``httpx2``, so they are taken from the package.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import openai

from umed_plugin.remote.redirects import MOST_HOPS, may_follow

MOST_BYTES = 8 * 2**20  # of a reply to one request
TOO_LONG, PACKED = 413, 415  # statuses of replies that cannot be read, where they are errors
_UNPACKED = ("content-encoding", "content-length", "transfer-encoding")
# Ways to pack a reply. Other values of the header, such as utf-8 or none, say nothing about the content.
_ZLIB, _OTHERS = ("gzip", "x-gzip", "deflate"), ("br", "zstd", "compress", "x-compress")


class BoundedAsyncClient(openai.DefaultAsyncHttpxClient):
    """In place of a reply that cannot be read, a text that says so is returned, with the reply's own status.

    The request may be paid for, so it is not sent again, as it would be after an error.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(follow_redirects=False, **options)

    async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """The reply to a request, read as a whole unless ``stream``."""
        request.headers["Accept-Encoding"] = "identity"
        response = await super().send(request, stream=True, **options)
        for _ in range(MOST_HOPS):
            following = _on_same_server(response)
            if following is None:
                break
            await response.aclose()
            response = await super().send(following, stream=True, **options)
        if stream:
            return response
        content = bytearray()
        try:
            async for piece in response.aiter_raw():
                content += piece
                if len(content) > MOST_BYTES:
                    break
        finally:
            await response.aclose()
        return _whole(response, bytes(content), MOST_BYTES, errors=False)


class BoundedClient(openai.DefaultHttpxClient):
    """A reply that cannot be read is given the status `TOO_LONG` or `PACKED`, which the package raises as an error.

    Attributes:
        most_bytes: of a reply; a batch's files are longer than other replies.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(follow_redirects=False, **options)
        self.most_bytes = MOST_BYTES

    def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """The reply to a request, read as a whole unless ``stream``."""
        request.headers["Accept-Encoding"] = "identity"
        response = super().send(request, stream=True, **options)
        for _ in range(MOST_HOPS):
            following = _on_same_server(response)
            if following is None:
                break
            response.close()
            response = super().send(following, stream=True, **options)
        if stream:
            return response
        content = bytearray()
        try:
            for piece in response.iter_raw():
                content += piece
                if len(content) > self.most_bytes:
                    break
        finally:
            response.close()
        return _whole(response, bytes(content), self.most_bytes, errors=True)


def _on_same_server(response: Any) -> Any:
    """The request that a 307 or 308 asks for, if it goes to the same scheme, host and port; else None."""
    following = response.next_request
    if following is None:
        return None
    return following if may_follow(response.status_code, str(response.request.url), str(following.url)) else None


def _whole(response: Any, content: bytes, most: int, errors: bool) -> Any:
    """The response with its content unpacked, or with a text why it cannot be read, and then an error's status if ``errors``."""
    status, fault = response.status_code, None
    try:
        content = _unpacked(response, content, most)
    except (zlib.error, ValueError):
        packed = response.headers["content-encoding"]
        status, fault = PACKED, f"a reply packed as {packed!r} that cannot be unpacked; nothing packed was asked for"
    if len(content) > most:
        status, fault = TOO_LONG, f"a reply of more than {most} bytes"
    if fault is not None:
        content = json.dumps(fault).encode()
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in _UNPACKED]
    return type(response)(
        status if errors else response.status_code, headers=headers, content=content, request=response.request
    )


def _unpacked(response: Any, content: bytes, most: int) -> bytes:
    """The content, unpacked where a server has packed it unasked; one that is longer than ``most`` may end behind it.

    Raises:
        ValueError: it is packed in a way that cannot be unpacked here.
        zlib.error: it is not what its header says, or not whole.
    """
    codings = [coding.strip().lower() for coding in response.headers.get("content-encoding", "").split(",")]
    for coding in reversed(codings):
        if not content or len(content) > most:
            break
        if coding in _OTHERS:
            raise ValueError(coding)
        if coding in _ZLIB:
            content = _inflated(content, most)
    return content


def _inflated(content: bytes, most: int) -> bytes:
    try:
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
        unpacked = unpacker.decompress(content, most + 1)
    except zlib.error:  # some servers leave out the header of deflate
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        unpacked = unpacker.decompress(content, most + 1)
    if not unpacker.eof and len(unpacked) <= most:
        raise zlib.error("it ends too early")
    return unpacked
