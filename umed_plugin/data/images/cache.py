"""A cache of preprocessed images on disk: after the first epoch, and in later runs, no image is decoded or resized again.

An entry is the square after padding, resizing and cropping, in 8 bits: ``3 * S * S`` bytes, 339 kB for 336 pixels. The rest of
the processor's work, rescaling and normalising, maps each of the 256 values of a channel to one number. A table of ``[3, 256]``
floats therefore gives the same result to the bit. `ImageCache` checks this first, and refuses a processor for which it fails.

An entry's name depends on everything that its pixels depend on: the file's path, size and modification time (of every file, for a
folder), how it is read (window, slice, ...), the processor's settings and ``--image_aspect_ratio``. A changed file is decoded
again.

The folder has a fixed number of slots, so it cannot exceed its limit, however many processes and nodes write to it. Each entry
has `WAYS` possible slots. If all are taken, it replaces one that was not used in this run; otherwise the image is not cached. In
epochs over all images, evicting an entry that is still needed never pays off. Files are written aside and renamed, and have a
checksum.

`benchmarks/images.py` compares it with MONAI's PersistentDataset. From the page cache both give about 2,000 images per second and
core. PersistentDataset stores float tensors of four times the size, has no size limit, and does not detect changed files.

How to run: ``umed-run ... --umed_image_cache FOLDER``, or ``umed evaluate ... --image-cache FOLDER``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from umed_plugin import files
from umed_plugin.data.images import file_states, open_image, reader_version
from umed_plugin.data.images.stored import check_for_model
from umed_plugin.errors import UmedError, warn
from umed_plugin.files import text_bytes

FORMAT = "umed-images-1"  # change it when the entries change
WAYS = 4
_NAME_BYTES, _CHECKSUM_BYTES = 32, 4


class ImageCache:
    """CLIP tensors of images, from a folder of preprocessed squares with a size limit.

    Args:
        folder: created if it does not exist. Several processes and runs may share it.
        processor: the vision tower's image processor.
        image_aspect_ratio: ``pad`` or ``square``, as in LLaVA's arguments.
        max_bytes: size limit of the folder.

    Attributes:
        slots: maximum number of entries.
        hits, misses: number of images that were read from the cache, and that were not.

    Raises:
        UmedError: the folder cannot be written, the limit is less than one image, or the processor does more than resize, crop,
            rescale and normalise.
    """

    def __init__(self, folder: str | Path, processor: Any, image_aspect_ratio: str, max_bytes: int) -> None:
        self.processor, self.image_aspect_ratio = processor, image_aspect_ratio
        self.table, self.size = _checked_table(processor, image_aspect_ratio)
        self.entry_bytes = _NAME_BYTES + 3 * self.size**2 + _CHECKSUM_BYTES
        self.slots = max_bytes // self.entry_bytes
        if self.slots < 1:
            raise UmedError(
                f"{folder}: an image cache of {max_bytes} bytes is too small; one image needs {self.entry_bytes}. "
                "Give it more: --image-cache-gb, in training --umed_image_cache_gb."
            )
        settings = {"format": FORMAT, "processor": processor.to_dict(), "image_aspect_ratio": image_aspect_ratio}
        self._made_by = json.dumps(settings, sort_keys=True, default=str)
        self.folder = Path(folder) / f"{self.size}px"
        self._began = time.time()
        self._writes = True
        self.hits = self.misses = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_stale_files()
        except OSError as error:
            raise UmedError(
                f"{folder}: cannot be used as an image cache ({error}). Choose a writable folder."
            ) from error

    def pixels(self, path: str | Path, reading: Optional[dict[str, Any]] = None) -> torch.Tensor:
        """float32 ``[3, S, S]``, to the bit what LLaVA's training makes of the image.

        Args:
            path: an image file, or the folder of a DICOM series.
            reading: arguments of `images.load_image` for a file that LLaVA cannot read by itself.

        Raises:
            UmedError: the file cannot be read, or has a size that the processor cannot take.
        """
        name = self._name(path, reading or {})
        square = self._read(name)
        if square is None:
            self.misses += 1
            square = self._square(path, reading or {})
            self._write(name, square)
        else:
            self.hits += 1
        return torch.from_numpy(_normalised(square, self.table))

    def _square(self, path: str | Path, reading: dict[str, Any]) -> np.ndarray:
        image = open_image(path, reading)
        check_for_model(Path(path), image.width, image.height)
        return _square_of(image, self.processor, self.image_aspect_ratio)

    def _name(self, path: str | Path, reading: dict[str, Any]) -> bytes:
        """32 bytes that identify this state of the file, read in this way."""
        parts = [os.path.abspath(path), json.dumps(reading, sort_keys=True), self._made_by]
        for file in (path, *reading.get("beside", ())):
            parts += [repr(state) for state in file_states(file)] + reader_version(file)
        return hashlib.sha256(text_bytes("\n".join(parts))).digest()

    def _slots_of(self, name: bytes) -> list[Path]:
        """The files that may hold an entry."""
        first = int.from_bytes(name[:8], "big")
        numbers = {(first + way) % self.slots for way in range(WAYS)}
        return [self.folder / f"{number // 1000}" / f"{number}.square" for number in sorted(numbers)]

    def _read(self, name: bytes) -> Optional[np.ndarray]:
        """uint8 ``[3, S, S]``, or None if there is no entry or it is damaged."""
        for file in self._slots_of(name):
            try:
                with file.open("rb", buffering=0) as opened:
                    if opened.read(_NAME_BYTES) != name:
                        continue
                    content = opened.read(self.entry_bytes)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                warn(f"image cache: {file} cannot be read ({error}). The image is decoded again.")
                continue
            pixels, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
            if len(pixels) == 3 * self.size**2 and zlib.crc32(pixels).to_bytes(_CHECKSUM_BYTES, "big") == checksum:
                self._mark_used(file)
                return np.frombuffer(pixels, np.uint8).reshape(3, self.size, self.size)
            warn(f"image cache: {file} is damaged. The image is decoded again.")
        return None

    def _mark_used(self, file: Path) -> None:
        try:
            os.utime(file)
        except OSError:
            return  # another process replaced it, or the folder is read-only, and then no entry is replaced anyway

    def _write(self, name: bytes, square: np.ndarray) -> None:
        """Write an entry if it has a slot. A full disk is reported once and stops the writing, not the run."""
        file = self._free_slot(name)
        if file is None or not self._writes:
            return
        pixels = np.ascontiguousarray(square).tobytes()
        try:
            entry = name + pixels + zlib.crc32(pixels).to_bytes(_CHECKSUM_BYTES, "big")
            files.write_bytes(file, entry, durable=False)
        except OSError as error:
            self._writes = False
            warn(
                f"image cache: {file} cannot be written ({error}). This process continues without caching more images."
            )

    def _free_slot(self, name: bytes) -> Optional[Path]:
        """The slot that already has this name (its file is damaged), an empty one, or one not used since this run began."""
        oldest: tuple[float, Optional[Path]] = (self._began, None)
        free = None
        for file in self._slots_of(name):
            try:
                with file.open("rb", buffering=0) as opened:
                    if opened.read(_NAME_BYTES) == name:
                        return file
                    oldest = min(oldest, (os.fstat(opened.fileno()).st_mtime, file), key=lambda slot: slot[0])
            except OSError:
                free = free or file
        return free or oldest[1]

    def _remove_stale_files(self) -> None:
        """Remove entries beyond the limit, and partial files that a killed process left."""
        for file in _files(self.folder):
            # Another process may rename or remove it at this moment.
            with contextlib.suppress(FileNotFoundError):
                if self._is_stale(file):
                    os.unlink(file)

    def _is_stale(self, file: os.DirEntry[str]) -> bool:
        number, _, rest = file.name.partition(".")
        if rest == "square":
            return not number.isdigit() or int(number) >= self.slots
        return files.is_stale_partial(file)


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as parts:
        for part in parts:
            if part.is_dir():
                with os.scandir(part) as files:
                    yield from files


def _square_of(image: Any, processor: Any, image_aspect_ratio: str) -> np.ndarray:
    """uint8 ``[3, S, S]``: LLaVA's preprocessing before rescaling and normalising."""
    square = processor.preprocess(
        _padded(image, processor, image_aspect_ratio), do_rescale=False, do_normalize=False, return_tensors="np"
    )["pixel_values"][0]
    return np.asarray(square).astype(np.uint8, casting="unsafe", copy=False)


def _padded(image: Any, processor: Any, image_aspect_ratio: str) -> Any:
    from llava.mm_utils import expand2square

    if image_aspect_ratio != "pad":
        return image
    return expand2square(image, tuple(int(value * 255) for value in processor.image_mean))


def _normalised(square: np.ndarray, table: np.ndarray) -> np.ndarray:
    """float32 values for uint8 ``[3, ...]``, in the same shape."""
    result = np.empty(square.shape, np.float32)
    for channel in range(3):
        np.take(table[channel], square[channel], out=result[channel], mode="clip")
    return result


def _checked_table(processor: Any, image_aspect_ratio: str) -> tuple[np.ndarray, int]:
    """The 256 values of each channel after rescaling and normalising, float32 ``[3, 256]``, and the side of the square.

    Raises:
        UmedError: for an image of noise, the table and the processor give different results.
    """
    from PIL import Image

    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16)[None], 3, axis=0)
    table = processor.preprocess(
        ramp,
        do_resize=False,
        do_center_crop=False,
        do_convert_rgb=False,
        input_data_format="channels_first",
        return_tensors="pt",
    )["pixel_values"][0]
    table = np.ascontiguousarray(np.asarray(table, dtype=np.float32).reshape(3, 256))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (97, 61, 3)).astype(np.uint8))
    whole = processor.preprocess(_padded(noise, processor, image_aspect_ratio), return_tensors="pt")["pixel_values"][0]
    square = _square_of(noise, processor, image_aspect_ratio)
    if square.shape != tuple(whole.shape) or not np.array_equal(_normalised(square, table), np.asarray(whole)):
        raise UmedError(
            f"the image cache cannot be used with {type(processor).__name__}: it does more than resize, crop, rescale and "
            "normalise, or does not work in 8 bits. Run without the cache."
        )
    return table, square.shape[-1]
