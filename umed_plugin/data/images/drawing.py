"""What the vision model is shown: the square that the trained model will see, with a thin frame around each lesion.

Boxes in text are 0-1 of that square, so the square is what is sent, not the file. Pictures are encoded anew from decoded pixels:
nothing of a file's header or name goes along.
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

LEAST_SIDE, MOST_SIDE = 512, 1024  # pixels of the picture that is sent: small enough to be cheap, large enough to see
CROP_SIDE = 512
CROP_MARGIN = 0.5  # of the lesion's larger side, on every side of it
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
    """A digest of size and pixels alone: the same whatever file format or library version they came through."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def square_of(image: Image, geometry: ImageGeometry, least: int = LEAST_SIDE, most: int = MOST_SIDE) -> Image:
    """The square that the model sees, at least ``least`` and at most ``most`` pixels wide."""
    from PIL.Image import Resampling

    ((x1, y1, x2, y2),) = geometry.from_square([(0.0, 0.0, 1.0, 1.0)])
    # PIL's crop pads with black where the square is larger than the image.
    whole = (math.floor(x1 + 1e-6), math.floor(y1 + 1e-6), math.ceil(x2 - 1e-6), math.ceil(y2 - 1e-6))
    cut = image.crop(whole)
    side = min(max(*cut.size, least), most)
    inner = (
        max(x1 - whole[0], 0),
        max(y1 - whole[1], 0),
        min(x2 - whole[0], cut.width),
        min(y2 - whole[1], cut.height),
    )
    return cut.resize((side, side), Resampling.LANCZOS, box=inner)


def with_frames(square: Image, boxes01: Sequence[Box]) -> Image:
    """The square with a frame just outside each box, numbered where there are several."""
    from PIL import ImageDraw

    framed = square.copy()
    pen = ImageDraw.Draw(framed)
    side, width = square.width, max(2, square.width // 300)
    for number, box in enumerate(boxes01, start=1):
        x1, y1, x2, y2 = (value * side for value in box)
        # Outside the box, so that no pixel of the lesion is painted over.
        corners = (math.floor(x1) - width, math.floor(y1) - width, math.ceil(x2) + width - 1, math.ceil(y2) + width - 1)
        pen.rectangle(corners, outline=FRAME_COLOUR, width=width)
        if len(boxes01) > 1:
            _number(framed, str(number), corners)
    return framed


def _number(framed: Image, text: str, corners: tuple[int, int, int, int]) -> None:
    """Write a number beside a frame, above it where there is room and below it where not."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = (int(value) for value in ImageDraw.Draw(framed).textbbox((0, 0), text))
    small = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(small).text((1 - left, 1 - top), text, fill=255)
    scale = max(2, framed.width // 250)  # PIL's own font has one size
    mask = small.resize((small.width * scale, small.height * scale))
    above = corners[1] - mask.height
    y = above if above >= 0 else min(corners[3] + 1, framed.height - mask.height)
    x = min(max(corners[0], 0), framed.width - mask.width)
    plate = Image.new("RGB", mask.size, FRAME_COLOUR)
    plate.paste(Image.new("RGB", mask.size), (0, 0), mask)
    framed.paste(plate, (x, y))


def crop_of(square: Image, box01: Box) -> Image:
    """A lesion and what is around it, enlarged, without a frame."""
    from PIL.Image import Resampling

    x1, y1, x2, y2 = (value * square.width for value in box01)
    half = max(max(x2 - x1, y2 - y1) * (0.5 + CROP_MARGIN), 16.0)
    # A square that would leave the picture is moved, not cut.
    half = min(half, square.width / 2)
    x = min(max((x1 + x2) / 2, half), square.width - half)
    y = min(max((y1 + y2) / 2, half), square.height - half)
    return square.resize((CROP_SIDE, CROP_SIDE), Resampling.LANCZOS, box=(x - half, y - half, x + half, y + half))


def as_data_url(picture: Image, quality: int = 95) -> str:
    """The picture as a JPEG in a ``data:`` address, with pixels and nothing else in it."""
    clean = picture.copy()
    clean.info = {}
    held = io.BytesIO()
    clean.save(held, format="JPEG", quality=quality, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()
