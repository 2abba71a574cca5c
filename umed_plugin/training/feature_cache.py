"""The frozen vision tower's features on disk: the second epoch, and the next run, read them instead of the image.

One file holds the features of one image, before the projector (which is trained), in the tower's number format. The folder of a
cache is named after all that the features depend on beside the image: the tower's weights, its configuration, the layer taken
of it, its number format, the image processor's settings and ``--image_aspect_ratio``. A file is named after the image's path,
size and time of change, and, where a record names a DICOM or NIfTI file itself, how that is read: slice, window, orientation.
Whatever changes, another name is looked for, and nothing stale is found. What another tower has left
behind is not removed.

Files are written aside and renamed, so processes share a folder. Each carries a checksum; one that is damaged is reported and
its image encoded anew. On a GPU a tower's rounding depends on what else is in the batch, which the cache then keeps.

Stage 2 alone: in stage 1 LLaVA encodes inside the model's forward pass, which would have to be replaced, and runs through the
language model forwards and backwards for each image once; stage 2 samples from each image in many epochs.

Run it with ``umed-run ... --umed_stage rewarding --umed_feature_cache FOLDER``. Not in the paper.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
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
from umed_plugin.data.images import file_states
from umed_plugin.errors import UmedError

FORMAT = "umed-features-2"  # another one, when what is written or how an image becomes pixels changes
_OVERHEAD = 256  # bytes of a file beside the features: header and checksum


@dataclass(frozen=True)
class FeatureShape:
    """What one image's features are: ``[patches, width]`` in the tower's number format."""

    patches: int
    width: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of one image."""
        return self.patches * self.width * torch.empty((), dtype=self.dtype).element_size()

    def fits(self, features: Tensor) -> bool:
        """Whether ``features`` are of this shape and format."""
        return features.shape == (self.patches, self.width) and features.dtype == self.dtype


def open_cache(folder: str | Path, tower: Any, processor: Any, image_aspect_ratio: str) -> FeatureCache:
    """The part of ``folder`` that belongs to this tower and this preprocessing; made when it is not there.

    Args:
        folder: ``--umed_feature_cache``.
        tower: LLaVA's, loaded, on the device and in the number format of training.
        processor: its image processor.
        image_aspect_ratio: ``pad`` or ``square``.

    Raises:
        UmedError: the tower is trained, or the folder cannot be made.
    """
    trained = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
    if trained:
        raise UmedError(
            f"--umed_feature_cache {folder}: {len(trained)} parameters of the vision tower are trained (the first: "
            f"{trained[0]}), so its features change at every step. Leave the flag out, or keep the tower frozen."
        )
    made_of = {
        "format": FORMAT,
        "tower": type(tower).__name__,
        "weights_sha256": weights_digest(tower),
        # Where the tower was loaded from says nothing of what it computes.
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
            f"--umed_feature_cache {folder}: cannot be written ({error}). Give a folder that this process may write."
        ) from error
    patches = tower.num_patches + (tower.select_feature == "cls_patch")
    return FeatureCache(own, FeatureShape(patches, tower.hidden_size, tower.dtype))


def weights_digest(tower: Any) -> str:
    """SHA-256 over name, format, shape and bytes of every parameter and buffer; the device does not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*tower.named_parameters(), *tower.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor.detach().cpu()))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


class _Damaged(Exception):
    """A file that is whole by its form and yet not what was written."""


class FeatureCache:
    """Features of images by name.

    Args:
        folder: exists; holds what one tower made under one preprocessing.
        shape: of the features of each image.
    """

    def __init__(self, folder: Path, shape: FeatureShape) -> None:
        self.folder, self.shape = folder, shape
        self._writes = True

    def name_of(self, image: str, reading: dict[str, Any] | None = None) -> str | None:
        """The name under which this very state of an image file is kept; None for a file that is not there.

        Args:
            reading: which slice in which window, of a record that names a DICOM or NIfTI file itself (``--umed_image_cache``).
        """
        try:
            states = file_states(image)
        except OSError:
            return None
        stamp = "\n".join([os.path.abspath(image), json.dumps(reading or {}, sort_keys=True), *map(repr, states)])
        return hashlib.sha256(stamp.encode("utf-8", "surrogateescape")).hexdigest()

    def file_of(self, name: str) -> Path:
        """Where the features called ``name`` lie, or would."""
        return self.folder / name[:2] / f"{name}.safetensors"

    def reserve(self, names: Iterable[str | None]) -> str:
        """Look for room on the disk for what is missing of ``names``; returns a line that says what is there.

        Raises:
            UmedError: the disk has less free than the missing features take.
        """
        wanted = {name for name in names if name is not None}
        there = sum(self.file_of(name).is_file() for name in wanted)
        needed = (len(wanted) - there) * (self.shape.bytes + _OVERHEAD)
        free = shutil.disk_usage(self.folder).free
        size = (
            f"{len(wanted)} images x {self.shape.patches} patches x {self.shape.width} x {self.shape.dtype} = "
            f"{_readable(len(wanted) * self.shape.bytes)}"
        )
        if needed > free:
            raise UmedError(
                f"--umed_feature_cache {self.folder.parent}: the features of {size}, {len(wanted) - there} of them still to be "
                f"written ({_readable(needed)}), but the disk has {_readable(free)} free. Give a folder on another disk, make "
                f"room, or leave the flag out."
            )
        others = sum(other.is_dir() for other in self.folder.parent.iterdir()) - 1
        left = f" Beside it, folders of other towers or preprocessing: {others}." if others else ""
        return f"feature cache {self.folder}: {there} of {len(wanted)} images are there; {size} in all.{left}"

    def read(self, name: str) -> Tensor | None:
        """[P, D] features, or None where there are none, or where they are damaged (which is reported)."""
        file = self.file_of(name)
        try:
            return self._checked(file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, _Damaged) as error:
            _warn(f"{file} is damaged ({error}): the image is encoded anew.")
            return None

    def _checked(self, content: bytes) -> Tensor:
        """The features in a file's content, when they are what was written."""
        tensors = safetensors.torch.load(content)
        if set(tensors) != {"features", "crc32"} or not self.shape.fits(tensors["features"]):
            raise _Damaged(f"it holds { ({name: tuple(tensor.shape) for name, tensor in tensors.items()}) }")
        if zlib.crc32(_bytes_of(tensors["features"])) != tensors["crc32"].item():
            raise _Damaged("its checksum is wrong")
        return tensors["features"]

    def write(self, name: str, features: Tensor) -> None:
        """Keep [P, D] features of an image. A full disk is reported once and ends the writing, not the run."""
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
            _warn(f"{file} cannot be written ({error}): this process goes on and keeps no more features.")

    def complete(
        self, found: Sequence[Tensor | None], names: Sequence[str | None], encode: Callable[[], Tensor]
    ) -> Tensor:
        """[Q, P, D] features of a batch: what was found, and in the gaps what ``encode`` gives, which is kept.

        Args:
            found: Q features [P, D] read by the data loader, None where there were none.
            names: Q names from :meth:`name_of`; None is not kept.
            encode: gives [M, P, D] for the M gaps, in their order; not called when there is no gap.
        """
        if all(features is not None for features in found):
            return torch.stack(list(found))
        fresh = iter(encode())
        rows = []
        for features, name in zip(found, names):
            if features is None:
                features = next(fresh)
                if name is not None:
                    self.write(name, features)
            rows.append(features)
        return torch.stack(rows)


def _readable(count: float) -> str:
    """A number of bytes in the unit that leaves 1 to 999 before the point."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        del units[0]
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.1f} {units[0]}"


def _warn(text: str) -> None:
    print(f"umed: feature cache: {text}", file=sys.stderr, flush=True)
