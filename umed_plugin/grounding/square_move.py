"""How an augmented study is made from the square that the model sees: mirrored, turned, zoomed, shifted. Boxes move along.

Coordinates are 0-1 of the square, x to the right and y down. A point p moves to ``c + zoom * R (F p - c) + shift``, with the
centre c, the mirroring F and the rotation R.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Optional

from umed_plugin.grounding.boxes import Box, is_degenerate
from umed_plugin.grounding.geometry import ImageGeometry

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class SquareMove:
    """One movement of the square; the default moves nothing.

    Attributes:
        left_right, up_down: mirrored so, before all else.
        angle: of the rotation about the centre, in degrees, clockwise.
        zoom: factor about the centre. Above 1, a part of the square fills it; below 1, a margin appears.
        shift: of the content after that, (x, y) in 0-1 of the square's side.

    Example:
        >>> from umed_plugin.grounding.square_move import SquareMove
        >>> SquareMove(left_right=True).boxes([(0.25, 0.125, 0.5, 0.375)])
        [(0.5, 0.125, 0.75, 0.375)]
        >>> SquareMove(zoom=2.0).boxes([(0.25, 0.25, 0.5, 0.5)])
        [(0.0, 0.0, 0.5, 0.5)]
    """

    left_right: bool = False
    up_down: bool = False
    angle: float = 0.0
    zoom: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)

    @property
    def mirrors(self) -> bool:
        """Whether words of side change."""
        return self.left_right or self.up_down

    @property
    def resamples(self) -> bool:
        """Whether it is more than a mirroring, which keeps every pixel's value."""
        return (self.angle, self.zoom, *self.shift) != (0.0, 1.0, 0.0, 0.0)

    def boxes(self, boxes01: Sequence[Sequence[float]]) -> list[Box]:
        """The boxes after the movement, not clipped to the square.

        A turned box is the box around the turned ellipse that fills the original one. The box around the turned corners would be
        up to a third larger than a round lesion at 10 degrees (Kalra et al. 2021, arXiv 2109.13488).
        """
        return [self._box(box) for box in boxes01]

    def _box(self, box: Sequence[float]) -> Box:
        x1, y1, x2, y2 = box
        x1, x2 = (1 - x2, 1 - x1) if self.left_right else (x1, x2)
        y1, y2 = (1 - y2, 1 - y1) if self.up_down else (y1, y2)
        if not self.resamples:
            return (x1, y1, x2, y2)
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        x, y, wide, high = (x1 + x2) / 2 - 0.5, (y1 + y2) / 2 - 0.5, (x2 - x1) / 2, (y2 - y1) / 2
        x, y = self.zoom * (cos * x - sin * y), self.zoom * (sin * x + cos * y)
        x, y = 0.5 + x + self.shift[0], 0.5 + y + self.shift[1]
        half_wide = self.zoom * math.hypot(wide * cos, high * sin)
        half_high = self.zoom * math.hypot(wide * sin, high * cos)
        return (x - half_wide, y - half_high, x + half_wide, y + half_high)

    def around(self, box: Sequence[float]) -> Box:
        """The box around the moved corners of a rectangle, not clipped to the square: what fills a rectangle lies within."""
        x1, y1, x2, y2 = box
        corners = [self._box((x, y, x, y)) for x in (x1, x2) for y in (y1, y2)]
        xs, ys = [corner[0] for corner in corners], [corner[1] for corner in corners]
        return (min(xs), min(ys), max(xs), max(ys))

    def source_matrix(self, size: int) -> np.ndarray:
        """Where the pixels of the moved square, after the mirroring, come from: what MONAI's ``Affined`` takes.

        Args:
            size: side of the square, in pixels.

        Returns:
            float64 [3, 3]: from (row, column, 1) in pixels from the moved square's centre to the same of its source.
        """
        import numpy as np

        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        x, y = (value * size for value in self.shift)
        turned = self.zoom * np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1 / self.zoom]])
        turned[:2, 2] = (y, x)
        return np.linalg.inv(turned)


def move_of(logged: Mapping[str, Any]) -> SquareMove:
    """The movement that `umed_plugin.data.augmentation.study.Study.as_json` has written."""
    return SquareMove(**{**logged, "shift": tuple(logged["shift"])})


def image_in_square(record: Mapping[str, Any], geometry: ImageGeometry) -> Box:
    """The smallest box, in 0-1 of the square, around what the model sees of a record's image; the rest is padding or margin.

    An image that was turned does not fill it: the padding reaches into its corners.

    Args:
        record: its ``augmented`` says how ``--umed_augment`` has moved the square; without it, nothing has moved.
        geometry: of the image file.

    Example:
        >>> from umed_plugin import ImageGeometry
        >>> wide = ImageGeometry(200, 100)
        >>> image_in_square({}, wide)
        (0.0, 0.25, 1.0, 0.75)
        >>> image_in_square({"augmented": {"zoom": 0.5, "shift": [0.0, 0.25]}}, wide)
        (0.25, 0.625, 0.75, 0.875)
    """
    (image,) = geometry.to_square([(0, 0, geometry.width, geometry.height)])
    move = _own_move(record.get("augmented"))
    return image if move is None else clipped(move.around(image))


def _own_move(value: Any) -> Optional[SquareMove]:
    """What `move_of` reads; None for other values. In somebody's own records, the key ``augmented`` may mean something else."""
    if not isinstance(value, Mapping) or not {"shift"} <= {*value} <= {field.name for field in fields(SquareMove)}:
        return None
    return move_of(value) if isinstance(value["shift"], (list, tuple)) and len(value["shift"]) == 2 else None


def kept_fraction(moved: Box) -> float:
    """Fraction of a moved box's area that lies in the square, in 0-1; 0 for a box without area."""
    if is_degenerate(moved):
        return 0.0
    width, height = (min(moved[2], 1.0) - max(moved[0], 0.0)), (min(moved[3], 1.0) - max(moved[1], 0.0))
    return max(width, 0.0) * max(height, 0.0) / ((moved[2] - moved[0]) * (moved[3] - moved[1]))


def clipped(moved: Box) -> Box:
    """The part of a moved box that lies in the square."""
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in moved)
    return (x1, y1, x2, y2)
