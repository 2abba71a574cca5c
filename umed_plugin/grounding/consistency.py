"""Whether an answer agrees with itself: the number that it says with its boxes, sides with boxes, names with negations.

The idea is Dr-LLaVA's (arXiv 2405.19567), which rewards answers to several questions that fit together. Here the steps detection,
localisation and recognition are in one answer, so that no labels and no file of rules are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from umed_plugin.grounding.boxes import Box, copies, is_degenerate, is_inside
from umed_plugin.grounding.claims import number_said, says_normal, sides_said
from umed_plugin.grounding.dialects import LLAVA, BoxDialect
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import boxes_in_square
from umed_plugin.grounding.square_move import image_in_square
from umed_plugin.grounding.terms import find_terms, ruled_out_classes

# How far a box may leave the image, in 0-1 of the square: its numbers are rounded to two decimals.
_ROUNDING = 0.011


def consistency_of(
    text: str, record: Mapping[str, Any], geometry: ImageGeometry, dialect: BoxDialect = LLAVA
) -> float | None:
    """Share of the checks that hold, of those that apply to an answer (`checks`), 0-1; None if none applies.

    Also None for an answer that claims nothing abnormal where there is something: it has nothing that could disagree, and would
    be the safest answer to every question.

    Args:
        text: the answer.
        record: its ``terms``, whether its ``objects`` has boxes, and how ``--umed_augment`` has moved it, are used.
        geometry: of the record's image.
        dialect: how the answer writes boxes.
    """
    found = checks(text, record["terms"], geometry, dialect, image01=image_in_square(record, geometry))
    # "0 findings" has a number, which agrees with no box.
    only_normal = set(found) <= {"normal", "number"} and all(found.values())
    if not found or (only_normal and record["objects"]["bbox"]):
        return None
    return sum(found.values()) / len(found)


def checks(
    text: str,
    terms: Mapping[str, Sequence[str]],
    geometry: ImageGeometry,
    dialect: BoxDialect = LLAVA,
    *,
    image01: Box | None = None,
) -> dict[str, bool]:
    """The checks that apply to an answer, and whether each holds.

    - ``number``: the number of findings that it says is the number of its boxes.
    - ``named``: there are no fewer boxes than classes named, and no more than findings named or said.
    - ``side``: each "upper left" in a sentence with a box is where the box lies.
    - ``normal``: an answer that says that nothing is abnormal has no box and names nothing.
    - ``ruled_out``: no class is both named and ruled out.
    - ``same_box``: no place has more boxes than there are classes named.
    - ``inside``: every box has an area and lies in the image.

    Args:
        text: the answer. A box that cannot be read counts as one without area.
        terms: class -> names.
        geometry: of the image.
        dialect: how the answer writes boxes.
        image01: where the image lies in the square, in 0-1 (`image_in_square`); None: where the geometry puts it.
    """
    image01 = image_in_square({}, geometry) if image01 is None else image01
    boxes, mentions = boxes_in_square(text, geometry, dialect), [cls for _, _, cls in find_terms(text, terms)]
    named, number, sides = set(mentions), number_said(text, terms), sides_said(text)
    ruled_out = ruled_out_classes(text, terms)
    found = {}
    if number is not None:
        found["number"] = number == len(boxes)
    if named or boxes:
        found["named"] = len(named) <= len(boxes) <= max(len(mentions), number or 0)
    if sides:
        found["side"] = all(_lies_there(side.fits, boxes, side.box) for side in sides)
    if says_normal(text, terms) or (ruled_out and not named):
        found["normal"] = not named and not boxes
    if named:
        found["ruled_out"] = not named & ruled_out
    if len(boxes) > 1:
        found["same_box"] = all(earlier < max(len(named), 1) for earlier in copies(boxes))
    if boxes:
        found["inside"] = all(_is_within(box, image01) for box in boxes)
    return found


def _lies_there(fits: Any, boxes: Sequence[Box], index: int) -> bool:
    if is_degenerate(boxes[index]):
        return False
    x1, y1, x2, y2 = boxes[index]
    return bool(fits((x1 + x2) / 2, (y1 + y2) / 2))


def _is_within(box: Box, image01: Box) -> bool:
    return is_inside(box) and all(
        (
            box[0] >= image01[0] - _ROUNDING,
            box[1] >= image01[1] - _ROUNDING,
            box[2] <= image01[2] + _ROUNDING,
            box[3] <= image01[3] + _ROUNDING,
        )
    )
