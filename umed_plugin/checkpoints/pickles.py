"""Read files written by `torch.save` without running any code in them.

A pickle is a program: it names functions and calls them. This reader records every name and imports nothing. Tensors become a
`StoredTensor` (name, shape, offset in the file); anything else becomes an object that does nothing. A file is plain if it names
nothing beyond what ``torch.load(weights_only=True)`` allows.

Both formats are supported: the zip archive since PyTorch 1.6, and the older sequence of pickles. Two others are programs by
their nature and are refused: a TorchScript archive, which every `torch.load` hands to `torch.jit.load`, and the tar archive of
PyTorch before 0.1.10, whose members are pickles of their own.
"""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from umed_plugin.checkpoints.archives import PROGRAM, Entry, begin_of, is_archive, read_entries
from umed_plugin.checkpoints.stored import BYTES, BadFile, StoredTensor, refuse_placeholder

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}  # fmt: skip
# A pickle may request any operation on any object, and a zip archive any offset: if that fails, it is not a file of tensors.
_NO_TENSORS = (
    AttributeError, IndexError, KeyError, MemoryError, NotImplementedError, OSError, OverflowError, RecursionError, TypeError,
    ValueError, struct.error,
)  # fmt: skip
_MAGIC = 0x1950A86A20F9469CFC6C  # first value in the sequence of pickles


@dataclass(frozen=True)
class Pickled:
    """The content of a PyTorch file.

    Attributes:
        tensors: by key; empty if the file is not a dictionary of tensors.
        foreign: names (``module.name``) that do not occur in a file of plain tensors, sorted.
    """

    tensors: dict[str, StoredTensor]
    foreign: tuple[str, ...]


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Nothing:
    """Stands in for any object that a pickle names: it can be called, filled and restored, and does nothing."""

    def __new__(cls, *args: Any, **keywords: Any) -> _Nothing:
        return object.__new__(cls)

    def __init__(self, *args: Any, **keywords: Any) -> None:
        pass

    def __call__(self, *args: Any, **keywords: Any) -> _Nothing:
        return _Nothing()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Ignore the value, like `extend` and `add`."""

    extend = add = append


def _tensor(storage: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> Any:
    return _Tensor(storage, offset, tuple(shape), tuple(stride)) if isinstance(storage, _Storage) else _Nothing()


# What torch.load(weights_only=True) of PyTorch 2.0 allows, and what replaces it here.
_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
    ("torch", "Size"): tuple,
    ("torch", "device"): _Nothing,
    ("torch", "Tensor"): _Nothing,
    ("torch.nn.parameter", "Parameter"): _Nothing,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{("torch.storage", name): dtype for name, dtype in _STORAGES.items()},
}
_DTYPES = ("float16", "bfloat16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")


class _Reader(pickle.Unpickler):
    """Records the names in a pickle, and imports none of them."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self.foreign: set[str] = set()
        self.storages: dict[str, str] = {}  # key -> dtype

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and name in _DTYPES:
            return _Nothing
        self.foreign.add(printable(f"{module}.{name}"))
        return _Nothing

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key = pid[:3] if isinstance(pid, tuple) and len(pid) >= 3 else (None, None, None)
        if kind != "storage" or not isinstance(dtype, str):
            return _Nothing()
        self.storages[str(key)] = dtype
        return _Storage(dtype, str(key))


def printable(text: str) -> str:
    """``text`` without control characters, which a terminal would obey."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def read_pickle(file: Path) -> Pickled:
    """Read a file written by `torch.save`.

    Raises:
        BadFile: it is truncated, is a program, or is not a PyTorch file.
    """
    refuse_placeholder(file)
    with open(file, "rb") as stream:
        zipped = is_archive(stream)
        try:
            refuse_program(stream)
            return _read_zip(file) if zipped else _read_sequence(file)
        except (EOFError, pickle.UnpicklingError) as error:
            code = "file-truncated" if zipped or isinstance(error, EOFError) else "file-unreadable"
            raise BadFile(code, f"cannot be read as a PyTorch file ({error})") from error
        except _NO_TENSORS as error:
            raise BadFile("file-unreadable", f"cannot be read as a PyTorch file ({error!r})") from error


def refuse_program(stream: IO[bytes]) -> None:
    """Refuse a file that no flag of `torch.load` makes safe: a TorchScript archive, or a tar archive of old PyTorch.

    Args:
        stream: the whole file; read from its start, and left there.

    Raises:
        BadFile: it is one of the two.
    """
    try:
        if is_archive(stream):
            _refuse_torchscript(stream)
        # Of an archive too: its first bytes can be the name of a tar archive's first member.
        stream.seek(0)
        _refuse_tar(stream)
    finally:
        stream.seek(0)


def _refuse_torchscript(stream: IO[bytes]) -> None:
    # PyTorch calls an archive TorchScript if it has constants.pkl.
    names = list(read_entries(stream))
    if any(name.rpartition(b"/")[2] == b"constants.pkl" or b"code" in name.split(b"/")[:-1] for name in names):
        raise BadFile(PROGRAM, "is a TorchScript archive, which contains code that runs when it is loaded")


def _refuse_tar(stream: IO[bytes]) -> None:
    try:
        with tarfile.open(fileobj=stream, mode="r:"):
            pass
    except (tarfile.TarError, ValueError, OverflowError):
        return
    raise BadFile(
        PROGRAM, "is a tar archive of PyTorch before 0.1.10, which cannot be read without running its pickles"
    )


def _read_zip(file: Path) -> Pickled:
    with open(file, "rb") as stream:
        entries = read_entries(stream)
        # PyTorch takes the folder of the first entry.
        folder, slash, _ = next(iter(entries)).partition(b"/")
        folder += slash
        inner = _as_stored(entries, folder + b"data.pkl") if slash else None
        if inner is None:
            raise BadFile("file-unreadable", "is a zip archive that PyTorch did not write")
        stream.seek(begin_of(stream, inner))
        reader = _Reader(io.BytesIO(stream.read(inner.size)))
        content = reader.load()

    def offset_of(storage: _Storage) -> int:
        entry = _as_stored(entries, folder + f"data/{storage.key}".encode().lower())
        if entry is None:
            raise KeyError(storage.key)
        with open(file, "rb") as stream:
            return begin_of(stream, entry)

    return Pickled(_stored(file, content, offset_of), tuple(sorted(reader.foreign)))


def _as_stored(entries: Mapping[bytes, Entry], name: bytes) -> Entry | None:
    """The entry of that name; None if it is compressed, which PyTorch never does: it may unpack to any size."""
    entry = entries.get(name)
    return entry if entry is not None and entry.is_plain else None


def _read_sequence(file: Path) -> Pickled:
    """Format before PyTorch 1.6: magic number, version, machine, content, storage keys, then the storages one after another."""
    with open(file, "rb") as stream:
        readers = [_Reader(stream)]
        if readers[0].load() != _MAGIC:
            return _read_bare(file)
        # Each of the five pickles can call functions: PyTorch's version, the machine, the content and the keys too.
        for _ in range(2):
            readers.append(_Reader(stream))
            readers[-1].load()
        readers.append(reader := _Reader(stream))
        content = reader.load()
        readers.append(_Reader(stream))
        keys = [str(key) for key in readers[-1].load()]
        position = stream.tell()
        offsets = {}
        for key in keys:
            stream.seek(position)
            (count,) = struct.unpack("<q", stream.read(8))
            offsets[key] = position + 8
            position += 8 + count * BYTES[reader.storages[key]]
    if position > file.stat().st_size:
        raise BadFile("file-truncated", f"has {position - file.stat().st_size} bytes fewer than its tensors need")
    foreign = set().union(*(each.foreign for each in readers))
    return Pickled(_stored(file, content, lambda storage: offsets[storage.key]), tuple(sorted(foreign)))


def _read_bare(file: Path) -> Pickled:
    """A plain pickle, not written by PyTorch."""
    with open(file, "rb") as stream:
        reader = _Reader(stream)
        reader.load()
    return Pickled({}, tuple(sorted(reader.foreign)))


def _tensors(content: Any) -> dict[str, _Tensor]:
    if not isinstance(content, Mapping):
        return {}
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, _Tensor)}


def _stored(file: Path, content: Any, offset_of: Callable[[_Storage], int]) -> dict[str, StoredTensor]:
    begins: dict[str, int] = {}
    tensors = {}
    for name, tensor in _tensors(content).items():
        key, dtype = tensor.storage.key, tensor.storage.dtype
        if min((tensor.offset, *tensor.shape, *tensor.stride)) < 0 or len(tensor.shape) != len(tensor.stride):
            raise ValueError(f"{name} has shape {tensor.shape} and stride {tensor.stride}")
        if key not in begins:
            begins[key] = offset_of(tensor.storage)
        start = begins[key] + tensor.offset * BYTES[dtype]
        stride = None if tensor.stride == _contiguous(tensor.shape) else tensor.stride
        tensors[name] = StoredTensor(name, dtype, tensor.shape, file, start, stride)
    return tensors


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stride of a contiguous tensor."""
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= size
    return tuple(reversed(steps))
