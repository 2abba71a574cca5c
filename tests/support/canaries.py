"""Files that run code when they are loaded without care: each makes a folder or file, its canary."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

KINDS = ("reduce", "old reduce", "bare pickle", "torchscript", "tar")
# Archives in which Python's zipfile finds only tensors, and PyTorch's reader finds code.
DISGUISED = ("other case", "two directories", "two directories of a script", "tar before a zip")


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.canary,)


def hostile(kind: str, file: Path, canary: Path, content: Any = None) -> Path:
    """Write ``file``, which makes ``canary`` when it is loaded without care.

    Args:
        kind: one of `KINDS` or `DISGUISED`.
        file: where to write.
        canary: what appears if code runs.
        content: what the file should hold besides; a dictionary, for the first two kinds.
    """
    _WRITERS[kind](file, canary, {} if content is None else content)
    return file


def _reduce(file: Path, canary: Path, content: Any) -> None:
    torch.save({**content, "zz": Hostile(canary)}, file)


def _old_reduce(file: Path, canary: Path, content: Any) -> None:
    torch.save({**content, "zz": Hostile(canary)}, file, _use_new_zipfile_serialization=False)


def _bare_pickle(file: Path, canary: Path, content: Any) -> None:
    file.write_bytes(pickle.dumps(Hostile(canary)))


def _torchscript(file: Path, canary: Path, content: Any) -> None:
    # The path is a constant of the compiled code, so each canary needs a source of its own.
    source = file.with_name(f"_script_{abs(hash(str(canary)))}.py")
    source.write_text(
        "import torch\n"
        "class Scripted(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.x = torch.zeros(4)\n"
        "    @torch.jit.export\n    def __getstate__(self):\n        return (self.x, self.training)\n"
        "    @torch.jit.export\n    def __setstate__(self, state: tuple[torch.Tensor, bool]):\n"
        f"        self.x = torch.from_file({str(canary)!r}, True, 4)\n        self.training = state[1]\n"
        "    def forward(self):\n        return self.x\n".replace("tuple[", "Tuple[").replace(
            "import torch\n", "from typing import Tuple\nimport torch\n"
        )
    )
    import importlib.util

    spec = importlib.util.spec_from_file_location(source.stem, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.jit.save(torch.jit.script(module.Scripted()), str(file))
    source.unlink()


def _tar(file: Path, canary: Path, content: Any) -> None:
    """The format of PyTorch before 0.1.10: ``sys_info`` and ``pickle`` are unpickled without a check."""
    payload = pickle.dumps(Hostile(canary), protocol=2)
    with tarfile.open(file, "w") as archive:
        for name, data in (("sys_info", payload), ("pickle", payload), ("storages", payload), ("tensors", payload)):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def _benign(content: Any) -> dict[str, bytes]:
    """The entries of a file of plain tensors."""
    stream = io.BytesIO()
    torch.save({"w": torch.ones(2, 3), **content}, stream)
    with zipfile.ZipFile(stream) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def _other_case(file: Path, canary: Path, content: Any) -> None:
    """PyTorch compares names without their case, and takes the folder of the first entry."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/DATA.PKL", pickle.dumps(Hostile(canary), protocol=2))
        archive.writestr("archive/version", b"3\n")
        for name, data in _benign(content).items():
            archive.writestr(f"archive/sub/{name}", data)


def _two_directories(file: Path, canary: Path, content: Any) -> None:
    benign = _benign(content)
    _write_twice(file, {**benign, "data.pkl": pickle.dumps(Hostile(canary), protocol=2)}, benign)


def _two_directories_of_a_script(file: Path, canary: Path, content: Any) -> None:
    _torchscript(file, canary, content)
    with zipfile.ZipFile(file) as archive:
        script = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    _write_twice(file, script, _benign(content))


def _tar_before_a_zip(file: Path, canary: Path, content: Any) -> None:
    """Its first two bytes are those of a zip archive, and so is its end."""
    payload = pickle.dumps(Hostile(canary), protocol=2)
    with tarfile.open(file, "w") as archive:
        for name in ("PKx", "sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            archive.addfile(entry, io.BytesIO(payload))
    with zipfile.ZipFile(file, "a") as zipped:
        for name, data in _benign(content).items():
            zipped.writestr(f"archive/{name}", data)


def _write_twice(file: Path, stated: dict[str, bytes], adjacent: dict[str, bytes]) -> None:
    """An archive with two directories: the end states the place of the first, and the second lies before the end."""
    missing = len(stated) - len(adjacent)
    adjacent = {**adjacent, **{f"p{number}": b"" for number in range(missing)}}
    sides, data = [], b""
    for entries in (stated, adjacent):
        data += bytes(2**16) if sides else b""  # room for the subtraction below
        sides.append([])
        for name, value in entries.items():
            sides[-1].append([f"archive/{name}".encode(), zlib.crc32(value), len(value), len(data)])
            numbers = (20, 0, 0, 0, 0, zlib.crc32(value), len(value), len(value), len(sides[-1][-1][0]), 0)
            data += struct.pack("<4s5H3I2H", b"PK\3\4", *numbers) + sides[-1][-1][0] + value
    # zipfile subtracts the first directory's length from every place. Comments make the two equally long.
    lengths = [sum(46 + len(entry[0]) for entry in side) for side in sides]
    size = max(lengths)
    for entry in sides[1]:
        entry[3] -= size
    first, second = (_directory(side, size - length) for side, length in zip(sides, lengths))
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(stated), len(stated), size, len(data), 0)
    file.write_bytes(data + first + second + end)


def _directory(entries: list[list[Any]], padding: int) -> bytes:
    """A directory of (name, sum, size, place), with a comment of some bytes in its last entry."""
    records = []
    for index, (name, checksum, size, place) in enumerate(entries, start=1):
        comment = padding if index == len(entries) else 0
        numbers = (20, 20, 0, 0, 0, 0, checksum, size, size, len(name), 0, comment, 0, 0, 0, place)
        records.append(struct.pack("<4s6H3I5H2I", b"PK\1\2", *numbers) + name + b"x" * comment)
    return b"".join(records)


_WRITERS: dict[str, Callable[[Path, Path, Any], None]] = {
    "reduce": _reduce, "old reduce": _old_reduce, "bare pickle": _bare_pickle, "torchscript": _torchscript, "tar": _tar,
    "other case": _other_case, "two directories": _two_directories, "tar before a zip": _tar_before_a_zip,
    "two directories of a script": _two_directories_of_a_script,
}  # fmt: skip
