"""HTTP clients for the ``openai`` package that stay with the given address and read no more of a reply than it may hold.

The package's own clients send a request, with its texts and images, wherever a server says, and unpack any reply as a whole. Its
classes come from ``httpx`` or, in later versions, ``httpx2``, so they are taken from the package.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import openai

MOST_BYTES = 8 * 2**20  # of a reply to one request
_UNPACKED = ("content-encoding", "content-length", "transfer-encoding")


class BoundedAsyncClient(openai.DefaultAsyncHttpxClient):
    """In place of a reply that is too long, a text that says so is returned, with the reply's own status.

    The request may be paid for, so it is not sent again, as it would be after an error.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(follow_redirects=False, **options)

    async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """The reply to a request, read as a whole unless ``stream``."""
        request.headers["Accept-Encoding"] = "identity"
        response = await super().send(request, stream=True, **options)
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
        return _whole(
            response, request, _unpacked(response, bytes(content), MOST_BYTES), MOST_BYTES, response.status_code
        )


class BoundedClient(openai.DefaultHttpxClient):
    """A reply that is too long is given the status 413, which the package raises as an error.

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
        return _whole(response, request, _unpacked(response, bytes(content), self.most_bytes), self.most_bytes, 413)


def _unpacked(response: Any, content: bytes, most: int) -> bytes:
    """The content, unpacked where a server has packed it unasked.

    It ends one byte behind ``most``, which tells that it is longer.
    """
    if response.headers.get("content-encoding", "identity") == "identity":
        return content
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(content, most + 1)
    except zlib.error:
        return json.dumps("a reply that is packed in a way that was not asked for").encode()


def _whole(response: Any, request: Any, content: bytes, most: int, too_long: int) -> Any:
    """The response with its content; of one that is too long, the status ``too_long`` and a text that says so."""
    status = response.status_code
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in _UNPACKED]
    if len(content) > most:
        status, content = too_long, json.dumps(f"a reply of more than {most} bytes").encode()
    return type(response)(status, headers=headers, content=content, request=request)
