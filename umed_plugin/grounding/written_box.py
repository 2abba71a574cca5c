"""A box as a text has it: its numbers, and what tells whether they are a box (`umed_plugin.grounding.box_text`)."""

from __future__ import annotations

from dataclasses import dataclass

from umed_plugin.grounding.box_bins import Box


@dataclass(frozen=True)
class WrittenBox:
    """A box, an attempt at one, or four bare numbers, as a text has them.

    Attributes:
        start, end: its characters in the text.
        numbers: four numbers as written; of ``percent`` and ``bins`` in 0-1. None if it cannot be read.
        kind: ``whole`` or ``decimal`` numbers, ``percent``, ``bins``, or ``none`` if it cannot be read.
        explicit: whether something beside the numbers says that they are a box.
        order: of the numbers, where the text names them; None: the dialect's.
    """

    start: int
    end: int
    numbers: Box | None
    kind: str
    explicit: bool
    order: str | None = None

    def is_box(self, unit: str = "auto") -> bool:
        """Whether the numbers are a box in a dialect of this unit; False for an attempt that cannot be read."""
        if self.numbers is None:
            return False
        if self.explicit or self.kind in ("percent", "bins"):
            return True
        steps = {round(after - before, 9) for before, after in zip(self.numbers, self.numbers[1:])}
        largest = max(map(abs, self.numbers))
        if largest > 1 and len(steps) == 1 and 0 < next(iter(steps)) < 10:
            return False  # an enumeration: "images (1, 2, 3, 4)"
        if unit not in ("auto", "1"):
            return True
        if self.kind == "whole":
            return largest <= 1 or largest >= 100
        return largest <= 2 or sum(0 <= value <= 1 for value in self.numbers) >= 2

    def corners(self, order: str = "xyxy") -> Box:
        """The numbers as x1, y1, x2, y2, in their own unit.

        Args:
            order: of the dialect, where the text does not name the numbers: ``xyxy``, ``yxyx``, ``xywh`` or ``cxcywh``.

        Raises:
            ValueError: it cannot be read.
        """
        if self.numbers is None:
            raise ValueError("an attempt at a box has no corners")
        a, b, c, d = self.numbers
        return {
            "xyxy": (a, b, c, d),
            "yxyx": (b, a, d, c),
            "xywh": (a, b, a + c, b + d),
            "cxcywh": (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
        }[self.order or order]

    def is_attempt(self) -> bool:
        """Whether it was meant as a box, and cannot be read."""
        return self.numbers is None and self.explicit
