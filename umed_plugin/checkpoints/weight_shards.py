"""Weight files larger than memory: read tensor by tensor, write shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.pickles import read_pickle
from umed_plugin.checkpoints.safe_loading import check_plain
from umed_plugin.checkpoints.stored import TORCH_NAMES, StoredTensor, read_safetensors
from umed_plugin.errors import UmedError
from umed_plugin.files import write_json

# Size of a safetensors header with its length, which is written last. A tensor needs its name, and less than the second number.
_HEADER_BYTES, _ENTRY_BYTES = 2**16, 160
_SHARD_BYTES = 2_000_000_000


def stream(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor) of one weight file, of which one tensor at a time is read.

    Raises:
        UmedError: a value is NaN or infinite.
    """
    for name, tensor in stored(file).items():
        value = tensor.read()
        refuse_not_finite(
            name, value, file, "No model can answer with them. Copy or download it again, or train it again."
        )
        yield name, value


def refuse_not_finite(name: str, tensor: Any, where: Path | str, advice: str) -> None:
    """Refuse a tensor of weights in which values are NaN or infinite.

    Args:
        name, tensor: the tensor.
        where: the file or folder that it is of, and what it is there.
        advice: what to do, for the message.

    Raises:
        UmedError: it holds such values.
    """
    lost = tensor.numel() - int(tensor.isfinite().sum())
    if lost:
        raise UmedError(f"{where}: {lost} of {tensor.numel()} values of {name} are NaN or infinite. {advice}")


def of_all_bytes(files: Sequence[Path], progress: Callable[[int, int], None] | None) -> Callable[[int], None] | None:
    """``progress(done, total)`` as a function of ``done`` bytes, with the size of ``files`` as the total."""
    if progress is None:
        return None
    total = sum(file.stat().st_size for file in files)
    return lambda done: progress(min(done, total), total)


def told(files: Sequence[Path], progress: Callable[[int, int], None] | None) -> Iterator[Path]:
    """The files; ``progress`` is called with (files done, files in all) after each."""
    for done, file in enumerate(files, start=1):
        yield file
        if progress is not None:
            progress(done, len(files))


def stored(file: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of one weight file, none of which is read yet.

    Raises:
        UmedError: the file holds more than plain tensors, or cannot be read.
    """
    check_plain([file])
    return read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file).tensors


class SafetensorsFile:
    """Writes one safetensors file tensor by tensor. `safetensors.torch.save_file` holds all of them, and a copy of each.

    Args:
        path: the file.
        names: of the tensors that will be added, if they are known: the header gets room for them.
    """

    def __init__(self, path: Path, names: Iterable[str] = ()) -> None:
        self._room = max(_HEADER_BYTES, 128 + sum(map(_entry_bytes, names)))
        self._room += -self._room % 8
        self._stream = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self._stream.write(b"\0" * self._room)
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = self._end = 0

    def fits(self, name: str) -> bool:
        """Whether the header has room for one more tensor."""
        return self._header_bytes + _entry_bytes(name) < self._room - 64

    def add(self, name: str, tensor: Any) -> None:
        """Append one tensor.

        Raises:
            ValueError: the header is full; see `fits`.
        """
        import torch

        if not self.fits(name):
            raise ValueError(f"{self._stream.name}: too many tensors for one file")
        flat = tensor.detach().contiguous().reshape(-1)
        size = flat.numel() * flat.element_size()
        kind = next(kind for kind, dtype in TORCH_NAMES.items() if flat.dtype == getattr(torch, dtype))
        place = [self._end, self._end + size]
        self._header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": place}
        if size:
            self._stream.write(memoryview(flat.view(torch.uint8).numpy()))
        self._end += size
        self._header_bytes += _entry_bytes(name)

    def close(self) -> None:
        """Write the header, padded with spaces as the format allows."""
        header = json.dumps(self._header, separators=(",", ":")).encode()
        self._stream.seek(0)
        self._stream.write((self._room - 8).to_bytes(8, "little") + header.ljust(self._room - 8))
        self._stream.close()


def _entry_bytes(name: str) -> int:
    """More than the header needs for one tensor."""
    return len(json.dumps(name)) + _ENTRY_BYTES


class PickleFile:
    """As `SafetensorsFile`, for ``.bin`` files: they are in memory until they are written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, Any] = {}

    def add(self, name: str, tensor: Any) -> None:
        """Add one tensor."""
        self._tensors[name] = tensor.contiguous()

    def close(self) -> None:
        """Write the file."""
        import torch

        torch.save(self._tensors, self._path)


def weight_writer(path: Path, names: Iterable[str]) -> SafetensorsFile | PickleFile:
    """A writer for a weight file of that name, with tensors of these names."""
    return SafetensorsFile(path, names) if path.suffix == ".safetensors" else PickleFile(path)


class ShardWriter:
    """Writes tensors to safetensors files of a bounded size, with one tensor in memory.

    Args:
        folder: to write ``model.safetensors``, or shards and their index, into.
        progress: called with the number of bytes added so far.
    """

    def __init__(self, folder: Path, progress: Callable[[int], None] | None = None) -> None:
        self._folder, self._progress = folder, progress
        self._file: SafetensorsFile | None = None
        self._bytes = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Any) -> None:
        """Add one tensor."""
        if self._file is None or self._bytes >= _SHARD_BYTES or not self._file.fits(name):
            self._flush()
            self._shards.append([])
            self._file = SafetensorsFile(self._folder / f"shard-{len(self._shards)}")
        self._file.add(name, tensor)
        self._shards[-1].append(name)
        self._bytes += tensor.numel() * tensor.element_size()
        if self._progress is not None:
            self._progress(self._total + self._bytes)

    def _flush(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None
        self._total += self._bytes
        self._bytes = 0

    def finish(self) -> None:
        """Write the remaining tensors, rename the files and write their index."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            (self._folder / "shard-1").rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            file = f"model-{number:05}-of-{count:05}.safetensors"
            (self._folder / f"shard-{number}").rename(self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self._folder / "model.safetensors.index.json", index, indent=2)
