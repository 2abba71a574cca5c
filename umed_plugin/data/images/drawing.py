"""Images for the vision model: the square that the trained model will see, with a thin frame around each lesion.

The square is sent, not the file, because boxes in text are 0-1 of that square. Images are encoded again from decoded pixels, so
nothing of a file's header or name is sent.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from umed_plugin.errors import UmedError
from umed_plugin.grounding.boxes import Box
from umed_plugin.grounding.geometry import ImageGeometry

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_SIDE, MAX_SIDE = 512, 1024  # pixels of the square that is sent: large enough for details, small enough to be cheap
CROP_SIDE = 512  # pixels
CROP_MARGIN = 0.5  # on every side of the lesion, in multiples of its longer side
FRAME_COLOUR = (0, 255, 0)


def read_pixels(path: Path) -> Image:
    """The image as LLaVA reads it, 8-bit RGB.

    Raises:
        UmedError: the file is missing or damaged.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UmedError(f"{path}: cannot be read as an image ({error}). Build the records again.") from error


def pixel_digest(image: Image) -> str:
    """A digest of size and pixels only: it does not depend on the file format or on library versions."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def square_of(image: Image, geometry: ImageGeometry, min_side: int = MIN_SIDE, max_side: int = MAX_SIDE) -> Image:
    """The square that the model sees, at least ``min_side`` and at most ``max_side`` pixels wide."""
    from PIL.Image import Resampling

    ((x1, y1, x2, y2),) = geometry.from_square([(0.0, 0.0, 1.0, 1.0)])
    # PIL's crop pads with black where the square extends beyond the image.
    whole = (math.floor(x1 + 1e-6), math.floor(y1 + 1e-6), math.ceil(x2 - 1e-6), math.ceil(y2 - 1e-6))
    cut = image.crop(whole)
    side = min(max(*cut.size, min_side), max_side)
    inner = (
        max(x1 - whole[0], 0),
        max(y1 - whole[1], 0),
        min(x2 - whole[0], cut.width),
        min(y2 - whole[1], cut.height),
    )
    return cut.resize((side, side), Resampling.LANCZOS, box=inner)


def with_frames(square: Image, boxes01: Sequence[Box]) -> Image:
    """The square with a frame just outside each box; several frames are numbered."""
    from PIL import ImageDraw

    framed = square.copy()
    pen = ImageDraw.Draw(framed)
    side, width = square.width, max(2, square.width // 300)
    for number, box in enumerate(boxes01, start=1):
        x1, y1, x2, y2 = (value * side for value in box)
        # The frame is outside the box, so it covers no pixel of the lesion.
        corners = (math.floor(x1) - width, math.floor(y1) - width, math.ceil(x2) + width - 1, math.ceil(y2) + width - 1)
        pen.rectangle(corners, outline=FRAME_COLOUR, width=width)
        if len(boxes01) > 1:
            _number(framed, str(number), corners)
    return framed


def _number(framed: Image, text: str, corners: tuple[int, int, int, int]) -> None:
    """Write a number above a frame, or below it if there is no room above."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = (int(value) for value in ImageDraw.Draw(framed).textbbox((0, 0), text))
    small = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(small).text((1 - left, 1 - top), text, fill=255)
    scale = max(2, framed.width // 250)  # PIL's built-in font has only one size
    mask = small.resize((small.width * scale, small.height * scale))
    above = corners[1] - mask.height
    y = above if above >= 0 else min(corners[3] + 1, framed.height - mask.height)
    x = min(max(corners[0], 0), framed.width - mask.width)
    plate = Image.new("RGB", mask.size, FRAME_COLOUR)
    plate.paste(Image.new("RGB", mask.size), (0, 0), mask)
    framed.paste(plate, (x, y))


def crop_of(square: Image, box01: Box) -> Image:
    """A lesion and its surroundings, enlarged, without a frame."""
    from PIL.Image import Resampling

    x1, y1, x2, y2 = (value * square.width for value in box01)
    half = max(max(x2 - x1, y2 - y1) * (0.5 + CROP_MARGIN), 16.0)
    # A crop that would extend beyond the square is moved, not cut.
    half = min(half, square.width / 2)
    x = min(max((x1 + x2) / 2, half), square.width - half)
    y = min(max((y1 + y2) / 2, half), square.height - half)
    return square.resize((CROP_SIDE, CROP_SIDE), Resampling.LANCZOS, box=(x - half, y - half, x + half, y + half))


def as_data_url(image: Image, quality: int = 95) -> str:
    """The image as a JPEG in a ``data:`` URL, without metadata."""
    clean = image.copy()
    clean.info = {}
    jpeg = io.BytesIO()
    clean.save(jpeg, format="JPEG", quality=quality, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
