"""Look at one image: everything that a record needs of its file, in plain values that another process or a file can hold."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image

from umed_plugin import files
from umed_plugin.data.images import (
    Remark,
    ShownImage,
    burned_in_annotation,
    file_states,
    read_by_llava,
    show_image,
)
from umed_plugin.data.images.stored import check_for_model, checked_index
from umed_plugin.data.leaks import Pictures
from umed_plugin.errors import UmedError
from umed_plugin.files import text_bytes
from umed_plugin.grounding.geometry import Orientation

NO_PIXELS = np.zeros((0, 0, 3), np.uint8)
# A file that was written less than this before it was read may change again without another modification time.
_SETTLED_NS = 2_000_000_000
_NO_TURN = Orientation(0, 0)


@dataclass(frozen=True)
class Request:
    """An image to look at.

    Attributes:
        path: of the file, or the folder of a series.
        slice: index of the annotated slice or page, or None.
        reading: arguments of `images.load_image` if LLaVA cannot read the file itself.
        no_window: the recipe takes windows from a column, and this image has none there.
        out_dir: folder of rendered images; None if none are written.
        rendered: path under ``out_dir`` of the PNG that is written if LLaVA cannot read the file itself.
    """

    path: str
    slice: Optional[int] = None
    reading: dict[str, Any] = field(default_factory=dict)
    no_window: bool = False
    out_dir: Optional[str] = None
    rendered: str = ""


@dataclass(frozen=True)
class Seen:
    """What was seen of an image.

    Attributes:
        fault: why the image cannot be used; the other attributes mean nothing then.
        window_missing: it needs a window, and its column is empty.
        by_llava: True if LLaVA itself reads the file as it is shown.
        orientation, exif, is_grey_levels, remarks: as in `images.ShownImage`.
        burned_in: what its DICOM header says about text in the pixels, or None.
        evaluated: True if it is also in an evaluation set.
        rendered: path under ``out_dir`` of the PNG that was written; empty if none was.
    """

    fault: Optional[str] = None
    window_missing: bool = False
    by_llava: bool = False
    orientation: Orientation = _NO_TURN
    exif: int = 1
    is_grey_levels: bool = False
    remarks: tuple[Remark, ...] = ()
    burned_in: Optional[str] = None
    evaluated: bool = False
    rendered: str = ""

    def shown(self, pixels: np.ndarray = NO_PIXELS) -> ShownImage:
        """The image as shown; without pixels unless they are given."""
        return ShownImage(pixels, self.orientation, self.exif, self.is_grey_levels, self.remarks)


@dataclass(frozen=True)
class Dated:
    """What was seen, and the state of the file meanwhile; ``state`` is None if it must be read again next time."""

    seen: Seen
    state: Optional[str] = None


def look(request: Request, evaluated: Pictures) -> Dated:
    """Look at an image, render it if LLaVA cannot read it, and compare it with the evaluation sets."""
    before = state_of_all(request)
    try:
        seen, pixels = look_at(request)
        burned_in = None if seen.by_llava or seen.window_missing else burned_in_annotation(Path(request.path))
    except UmedError as error:
        return Dated(Seen(fault=str(error)))
    if seen.window_missing:
        return Dated(seen)
    also_evaluated = evaluated.has(pixels)
    rendered = ""
    if not seen.by_llava and request.out_dir is not None and not also_evaluated:
        rendered = _render(pixels, request.rendered, Path(request.out_dir))
    whole = replace(seen, burned_in=burned_in, evaluated=also_evaluated, rendered=rendered)
    return Dated(whole, before if before == state_of_all(request) else None)


def look_at(request: Request) -> tuple[Seen, np.ndarray]:
    """The image and its pixels, uint8 RGB ``[height, width, 3]``, which are not compared or rendered.

    Raises:
        UmedError: the image cannot be read, or LLaVA's image processor cannot take it.
    """
    path = Path(request.path)
    by_llava = not request.reading.get("beside") and read_by_llava(path)
    if not by_llava and request.no_window:
        return Seen(window_missing=True), NO_PIXELS
    if by_llava:
        checked_index(path, request.slice, 1, "page")
    # LLaVA reads these files itself, but only decoding finds a truncated one before training does.
    shown = show_image(path, **({} if by_llava else request.reading))
    check_for_model(path, *shown.orientation.size)
    seen = Seen(
        by_llava=by_llava,
        orientation=shown.orientation,
        exif=shown.exif,
        is_grey_levels=shown.is_grey_levels,
        remarks=shown.remarks,
    )
    return seen, shown.pixels


def state_of(path: str) -> Optional[str]:
    """A digest of names, sizes and times of the image's files; None if it cannot be told whether they will change."""
    try:
        states = file_states(path)
    except OSError:
        return None
    if any(time.time_ns() - modified < _SETTLED_NS for _, _, modified in states):
        return None
    return hashlib.sha256(text_bytes(repr(states))).hexdigest()[:16]


def state_of_all(request: Request) -> Optional[str]:
    """As `state_of`, of the image and of those that are shown beside it."""
    states = [state_of(path) for path in (request.path, *request.reading.get("beside", ()))]
    known = [state for state in states if state is not None]
    return "+".join(known) if len(known) == len(states) else None


def rendered_state(request: Request, seen: Seen) -> Optional[list[int]]:
    """Size and modification time in ns of the rendered image; None if there is none."""
    try:
        status = os.stat(os.path.join(request.out_dir or "", seen.rendered))
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _render(pixels: np.ndarray, name: str, out_dir: Path) -> str:
    """Write the pixels as PNG, whole or not at all, and return the path relative to ``out_dir``.

    A file that shows something else is left as it is, and the new one is named after its content too. It may belong to records
    that were built before: of another data root, window or recipe of the same name.
    """
    relative = Path(name)
    if _shows_other(out_dir / relative, pixels):
        content = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:12]
        relative = relative.with_name(f"{relative.stem}-{content}.png")
    target = out_dir / relative
    with files.replacing(target, durable=False) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")
    return relative.as_posix()


def _shows_other(file: Path, pixels: np.ndarray) -> bool:
    """Whether a picture is there already, and not this one. A file that cannot be read is none."""
    if not file.is_file():
        return False
    try:
        with Image.open(file) as image:
            return image.size != (pixels.shape[1], pixels.shape[0]) or not np.array_equal(np.asarray(image), pixels)
    except (OSError, ValueError, SyntaxError):
        return False
