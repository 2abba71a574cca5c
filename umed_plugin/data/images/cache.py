"""Images as the tower's processor leaves them, kept on disk: epochs after the first, and later runs, decode and resize nothing.

What is kept is the square after padding, resizing and cropping, in 8 bits: ``3 * S * S`` bytes, 339 kB for 336 pixels. The rest
of the processor's work, scaling and normalising, maps each of the 256 values of a channel to one number, so a table of
``[3, 256]`` floats does it to the bit; `ImageCache` looks at that before it is used, and refuses a processor that it does not
hold for.

An entry is named after all that its pixels depend on: the file's path, size and time of change (of every file, for a folder), how
it is read (window, slice, ...), the processor's settings and ``--image_aspect_ratio``. A changed file is decoded anew.

The folder holds a fixed number of places, so it cannot grow beyond its bound, whatever number of processes and nodes write to
it. An entry may lie in one of `WAYS` places that its name leads to. Where all are taken, one that was not used in this run gives
way, else the image is not kept: in epochs that go through all images, throwing out what is still wanted never pays. A file is
written aside and renamed, and carries a checksum.

Chosen over MONAI's PersistentDataset by `benchmarks/images.py`: from the page cache both give about 2,000 images a second on a
core, but that keeps float tensors of four times the size, has no bound, and does not notice that a file has changed.

How to run: ``umed-run ... --umed_image_cache FOLDER``, or ``umed evaluate ... --image-cache FOLDER``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from umed_plugin import files
from umed_plugin.data.images import file_states, open_image
from umed_plugin.errors import UmedError

FORMAT = "umed-images-1"  # another one, when what is written or how a file becomes pixels changes
WAYS = 4
_NAME_BYTES, _CHECKSUM_BYTES = 32, 4
_STALE_PARTIAL_SECONDS = 3600


class ImageCache:
    """CLIP tensors of images, through a bounded folder of decoded squares.

    Args:
        folder: made when it is not there; several processes and runs may share it.
        processor: the tower's image processor.
        image_aspect_ratio: ``pad`` or ``square``, as LLaVA is told.
        most_bytes: bound of the folder.

    Raises:
        UmedError: the folder cannot be written, the bound is below one image, or the processor does more than resize, crop and
            normalise.
    """

    def __init__(self, folder: str | Path, processor: Any, image_aspect_ratio: str, most_bytes: int) -> None:
        self.processor, self.image_aspect_ratio = processor, image_aspect_ratio
        self.table, self.size = _checked_table(processor, image_aspect_ratio)
        self.entry_bytes = _NAME_BYTES + 3 * self.size**2 + _CHECKSUM_BYTES
        self.places = most_bytes // self.entry_bytes
        if self.places < 1:
            raise UmedError(f"{folder}: an image cache of {most_bytes} bytes holds none; one takes {self.entry_bytes}.")
        settings = {"format": FORMAT, "processor": processor.to_dict(), "image_aspect_ratio": image_aspect_ratio}
        self._made_by = json.dumps(settings, sort_keys=True, default=str)
        self.folder = Path(folder) / f"{self.size}px"
        self._began = time.time()
        self._writes = True
        self.hits = self.misses = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_what_is_beyond()
        except OSError as error:
            raise UmedError(
                f"{folder}: cannot be used as image cache ({error}). Give a folder that can be written."
            ) from error

    def pixels(self, path: str | Path, reading: Optional[dict[str, Any]] = None) -> torch.Tensor:
        """float32 ``[3, S, S]``, to the bit what LLaVA's training makes of the image.

        Args:
            path: of the file, or the folder of a DICOM series.
            reading: arguments of `images.load_image` for a file that LLaVA cannot read by itself.

        Raises:
            UmedError: the file cannot be read (OSError and others of PIL's for a picture of 8 bits, as LLaVA has them).
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
        return _square_of(open_image(path, reading), self.processor, self.image_aspect_ratio)

    def _name(self, path: str | Path, reading: dict[str, Any]) -> bytes:
        """32 bytes that stand for this very state of the file, read in this very way."""
        parts = [os.path.abspath(path), json.dumps(reading, sort_keys=True), self._made_by]
        parts += [repr(state) for state in file_states(path)]
        return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).digest()

    def _places(self, name: bytes) -> list[Path]:
        first = int.from_bytes(name[:8], "big")
        numbers = {(first + way) % self.places for way in range(WAYS)}
        return [self.folder / f"{number // 1000}" / f"{number}.square" for number in sorted(numbers)]

    def _read(self, name: bytes) -> Optional[np.ndarray]:
        """uint8 ``[3, S, S]``, or None where there is none or it is damaged."""
        for file in self._places(name):
            try:
                with file.open("rb", buffering=0) as opened:
                    if opened.read(_NAME_BYTES) != name:
                        continue
                    content = opened.read(self.entry_bytes)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                _warn(f"{file} cannot be read ({error}): the image is decoded anew.")
                continue
            pixels, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
            if len(pixels) == 3 * self.size**2 and zlib.crc32(pixels).to_bytes(_CHECKSUM_BYTES, "big") == checksum:
                self._mark_used(file)
                return np.frombuffer(pixels, np.uint8).reshape(3, self.size, self.size)
            _warn(f"{file} is damaged: the image is decoded anew.")
        return None

    def _mark_used(self, file: Path) -> None:
        try:
            os.utime(file)
        except OSError:
            return  # another process has replaced it, or the folder is read-only: then nothing is replaced in it either

    def _write(self, name: bytes, square: np.ndarray) -> None:
        """Keep a square where there is room. A disk that is full is reported once and ends the writing, not the run."""
        file = self._room(name)
        if file is None or not self._writes:
            return
        pixels = np.ascontiguousarray(square).tobytes()
        try:
            entry = name + pixels + zlib.crc32(pixels).to_bytes(_CHECKSUM_BYTES, "big")
            files.write_bytes(file, entry, durable=False)
        except OSError as error:
            self._writes = False
            _warn(f"{file} cannot be written ({error}): this process goes on and keeps no more images.")

    def _room(self, name: bytes) -> Optional[Path]:
        """The place of this name already (its file is damaged), a free one, or one that no one has used since this run began."""
        oldest: tuple[float, Optional[Path]] = (self._began, None)
        free = None
        for file in self._places(name):
            try:
                with file.open("rb", buffering=0) as opened:
                    if opened.read(_NAME_BYTES) == name:
                        return file
                    oldest = min(oldest, (os.fstat(opened.fileno()).st_mtime, file), key=lambda one: one[0])
            except OSError:
                free = free or file
        return free or oldest[1]

    def _remove_what_is_beyond(self) -> None:
        """Entries of an earlier, larger bound, and what a process that was killed has left half written."""
        for file in _files(self.folder):
            number, _, rest = file.name.partition(".")
            if rest == "square":
                if not number.isdigit() or int(number) >= self.places:
                    os.unlink(file)
            elif rest.endswith(files.PARTIAL) and time.time() - file.stat().st_mtime > _STALE_PARTIAL_SECONDS:
                os.unlink(file)


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as parts:
        for part in parts:
            if part.is_dir():
                with os.scandir(part) as files:
                    yield from files


def _square_of(image: Any, processor: Any, image_aspect_ratio: str) -> np.ndarray:
    """uint8 ``[3, S, S]``: what LLaVA does with an image, up to scaling and normalising."""
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
    """float32 of the shape of uint8 ``[3, ...]``."""
    result = np.empty(square.shape, np.float32)
    for channel in range(3):
        np.take(table[channel], square[channel], out=result[channel], mode="clip")
    return result


def _checked_table(processor: Any, image_aspect_ratio: str) -> tuple[np.ndarray, int]:
    """What scaling and normalising make of the 256 values of each channel, float32 ``[3, 256]``, and the side of the square.

    Raises:
        UmedError: on an image of noise the table does not give what the processor gives.
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
            f"the image cache cannot be used with {type(processor).__name__}: it does more than resize, crop, scale and "
            "normalise, or works in other than 8 bits. Leave the cache out."
        )
    return table, square.shape[-1]


def _warn(text: str) -> None:
    print(f"umed: image cache: {text}", file=sys.stderr, flush=True)
