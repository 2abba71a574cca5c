"""Weight files larger than memory: read tensor by tensor, write shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.loading import read_tensors
from umed_plugin.checkpoints.safe_loading import check_plain
from umed_plugin.files import write_json

# Size of a shard, which is in memory until it is written, except for tensors mapped from a safetensors file.
_SHARD_BYTES = 2_000_000_000


def stream(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor) of one weight file; safetensors are read one tensor at a time."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        check_plain([file])
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            for name in list(opened.keys()):
                yield name, opened.get_tensor(name)
    else:
        yield from read_tensors(file).items()


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


class ShardWriter:
    """Writes tensors to safetensors files of a bounded size, with at most one file's tensors in memory.

    Args:
        folder: to write ``model.safetensors``, or shards and their index, into.
        progress: called with the number of bytes added so far.
    """

    def __init__(self, folder: Path, progress: Callable[[int], None] | None = None) -> None:
        self._folder, self._progress = folder, progress
        self._waiting: dict[str, Any] = {}
        self._bytes = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Any) -> None:
        """Add one tensor."""
        tensor = tensor.contiguous()
        # safetensors refuses tensors that share memory (slices, tied weights of a pickle): store them separately.
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        self._waiting[name] = tensor if whole else tensor.clone()
        self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes >= _SHARD_BYTES:
            self._flush()
        if self._progress is not None:
            self._progress(self._total + self._bytes)

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self._waiting:
            self._shards.append(list(self._waiting))
            save_file(self._waiting, self._folder / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        self._total += self._bytes
        self._waiting, self._bytes = {}, 0

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
