"""The run-length code of Label Studio's brush: bits of the library rle-pack, as a list of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_MOST_VALUES = 4 * 2**27  # four channels of 134 million pixels


class _Bits:
    """Bits of a byte string, read from the highest on."""

    def __init__(self, data: bytes) -> None:
        self._text = "".join(f"{byte:08b}" for byte in data)
        self._place = 0

    def read(self, count: int) -> int:
        text = self._text[self._place : self._place + count]
        if len(text) < count:
            raise ValueError("ends early")
        self._place += count
        return int(text, 2)


def decode_brush(code: Sequence[Any], width: int, height: int) -> np.ndarray:
    """The painted pixels of a brush region.

    The code begins with the number of values (32 bits), the bits of a value less one (5), and four lengths of run lengths less
    one (4 each). Each run has a bit (1: one value repeated, 0: values as they are), the number of its length (2), its length
    less one, and its values. The values are RGBA, row by row; a pixel is painted if its alpha is above 0.

    Returns:
        bool ``[height, width]``.

    Raises:
        ValueError: the code is damaged, or of another size.
    """
    if not code or not all(isinstance(byte, int) and 0 <= byte < 256 for byte in code):
        raise ValueError("is not a list of bytes")
    bits = _Bits(bytes(code))
    count, word = bits.read(32), bits.read(5) + 1
    if count != 4 * width * height or count > _MOST_VALUES:
        raise ValueError(f"holds {count} values; needed: 4 for each of {width} x {height} pixels")
    sizes = [bits.read(4) + 1 for _ in range(4)]
    values = np.zeros(count, np.uint32)
    place = 0
    while place < count:
        repeated = bits.read(1)
        end = place + 1 + bits.read(sizes[bits.read(2)])
        if end > count:
            raise ValueError("has a run that leaves the image")
        if repeated:
            values[place:end] = bits.read(word)
        else:
            values[place:end] = [bits.read(word) for _ in range(end - place)]
        place = end
    painted: np.ndarray = values.reshape(height, width, 4)[:, :, 3] > 0
    return painted
