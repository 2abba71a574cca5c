"""Which checkpoint an adapter or a projector was trained on: by the digests in its ``umed.json``, else by the name of its base.

On another base of the same shapes an adapter loads, merges and answers, and its answers are not those of the training.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.checkpoints.adapter_folder import named_base
from umed_plugin.checkpoints.folder import ADAPTER, weight_files
from umed_plugin.errors import UmedError, warn
from umed_plugin.files import text_bytes

MARKER = "umed.json"
CONTENT, WEIGHTS = "sha256", "weights_sha256"
_WHOLE_FILE_BYTES = 2**30
_CHUNK_BYTES, _CHUNKS = 2**14, 32
_WEIGHTS_APART = 2**23  # bytes between two parts that are read of the weights: less than a projector of 7B has
_warned: set[str] = set()  # a command looks for a base several times


def check_trained_on(trained: Path, base: Path) -> None:
    """Refuse a base that is not the one of the training; warn where that cannot be told for certain.

    Args:
        trained: a LoRA folder, or one with a projector.
        base: the checkpoint that is to be its base; a copy at another path is the same.

    Raises:
        UmedError: the base has other weights.
    """
    known, other = _of_training(trained), other_base(trained, base)
    if other is not None:
        raise UmedError(
            f"{other}. Pass the checkpoint of the training with --base. If these are the same weights in other files, move "
            f"{trained / MARKER} away."
        )
    if known is None:
        _compare_names(trained, base)
    elif WEIGHTS not in known and known[CONTENT] != content_digest(base):  # written before weights had their own digest
        _warn_once(
            f"{base}: its config.json or its weights are not those of {known['path']}, on which {trained} was trained. If only "
            "config.json was changed, this is no fault. Else pass the checkpoint of the training with --base."
        )


def other_base(trained: Path, base: Path) -> str | None:
    """That a base has other weights than the checkpoint of the training, in words; None if it has not, or none are known."""
    known = _of_training(trained)
    if known is None or WEIGHTS not in known or known[WEIGHTS] == weights_digest(base):
        return None
    return f"{base} has other weights than {known['path']}, on which {trained} was trained"


def _of_training(trained: Path) -> dict[str, Any] | None:
    """Path and digests of the checkpoint with which a training under umed-run began; None if they are not known."""
    marker = trained / MARKER
    settings = files.read_object(marker).get("settings") if marker.is_file() else None
    known = settings.get("model_name_or_path") if isinstance(settings, dict) else None
    return known if isinstance(known, dict) and {"path", CONTENT} <= {*known} else None


def _compare_names(trained: Path, base: Path) -> None:
    adapter = trained / ADAPTER
    named = files.read_object(adapter).get("base_model_name_or_path") if adapter.is_file() else None
    named = named_base(trained, named)
    if not isinstance(named, str) or not named or Path(named).name in (base.name, base.resolve().name):
        return
    if Path(named).is_dir() and weights_digest(Path(named)) == weights_digest(base):
        return
    _warn_once(
        f"{trained} names {named} as its base, and is used over {base}. Is that the checkpoint on which it was trained?"
    )


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warn(text)


def content_digest(path: Path) -> str | None:
    """The digest of a file, or of a checkpoint's configuration and weights; None for any other folder."""
    if path.is_file():
        return _digest([path], path)
    if not (path / "config.json").is_file():
        return None
    weights = (".safetensors", ".bin")
    return _digest(
        sorted(file for file in path.iterdir() if file.suffix in weights or file.name == "config.json"), path
    )


def weights_digest(checkpoint: Path) -> str | None:
    """The digest of the weight files that are loaded; None if there are none.

    ``config.json`` does not count: a tower that was moved is named anew there.
    """
    try:
        found = weight_files(checkpoint)
    except UmedError:
        return None
    return _digest_of_weights(checkpoint, tuple((file, files.file_stamp(file)) for file in found))


@functools.cache  # a command looks for a base several times
def _digest_of_weights(checkpoint: Path, found: tuple[tuple[Path, tuple[int, int]], ...]) -> str:
    return _digest([file for file, _ in found], checkpoint, _WEIGHTS_APART)


def _digest(files: list[Path], of: Path, apart: int | None = None) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(b"" if file == of else text_bytes(file.name))
        for chunk in _chunks(file, apart):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: Path, apart: int | None) -> Iterator[bytes]:
    """A file whole, or of weights and of very large files the size and evenly spread parts: 14 GB would take a minute.

    The parts are `_CHUNKS`, or one for each ``apart`` bytes if these are more.
    """
    size = file.stat().st_size
    count = _CHUNKS if apart is None else max(_CHUNKS, size // apart)
    whole = size <= _CHUNK_BYTES * _CHUNKS or (
        size <= _WHOLE_FILE_BYTES and file.suffix not in (".safetensors", ".bin")
    )
    yield str(size).encode()
    with open(file, "rb") as opened:
        if whole:
            while chunk := opened.read(2**20):
                yield chunk
            return
        for number in range(count):
            opened.seek((size - _CHUNK_BYTES) * number // (count - 1))
            yield opened.read(_CHUNK_BYTES)
