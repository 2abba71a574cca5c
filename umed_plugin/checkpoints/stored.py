"""Tensors in weight files: names, shapes and offsets from the headers; values only on request, in pieces.

Headers and `StoredTensor.pieces` need no more memory than one piece of one tensor. A truncated or other file raises `BadFile`,
which says what the file is instead. Pickles are read by `umed_plugin.checkpoints.pickles`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_PIECE = 2**24
_LONGEST_HEADER = 100_000_000  # limit of the safetensors library
_LFS = b"version https://git-lfs"


class BadFile(Exception):
    """A weight file that cannot be read.

    Args:
        code: code of the finding to report.
        found: what the file is, in words.
    """

    def __init__(self, code: str, found: str) -> None:
        super().__init__(found)
        self.code, self.found = code, found


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: its key.
        dtype: safetensors name, such as ``F16``.
        shape: empty for a scalar.
        file: the weight file.
        start: byte offset of its first value.
        stride: in values; None if contiguous.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stride: tuple[int, ...] | None = None

    @property
    def values(self) -> int:
        """Number of values in the file, including gaps of a stride."""
        if self.stride is None or 0 in self.shape:
            return math.prod(self.shape)
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride))

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.values * BYTES[self.dtype]

    def torch_dtype(self) -> Any:
        """Its dtype in PyTorch."""
        import torch

        return getattr(torch, TORCH_NAMES[self.dtype])

    def pieces(self) -> Iterator[Any]:
        """Yield its values as flat torch tensors of at most 16 MiB, in file order.

        Raises:
            BadFile: the file ends within the tensor.
        """
        import torch

        dtype, left = getattr(torch, TORCH_NAMES[self.dtype]), self.size
        with open(self.file, "rb") as stream:
            stream.seek(self.start)
            while left:
                data = bytearray(min(left, _PIECE))
                if stream.readinto(data) < len(data):
                    raise BadFile("file-truncated", f"ends within {self.name}")
                left -= len(data)
                yield torch.frombuffer(data, dtype=dtype)

    def read(self) -> Any:
        """Read the whole tensor, in its shape."""
        import torch

        pieces = list(self.pieces())
        flat = torch.cat(pieces) if pieces else torch.empty(0, dtype=getattr(torch, TORCH_NAMES[self.dtype]))
        if self.stride is None:
            return flat.reshape(self.shape)
        return flat.as_strided(self.shape, self.stride)


def refuse_placeholder(file: Path) -> None:
    """Raise `BadFile` for an empty file, and for a git LFS pointer whose large file was not downloaded."""
    with open(file, "rb") as stream:
        start = stream.read(len(_LFS))
    if not start:
        raise BadFile("file-truncated", "is empty")
    if start == _LFS:
        raise BadFile("file-placeholder", f"is a git LFS pointer of {file.stat().st_size} bytes")


def read_safetensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header only.

    Raises:
        BadFile: it is truncated, or is not a safetensors file.
    """
    refuse_placeholder(file)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > _LONGEST_HEADER:
            raise BadFile("file-unreadable", "does not start like a safetensors file")
        if 8 + length > size:
            raise BadFile("file-truncated", f"ends within its header of {length} bytes")
        try:
            header = json.loads(stream.read(length))
        except (RecursionError, ValueError) as error:
            raise BadFile("file-unreadable", f"has a header that is not JSON ({error})") from error
    try:
        return _placed(file, header, 8 + length, size)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BadFile("file-unreadable", f"has a header that does not describe tensors ({error!r})") from error


def _placed(file: Path, header: dict[str, Any], begin: int, size: int) -> dict[str, StoredTensor]:
    """The tensors that a header names. Their data starts at byte ``begin`` and must end with the file."""
    header.pop("__metadata__", None)
    end = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        code, word = ("file-truncated", "fewer") if size < end else ("file-unreadable", "more")
        raise BadFile(code, f"has {abs(end - size)} bytes {word} than its header says ({size} instead of {end})")
    tensors = {}
    for name, entry in header.items():
        tensor = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, begin + entry["data_offsets"][0])
        if tensor.dtype not in BYTES or tensor.size != entry["data_offsets"][1] - entry["data_offsets"][0]:
            raise BadFile("file-unreadable", f"holds {name!r} as {entry}, whose shape and offsets do not match")
        if min((tensor.start, *tensor.shape)) < 0 or not all(type(size) is int for size in tensor.shape):
            raise BadFile("file-unreadable", f"holds {name!r} as {entry}, which is not a tensor's place")
        tensors[name] = tensor
    position = begin
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != position:
            word = "overlaps another tensor" if tensor.start < position else "leaves a gap before it"
            raise BadFile("file-unreadable", f"holds {tensor.name!r} at byte {tensor.start}, which {word}")
        position += tensor.size
    return tensors
