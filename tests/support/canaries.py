"""Files that run code when they are loaded without care: each makes a folder or file, its canary."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

KINDS = ("reduce", "old reduce", "bare pickle", "torchscript", "tar")


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.canary,)


def hostile(kind: str, file: Path, canary: Path, content: Any = None) -> Path:
    """Write ``file``, which makes ``canary`` when it is loaded without care.

    Args:
        kind: one of `KINDS`.
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


_WRITERS: dict[str, Callable[[Path, Path, Any], None]] = {
    "reduce": _reduce, "old reduce": _old_reduce, "bare pickle": _bare_pickle, "torchscript": _torchscript, "tar": _tar,
}  # fmt: skip
