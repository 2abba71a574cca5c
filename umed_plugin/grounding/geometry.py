"""All coordinate transforms: pixels of the image file <-> the square that the model sees <-> its patches.

They match LLaVA to the pixel. ``pad`` is ``expand2square`` (the shorter side is padded, with a whole number of pixels in
front) followed by CLIPImageProcessor. ``square`` is LLaVA's default, CLIPImageProcessor alone: the shortest edge is resized to
``image_size`` and the centre is cropped, so a lesion near the end of the longer side can be lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from umed_plugin.errors import UsageError, unknown_name
from umed_plugin.grounding.boxes import Box, is_degenerate, is_inside

if TYPE_CHECKING:
    import numpy as np

MODES = ("pad", "square")


@dataclass(frozen=True)
class ImageGeometry:
    """How the model sees one image.

    Attributes:
        width, height: of the image file, in pixels.
        mode: ``pad`` or ``square``, LLaVA's ``--image_aspect_ratio``.
        image_size: side of the square that the vision tower takes, in pixels.
        patch_size: side of one patch of the vision tower, in pixels of that square.

    Example:
        >>> from umed_plugin import ImageGeometry
        >>> geometry = ImageGeometry(200, 100)  # padded to 200 x 200, 50 pixels above and below
        >>> geometry.to_square([(50, 25, 100, 75)])
        [(0.25, 0.375, 0.5, 0.625)]
        >>> geometry.from_square([(0.25, 0.375, 0.5, 0.625)])
        [(50.0, 25.0, 100.0, 75.0)]
        >>> ImageGeometry(200, 100, "square").visible_fraction((0, 0, 100, 100))  # the centre crop cuts half of it
        0.5
    """

    width: int
    height: int
    mode: str = "pad"
    image_size: int = 336
    patch_size: int = 14

    def __post_init__(self) -> None:
        """Refuse a mode that LLaVA does not have, and sizes that are not positive."""
        if self.mode not in MODES:
            raise UsageError(unknown_name("image_aspect_ratio", self.mode, MODES))
        if min(self.width, self.height, self.image_size, self.patch_size) < 1:
            raise ValueError(f"sizes must be positive: {self}")

    @property
    def grid(self) -> int:
        """Patches per side. The tower does not see pixels at the right and bottom that do not fill a patch."""
        return self.image_size // self.patch_size

    @property
    def patch_span(self) -> float:
        """Fraction of the square's side, in 0-1, that the patches cover from the upper left corner: 1 if they fill it."""
        return self.grid * self.patch_size / self.image_size

    def _scale_and_shift(self) -> tuple[float, float, float, float]:
        """``sx, sy, tx, ty`` with ``x01 = x_px * sx + tx`` and ``y01 = y_px * sy + ty``."""
        longer = max(self.width, self.height)
        if self.mode == "pad":
            left, top = (longer - self.width) // 2, (longer - self.height) // 2
            return 1 / longer, 1 / longer, left / longer, top / longer
        size = self.image_size
        new_long = int(size * longer / min(self.width, self.height))
        new_width, new_height = (size, new_long) if self.width <= self.height else (new_long, size)
        left, top = (new_width - size) // 2, (new_height - size) // 2
        return new_width / self.width / size, new_height / self.height / size, -left / size, -top / size

    def _map(self, box_px: Sequence[float]) -> Box:
        sx, sy, tx, ty = self._scale_and_shift()
        return (box_px[0] * sx + tx, box_px[1] * sy + ty, box_px[2] * sx + tx, box_px[3] * sy + ty)

    def to_square(self, boxes_px: Sequence[Sequence[float]]) -> list[Box]:
        """Boxes in pixels of the file -> box01 of the square, clipped to it.

        The list keeps its length: a box that the centre crop removes entirely is returned without area.
        """
        return [_clip(self._map(box)) for box in boxes_px]

    def from_square(self, boxes01: Sequence[Sequence[float]]) -> list[Box]:
        """box01 of the square -> pixels of the file, not clipped to the image, since an answer may point into the padding.

        The list keeps its length: a box01 that fails `is_inside` becomes ``(0, 0, 0, 0)``, which overlaps nothing.
        """
        sx, sy, tx, ty = self._scale_and_shift()
        return [
            ((box[0] - tx) / sx, (box[1] - ty) / sy, (box[2] - tx) / sx, (box[3] - ty) / sy)
            if is_inside(box)
            else (0.0, 0.0, 0.0, 0.0)
            for box in boxes01
        ]

    def visible_fraction(self, box_px: Sequence[float]) -> float:
        """Fraction of the box's area that the model sees, in 0-1; below 1 only if ``square`` crops it."""
        whole = self._map(box_px)
        if is_degenerate(whole):
            return 0.0
        seen = _clip(whole)
        # Floating-point error in the mapping may leave an uncropped box slightly below 1.
        return min(1.0, round(_area(seen) / _area(whole), 9))

    def patch_cover(self, boxes_px: Sequence[Sequence[float]]) -> np.ndarray:
        """Fraction of each patch that the union of the boxes covers.

        Returns:
            float64 ``[grid * grid]`` in 0-1, row by row from the top left, in the order of CLIP's patch tokens.
        """
        import numpy as np

        to_patches = self.image_size / self.patch_size
        boxes = [box for box in self.to_square(boxes_px) if not is_degenerate(box)]
        if not boxes:
            return np.zeros(self.grid * self.grid)
        scaled = np.clip(np.array(boxes) * to_patches, 0, self.grid)
        # Cut the square along all patch and box edges: each cell of that grid is covered entirely or not at all.
        lines = np.arange(self.grid + 1, dtype=float)
        xs = np.unique(np.concatenate([lines, scaled[:, [0, 2]].ravel()]))
        ys = np.unique(np.concatenate([lines, scaled[:, [1, 3]].ravel()]))
        middle_x, middle_y = (xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1]) / 2
        covered = np.zeros((len(middle_y), len(middle_x)), dtype=bool)
        for x1, y1, x2, y2 in scaled:
            covered |= ((middle_y > y1) & (middle_y < y2))[:, None] & ((middle_x > x1) & (middle_x < x2))[None, :]
        area = covered * np.diff(ys)[:, None] * np.diff(xs)[None, :]
        cover = np.zeros((self.grid, self.grid))
        # Between an edge one rounding step before the last line and that line, the middle is rounded to the line.
        row, column = (np.minimum(middle.astype(int), self.grid - 1) for middle in (middle_y, middle_x))
        np.add.at(cover, (row[:, None], column[None, :]), area)
        return np.minimum(cover, 1.0).ravel()


@dataclass(frozen=True)
class Orientation:
    """How a stored slice is turned for display: transposed, flipped, then resampled to square pixels. Boxes go along with it.

    Attributes:
        width, height: of the slice as stored, in pixels.
        transpose: swap x and y.
        flip_x, flip_y: mirror left-right, up-down, after the transposition.
        square_size: width and height as displayed, after resampling to square pixels; None if the pixels are shown as they are.
    """

    width: int
    height: int
    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False
    square_size: tuple[int, int] | None = None

    @property
    def turned_size(self) -> tuple[int, int]:
        """Width and height after turning and before resampling, in pixels."""
        return (self.height, self.width) if self.transpose else (self.width, self.height)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as displayed, in pixels."""
        return self.square_size or self.turned_size

    @property
    def turns(self) -> bool:
        """True if the displayed slice is transposed or flipped."""
        return self.transpose or self.flip_x or self.flip_y

    def apply_boxes(self, boxes_px: Sequence[Sequence[float]]) -> list[Box]:
        """Boxes of the stored slice -> boxes of the displayed one, both xyxy in pixels, half-open."""
        width, height = self.turned_size
        turned: list[Box] = []
        for box in boxes_px:
            x1, y1, x2, y2 = (box[1], box[0], box[3], box[2]) if self.transpose else box
            x1, x2 = (width - x2, width - x1) if self.flip_x else (x1, x2)
            y1, y2 = (height - y2, height - y1) if self.flip_y else (y1, y2)
            turned.append((x1, y1, x2, y2))
        return self.resample_boxes(turned)

    def resample_boxes(self, boxes_px: Sequence[Sequence[float]]) -> list[Box]:
        """Boxes of the slice turned but not resampled -> boxes of the displayed one."""
        boxes = [(box[0], box[1], box[2], box[3]) for box in boxes_px]
        if self.square_size is None:
            return boxes
        x, y = (shown / turned for shown, turned in zip(self.square_size, self.turned_size))
        return [(x1 * x, y1 * y, x2 * x, y2 * y) for x1, y1, x2, y2 in boxes]

    def undo_boxes(self, boxes_px: Sequence[Sequence[float]]) -> list[Box]:
        """Boxes of the displayed slice -> boxes of the stored one: the inverse of `apply_boxes`."""
        width, height = self.turned_size
        x, y = (turned / shown for shown, turned in zip(self.size, self.turned_size))
        stored: list[Box] = []
        for box in boxes_px:
            x1, y1, x2, y2 = box[0] * x, box[1] * y, box[2] * x, box[3] * y
            x1, x2 = (width - x2, width - x1) if self.flip_x else (x1, x2)
            y1, y2 = (height - y2, height - y1) if self.flip_y else (y1, y2)
            stored.append((y1, x1, y2, x2) if self.transpose else (x1, y1, x2, y2))
        return stored

    def apply_array(self, values: np.ndarray) -> np.ndarray:
        """Pixels of the stored slice, rows first ``[height, width, ...]`` -> of the displayed one.

        Values that are resampled must be uint8, ``[height, width]`` or ``[height, width, 3]``.
        """
        turned = values.swapaxes(0, 1) if self.transpose else values
        turned = turned[:, ::-1] if self.flip_x else turned
        turned = turned[::-1] if self.flip_y else turned
        return turned if self.square_size is None else _resampled(turned, self.square_size)


def _resampled(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 grey levels or RGB at another width and height, interpolated linearly."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.fromarray(np.ascontiguousarray(values)).resize(size, Image.Resampling.BILINEAR))


# Values of the EXIF tag Orientation -> (transpose, flip_x, flip_y) from the stored to the displayed picture.
_EXIF = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


def exif_orientation(value: int, width: int, height: int) -> Orientation:
    """How a program that follows the EXIF tag Orientation turns a picture of ``width`` x ``height`` stored pixels.

    Example:
        >>> from umed_plugin.grounding.geometry import exif_orientation
        >>> exif_orientation(6, 200, 100).apply_boxes([(0, 0, 20, 10)])  # turned clockwise: top left goes to top right
        [(90, 0, 100, 20)]
    """
    return Orientation(width, height, *_EXIF.get(value, _EXIF[1]))


@dataclass(frozen=True)
class Montage:
    """Tiles of one size in rows, in a grid as close to a square as possible. The last row may be incomplete.

    Attributes:
        width, height: of a tile, in pixels.
        count: of tiles.
    """

    width: int
    height: int
    count: int

    @property
    def columns(self) -> int:
        """Tiles in a row."""
        return math.ceil(math.sqrt(self.count))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole, in pixels."""
        return self.columns * self.width, math.ceil(self.count / self.columns) * self.height

    def corner(self, tile: int) -> tuple[int, int]:
        """x and y of a tile's upper left corner, in pixels."""
        row, column = divmod(tile, self.columns)
        return column * self.width, row * self.height

    def apply_boxes(self, boxes_px: Sequence[Sequence[float]], tiles: Sequence[int]) -> list[Box]:
        """Boxes in pixels of their tiles -> in pixels of the whole."""
        moved: list[Box] = []
        for (x1, y1, x2, y2), tile in zip(boxes_px, tiles):
            x, y = self.corner(tile)
            moved.append((x1 + x, y1 + y, x2 + x, y2 + y))
        return moved


def _clip(box01: Box) -> Box:
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in box01)
    return (x1, y1, x2, y2)


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
