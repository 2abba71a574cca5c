"""How other models write boxes: the order of the numbers, their unit, and what they are fractions of.

LLaVA-1.5 and this plugin write corners in 0-1 of the padded square. Others write 0-1000 (Qwen-VL, InternVL), pixels
(Qwen2.5-VL), width and height instead of the second corner (COCO), and nearly all but LLaVA mean the image itself and not the
padded square. Form (brackets, tags, bins) is told from the text by `umed_plugin.grounding.boxes`; these three cannot be told,
they are
declared: ``umed evaluate ... --boxes qwen_vl``, or ``--boxes xywh,1000,image``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from umed_plugin.errors import UsageError, unknown_name
from umed_plugin.grounding.boxes import Box, written_boxes

ORDERS = ("xyxy", "xywh", "cxcywh", "yxyx")
UNITS = ("auto", "1", "100", "1000", "1024", "pixels")
FRAMES = ("square", "image")


@dataclass(frozen=True)
class BoxDialect:
    """One way to write boxes.

    Attributes:
        order: ``xyxy`` corners, ``xywh`` upper left corner and size, ``cxcywh`` centre and size, ``yxyx`` corners, y first.
        unit: what 1 is written as (``1``, ``100``, ``1000``, ``1024``); ``pixels`` of the image file; ``auto``: 1, or 1000 for
            four whole numbers of which one is above 1. Bins (MAIRA-2, Kosmos-2, PaliGemma) have their own.
        frame: the ``square`` that the model sees, or the ``image`` itself.
    """

    order: str = "xyxy"
    unit: str = "auto"
    frame: str = "square"

    def read(self, text: str, width: int, height: int) -> list[Box]:
        """The boxes of a text as xyxy in 0-1 of the frame, in the order of the text; not clipped or reordered.

        Args:
            text: an answer.
            width, height: of the image file, in pixels.
        """
        return [self._read(box, kind, width, height) for box, kind in written_boxes(text)]

    def _read(self, box: Box, kind: str, width: int, height: int) -> Box:
        if kind == "bins":
            return box
        if self.unit == "pixels":
            wide, high = float(width), float(height)
        elif self.unit == "auto":
            wide = high = 1000.0 if kind == "whole" and max(box) > 1 else 1.0
        else:
            wide = high = float(self.unit)
        a, b, c, d = box
        x1, y1, x2, y2 = {
            "xyxy": (a, b, c, d),
            "yxyx": (b, a, d, c),
            "xywh": (a, b, a + c, b + d),
            "cxcywh": (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
        }[self.order]
        # A sum of rounded numbers may pass 1 by the error of its binary form.
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
    """The dialect of that name, or that which ``order,unit,frame`` states.

    Raises:
        UsageError: there is no such name, or one of the three is not allowed.
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
