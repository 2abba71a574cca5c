"""Feature cache: the frozen vision tower's features on disk. The second epoch, and the next run, read them instead of the image.

One file holds the features of one image, before the projector (which is trained), in the tower's dtype. The folder's name is a
hash of all that the features depend on beside the image: the tower's weights, configuration, selected layer and dtype, the image
processor's settings and ``--image_aspect_ratio``. A file's name is a hash of the image's path, size and modification time. If a
record names a DICOM or NIfTI file itself, the hash includes how it is read: slice, window, orientation. After any change another
name is looked up, so nothing stale is read. Folders of other towers are not removed.

Files are written aside and renamed, so processes can share a folder. Each has a checksum; a damaged file is reported and its
image encoded anew. On a GPU a tower's rounding depends on the rest of the batch; the cache keeps the first result.

Stage 2 only. In stage 1 LLaVA encodes inside the model's forward pass, which would have to be replaced; and it runs the language
model forward and backward once per image, while stage 2 samples from each image in many epochs.

Run it with ``umed-run ... --umed_stage rewarding --umed_feature_cache FOLDER``. Not in the paper.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from umed_plugin import files
from umed_plugin.data.images import file_states, reader_version
from umed_plugin.errors import UmedError, warn
from umed_plugin.files import text_bytes

FORMAT = "umed-features-2"  # change it when the files change
_OVERHEAD = 256  # bytes of a file beside the features: header and checksum


@dataclass(frozen=True)
class FeatureShape:
    """Shape and dtype of one image's features: ``[patches, width]``, in the tower's dtype."""

    patches: int
    width: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of one image."""
        return self.patches * self.width * torch.empty((), dtype=self.dtype).element_size()

    def fits(self, features: Tensor) -> bool:
        """Whether ``features`` have this shape and dtype."""
        return features.shape == (self.patches, self.width) and features.dtype == self.dtype


def open_feature_cache(folder: str | Path, tower: Any, processor: Any, image_aspect_ratio: str) -> FeatureCache:
    """The part of ``folder`` that belongs to this tower and this preprocessing; created if it does not exist.

    Args:
        folder: ``--umed_feature_cache``.
        tower: LLaVA's, loaded, on the device and in the dtype of training.
        processor: its image processor.
        image_aspect_ratio: ``pad`` or ``square``.

    Raises:
        UmedError: the tower is trained, or the folder cannot be created.
    """
    trained = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
    if trained:
        raise UmedError(
            f"--umed_feature_cache {folder}: {len(trained)} parameters of the vision tower are trained (the first: "
            f"{trained[0]}), so its features change at every step. Omit the flag, or freeze the tower."
        )
    made_of = {
        "format": FORMAT,
        "tower": type(tower).__name__,
        "weights_sha256": weights_digest(tower),
        # The path that the tower was loaded from does not affect its features.
        "config": {name: value for name, value in tower.config.to_dict().items() if name != "_name_or_path"},
        "select_layer": tower.select_layer,
        "select_feature": tower.select_feature,
        "dtype": str(tower.dtype),
        "processor": processor.to_dict(),
        "image_aspect_ratio": image_aspect_ratio,
    }
    description = json.dumps(made_of, indent=1, sort_keys=True, default=str)
    own = Path(folder) / hashlib.sha256(description.encode()).hexdigest()[:16]
    try:
        own.mkdir(parents=True, exist_ok=True)
        files.write_bytes(own / "made_of.json", description.encode(), durable=False)
    except OSError as error:
        raise UmedError(
            f"--umed_feature_cache {folder}: cannot be written ({error}). Choose a folder that this process may write to."
        ) from error
    patches = tower.num_patches + (tower.select_feature == "cls_patch")
    return FeatureCache(own, FeatureShape(patches, tower.hidden_size, tower.dtype))


def weights_digest(tower: Any) -> str:
    """SHA-256 over name, dtype, shape and bytes of every parameter and buffer, independent of the device."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*tower.named_parameters(), *tower.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor.detach().cpu()))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


class _Damaged(Exception):
    """A readable file whose content is not what was written."""


class FeatureCache:
    """Features of images by name.

    Args:
        folder: exists; holds the features of one tower under one preprocessing.
        shape: of the features of each image.
    """

    def __init__(self, folder: Path, shape: FeatureShape) -> None:
        self.folder, self.shape = folder, shape
        self._writes = True

    def name_of(self, image: str, reading: dict[str, Any] | None = None) -> str | None:
        """The name under which the current state of an image file is kept; None if the file does not exist.

        Args:
            reading: slice and window, if a record names a DICOM or NIfTI file itself (``--umed_image_cache``).
        """
        try:
            states = file_states(image)
        except OSError:
            return None
        parts = [os.path.abspath(image), json.dumps(reading or {}, sort_keys=True), *map(repr, states)]
        stamp = "\n".join(parts + reader_version(image))
        return hashlib.sha256(text_bytes(stamp)).hexdigest()

    def file_of(self, name: str) -> Path:
        """Path of the features called ``name``, whether or not they exist."""
        return self.folder / name[:2] / f"{name}.safetensors"

    def reserve(self, names: Iterable[str | None]) -> str:
        """Check that the disk has room for the missing features; returns a line that summarises the cache.

        Raises:
            UmedError: the free space is less than the missing features need.
        """
        wanted = {name for name in names if name is not None}
        cached = sum(self.file_of(name).is_file() for name in wanted)
        needed = (len(wanted) - cached) * (self.shape.bytes + _OVERHEAD)
        free = shutil.disk_usage(self.folder).free
        size = (
            f"{len(wanted)} images x {self.shape.patches} patches x {self.shape.width} x {self.shape.dtype} = "
            f"{_readable(len(wanted) * self.shape.bytes)}"
        )
        if needed > free:
            raise UmedError(
                f"--umed_feature_cache {self.folder.parent}: the features of {size}, {len(wanted) - cached} of them still to be "
                f"written ({_readable(needed)}), but only {_readable(free)} are free on the disk. Choose a folder on another "
                f"disk, free some space, or omit the flag."
            )
        others = sum(other.is_dir() for other in self.folder.parent.iterdir()) - 1
        left = f" Other towers or preprocessing have {others} more folders beside it." if others else ""
        return f"feature cache {self.folder}: {cached} of {len(wanted)} images are cached; {size} in all.{left}"

    def read(self, name: str) -> Tensor | None:
        """[P, D] features, or None if there are none, or if they are damaged (which is reported)."""
        file = self.file_of(name)
        try:
            return self._checked(file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, _Damaged) as error:
            warn(f"feature cache: {file} is damaged ({error}): the image is encoded anew.")
            return None

    def _checked(self, content: bytes) -> Tensor:
        """The features in a file's content, if they are what was written."""
        tensors = safetensors.torch.load(content)
        if set(tensors) != {"features", "crc32"} or not self.shape.fits(tensors["features"]):
            raise _Damaged(f"it holds { ({name: tuple(tensor.shape) for name, tensor in tensors.items()}) }")
        checksum = tensors["crc32"]
        if checksum.dtype != torch.int64 or checksum.shape != ():
            raise _Damaged(f"its checksum is {tuple(checksum.shape)} of {checksum.dtype}")
        if zlib.crc32(_bytes_of(tensors["features"])) != checksum.item():
            raise _Damaged("its checksum is wrong")
        return tensors["features"]

    def write(self, name: str, features: Tensor) -> None:
        """Store [P, D] features of an image. A full disk is reported once, and stops the writing but not the run."""
        features = features.detach().cpu().contiguous()
        if not self.shape.fits(features):
            raise ValueError(f"features of shape {tuple(features.shape)}, {features.dtype}; expected: {self.shape}")
        if not self._writes:
            return
        checksum = torch.tensor(zlib.crc32(_bytes_of(features)))
        content = safetensors.torch.save({"features": features, "crc32": checksum})
        file = self.file_of(name)
        try:
            file.parent.mkdir(exist_ok=True)
            files.write_bytes(file, content, durable=False)
        except OSError as error:
            self._writes = False
            warn(
                f"feature cache: {file} cannot be written ({error}): this process continues and stores no more features."
            )

    def complete(
        self, cached: Sequence[Tensor | None], names: Sequence[str | None], encode: Callable[[], Tensor]
    ) -> Tensor:
        """[Q, P, D] features of a batch: the cached ones, and in the gaps those of ``encode``, which are stored.

        Args:
            cached: Q features [P, D] read by the data loader, None for a gap.
            names: Q names from `name_of`; features without a name are not stored.
            encode: returns [M, P, D] for the M gaps, in their order; not called if there is no gap.
        """
        if all(features is not None for features in cached):
            return torch.stack(list(cached))
        fresh = iter(encode())
        rows = []
        for features, name in zip(cached, names):
            if features is None:
                features = next(fresh)
                if name is not None:
                    self.write(name, features)
            rows.append(features)
        return torch.stack(rows)


def _readable(count: float) -> str:
    """A number of bytes in the unit that gives 1 to 999 before the decimal point."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        del units[0]
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.1f} {units[0]}"
