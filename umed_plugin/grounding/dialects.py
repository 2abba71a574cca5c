"""Box dialects of other models: the order of the numbers, their unit, and the frame that they refer to.

LLaVA-1.5 and this plugin write corners in 0-1 of the padded square. Others write 0-1000 (Qwen-VL, InternVL), pixels
(Qwen2.5-VL), or width and height instead of the second corner (COCO). Nearly all except LLaVA refer to the image itself, not to
the padded square. `umed_plugin.grounding.boxes` detects the form (brackets, tags, bins) from the text. Order, unit and frame
cannot be detected and must be declared: ``umed evaluate ... --boxes qwen_vl``, or ``--boxes xywh,1000,image``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from umed_plugin.errors import UsageError, unknown_name
from umed_plugin.grounding.box_bins import Box
from umed_plugin.grounding.box_text import scan
from umed_plugin.grounding.written_box import WrittenBox

ORDERS = ("xyxy", "xywh", "cxcywh", "yxyx")
UNITS = ("auto", "1", "100", "1000", "1024", "pixels")
FRAMES = ("square", "image")


@dataclass(frozen=True)
class BoxDialect:
    """One way to write boxes.

    Attributes:
        order: ``xyxy`` (corners), ``xywh`` (upper left corner and size), ``cxcywh`` (centre and size), ``yxyx`` (corners, y
            first).
        unit: the number that stands for the full side of the frame (``1``, ``100``, ``1000``, ``1024``); ``pixels`` of the image
            file; or ``auto``: 1, or 1000 for four whole numbers of which one is above 1. Bins (MAIRA-2, Kosmos-2, PaliGemma)
            have their own unit.
        frame: the ``square`` that the model sees, or the ``image`` itself.
    """

    order: str = "xyxy"
    unit: str = "auto"
    frame: str = "square"

    def read(self, text: str, width: int, height: int) -> list[Box]:
        """The boxes of a text as xyxy in 0-1 of the frame, in the order of the text, neither clipped nor reordered.

        Args:
            text: an answer.
            width, height: of the image file, in pixels.
        """
        return [box for box in self.read_all(text, width, height) if box is not None]

    def read_all(self, text: str, width: int, height: int) -> list[Box | None]:
        """As `read`, with None for each attempt at a box that cannot be read, such as one that is cut off."""
        return [
            self._read(written, width, height) if written.is_box(self.unit) else None
            for written in scan(text)
            if written.is_box(self.unit) or written.is_attempt()
        ]

    def unread(self, text: str) -> list[str]:
        """The places of a text that hold numbers in brackets, or an attempt at a box, and were not read as one."""
        plain = [written for written in scan(text) if not written.is_box(self.unit)]
        return [text[written.start : written.end] for written in plain]

    def _read(self, written: WrittenBox, width: int, height: int) -> Box:
        if written.kind == "bins" and written.numbers is not None:
            return written.numbers
        if written.kind == "percent":
            wide = high = 1.0
        elif self.unit == "pixels":
            wide, high = float(width), float(height)
        elif self.unit == "auto":
            wide = high = 1000.0 if written.kind == "whole" and max(written.numbers or ()) > 1 else 1.0
        else:
            wide = high = float(self.unit)
        x1, y1, x2, y2 = written.corners(self.order)
        # A sum of rounded numbers may exceed 1 by floating-point error.
        return _just_inside(x1 / wide), _just_inside(y1 / high), _just_inside(x2 / wide), _just_inside(y2 / high)


def _just_inside(value: float) -> float:
    return min(max(value, 0.0), 1.0) if math.isclose(value, min(max(value, 0.0), 1.0), abs_tol=1e-9) else value


LLAVA = BoxDialect()
DIALECTS = {
    "llava": LLAVA,
    "shikra": LLAVA,
    "maira": LLAVA,
    "radvlm": BoxDialect(unit="1", frame="image"),
    "qwen_vl": BoxDialect(unit="1000", frame="image"),
    "internvl": BoxDialect(unit="1000", frame="image"),
    "qwen2_5_vl": BoxDialect(unit="pixels", frame="image"),
    "kosmos": BoxDialect(frame="image"),
    "paligemma": BoxDialect(frame="image"),
    "coco": BoxDialect(order="xywh", unit="pixels", frame="image"),
}


def find_dialect(name: str) -> BoxDialect:
    """The dialect called ``name``, or the one that ``order,unit,frame`` states.

    Raises:
        UsageError: there is no such dialect, or one of the three parts is not allowed.
    """
    if "," not in name:
        if name not in DIALECTS:
            raise UsageError(
                unknown_name("box dialect", name, DIALECTS)
                + f" Or order,unit,frame of {'|'.join(ORDERS)}, {'|'.join(UNITS)}, "
                f"{'|'.join(FRAMES)}: 'xywh,1000,image'."
            )
        return DIALECTS[name]
    parts = [part.strip() for part in name.split(",")]
    allowed = (("order", ORDERS), ("unit", UNITS), ("frame", FRAMES))
    if len(parts) != len(allowed):
        raise UsageError(
            f"box dialect {name!r} has {len(parts)} parts; needed: order,unit,frame, as in 'xywh,1000,image'."
        )
    for part, (kind, names) in zip(parts, allowed):
        if part not in names:
            raise UsageError(unknown_name(f"{kind} of a box dialect", part, names))
    return BoxDialect(*parts)
