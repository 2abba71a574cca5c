"""One scorer for rewards and evaluation: which classes an answer names, and how well its boxes fit.

The paper does not define how its accuracy matches an answer. Here an answer is correct if the set of classes that it names equals
the record's set. For a study without abnormality it is correct if it names no class and gives no box.
`umed_plugin.grounding.terms` determines which classes an answer names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from umed_plugin.grounding.answer_types import asks_for_names
from umed_plugin.grounding.boxes import Box, is_degenerate, is_inside, set_iou
from umed_plugin.grounding.dialects import LLAVA, BoxDialect
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.terms import named_classes

_BOX_THAT_IS_NONE: Box = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class AnswerScore:
    """Scores of one answer against its record.

    Attributes:
        accuracy: 1.0 if exactly the record's classes are named (none, and no box, for a negative), else 0.0.
        class_f1: F1 in 0-1 of the named classes against the record's; 1.0 if both are empty.
        set_iou: IoU in 0-1 of predicted and true boxes, matched one to one. A negative scores 1.0 without a box, else 0.0.
        boxes: predicted boxes in pixels of the record's image, in the order of the answer.
        predicted01: the same boxes as they are compared, in 0-1 of the square; a malformed one has no area.
        true01: the true boxes that the model can see, in 0-1 of the square.
        unread: number of boxes in the answer that could not be read; they are among the boxes, without area.
        diagnosed: whether the record asks for names. Of a phrase alone, ``accuracy`` and ``class_f1`` mean nothing.
    """

    accuracy: float
    class_f1: float
    set_iou: float
    boxes: list[Box]
    predicted01: list[Box]
    true01: list[Box]
    unread: int = 0
    diagnosed: bool = True

    @property
    def n_true(self) -> int:
        """Number of true boxes that the model can see."""
        return len(self.true01)


def boxes_in_square(text: str, geometry: ImageGeometry, dialect: BoxDialect = LLAVA) -> list[Box]:
    """The boxes of an answer in 0-1 of the square that the model sees, in the order of the answer, not clipped.

    An attempt at a box that cannot be read (cut off, three numbers) is ``(0, 0, 0, 0)``, which overlaps nothing: it is not an
    absence. If the dialect refers to the image, so is a box that leaves the image.
    """
    read = [box or _BOX_THAT_IS_NONE for box in dialect.read_all(text, geometry.width, geometry.height)]
    if dialect.frame == "square":
        return read
    width, height = geometry.width, geometry.height
    pixels = [(x1 * width, y1 * height, x2 * width, y2 * height) for x1, y1, x2, y2 in read]
    return [placed if is_inside(box) else _BOX_THAT_IS_NONE for box, placed in zip(read, geometry.to_square(pixels))]


def score_answer(
    text: str, record: Mapping[str, Any], geometry: ImageGeometry, dialect: BoxDialect = LLAVA
) -> AnswerScore:
    """Score an answer against its record.

    Boxes are compared in the square, as the model sees them. A lesion that LLaVA's centre crop removes entirely is not expected,
    and neither is its class unless another lesion has it. A predicted box that has no area or leaves the square overlaps nothing
    and counts as wrong.

    Args:
        text: the model's answer.
        record: its ``objects`` (``ref`` classes and ``bbox`` in pixels of the image file) and ``terms`` are used.
        geometry: of the record's image.
        dialect: how the answer writes boxes.

    Example:
        >>> from umed_plugin import ImageGeometry, score_answer
        >>> record = {"objects": {"ref": ["nodule"], "bbox": [[50, 25, 100, 75]]}, "terms": {"nodule": ["nodule"]}}
        >>> score = score_answer("At [0.25, 0.375, 0.50, 0.625] lies a nodule.", record, ImageGeometry(200, 100))
        >>> score.accuracy, score.set_iou
        (1.0, 1.0)
        >>> score_answer("No nodule is visible.", record, ImageGeometry(200, 100)).accuracy
        0.0
    """
    predicted = boxes_in_square(text, geometry, dialect)
    in_square = geometry.to_square(record["objects"]["bbox"])
    seen = [(ref, box) for ref, box in zip(record["objects"]["ref"], in_square) if not is_degenerate(box)]
    true = [box for _, box in seen]
    wanted, named = {ref for ref, _ in seen}, named_classes(text, record["terms"])
    wanted = wanted if in_square else set(record["objects"]["ref"])  # a report names findings and has no boxes
    right = named == wanted and (bool(wanted) or not predicted)
    f1 = 2 * len(named & wanted) / (len(named) + len(wanted)) if named or wanted else 1.0
    compared = [box if is_inside(box) else _BOX_THAT_IS_NONE for box in predicted]
    unread = dialect.read_all(text, geometry.width, geometry.height).count(None)
    placed = geometry.from_square(predicted)
    overlap, diagnosed = set_iou(compared, true), asks_for_names(record)
    return AnswerScore(float(right), f1, overlap, placed, compared, true, unread, diagnosed)


@dataclass(frozen=True)
class Scorer:
    """Properties of an evaluated checkpoint that scoring its answers needs.

    Attributes:
        mode: ``pad`` or ``square``: how it sees images.
        image_size, patch_size: of its vision tower, in pixels.
        dialect: how it writes boxes.
    """

    mode: str = "pad"
    image_size: int = 336
    patch_size: int = 14
    dialect: BoxDialect = LLAVA

    def geometry(self, size: Sequence[int]) -> ImageGeometry:
        """Geometry of an image of this width and height, in pixels."""
        return ImageGeometry(int(size[0]), int(size[1]), self.mode, self.image_size, self.patch_size)
