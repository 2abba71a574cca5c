"""The conversation of an augmented study: boxes and words of side say where things lie in the changed image.

An answer of the template writer is written again from the moved boxes, with the same wording. In any other text, such as a
question of ``looks``, boxes are moved where they stand, and words of side are mirrored. Rotation, zoom and shift change no word
there. They are taken only if every lesion stays in its part of the image (the same third and the same half, across and down), or
no word says where in the image something lies.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from functools import partial
from typing import Any, Optional

from umed_plugin.data.records import Record, record_geometry, true_boxes
from umed_plugin.data.template_writer import write_conversation
from umed_plugin.errors import UmedError
from umed_plugin.files import text_bytes
from umed_plugin.grounding.boxes import Box, format_box, iou_matrix, is_degenerate, rewrite_boxes
from umed_plugin.grounding.side_words import mirrored_text, names_place, names_side
from umed_plugin.grounding.square_move import SquareMove, clipped
from umed_plugin.grounding.terms import replace_terms

Turns = list[dict[str, Any]]
_FLIPS = ("left_right", "up_down")
_SAME_BOX = 0.5  # IoU of a written box with a true one, above which they are the same lesion's
_DECIMALS = (2, 3)
_TEXTS = ("asked", "phrase")  # texts of a record beside its turns, which repeat them
# "Left" may mean a half or a third of the image.
_BORDERS = (1 / 3, 1 / 2, 2 / 3)


def can_mirror(record: Record, flip: str) -> bool:
    """Whether the record's text, class names included, has a form for the mirrored image."""
    if any(names_side(name, flip) for names in record["terms"].values() for name in names):
        return False
    return all(mirrored_text(turn["value"], [flip]) is not None for turn in record["conversations"])


def is_templated(record: Record) -> bool:
    """Whether the template writer gives exactly this conversation."""
    try:
        return _written(record) == record["conversations"]
    except (UmedError, LookupError, TypeError, ValueError):  # of a record from elsewhere
        return False


def _written(record: Record) -> Turns:
    """What `umed_plugin.data.build` writes for the record."""
    source = record["provenance"]
    rng = random.Random(text_bytes(f"{source['seed']}:{record['id']}"))
    return write_conversation(record, record_geometry(record), rng, source["box_decimals"])


def moved_record(record: Record, move: SquareMove, templated: bool) -> Optional[Record]:
    """The record after the movement, or None if its text cannot follow.

    Args:
        record: a valid one, whose text `can_mirror` as the movement does.
        move: of the square.
        templated: from `is_templated`.
    """
    geometry = record_geometry(record)
    before = geometry.to_square(true_boxes(record))
    after = [clipped(box) for box in move.boxes(before)]
    if any(is_degenerate(box) for box in after):
        return None
    pixels = geometry.from_square(after)
    # The template writer names lesions from top to bottom.
    order = list(range(len(after)))
    if templated:
        order.sort(key=lambda i: (pixels[i][1], pixels[i][0]))
    found = record["objects"]
    bbox = [[round(value, 3) for value in pixels[i]] for i in order]
    moved = {**record, "objects": {**found, "ref": [found["ref"][i] for i in order], "bbox": bbox}}
    flips = [flip for flip, taken in zip(_FLIPS, (move.left_right, move.up_down)) if taken]
    for name in _TEXTS:
        if name in record:
            moved[name] = mirrored_text(record[name], flips)
    if any(moved[name] is None for name in _TEXTS if name in moved):
        return None
    if move.resamples and not _stay_in_place(before, after, move) and _says_where(record, templated):
        return None
    turns = _written(moved) if templated else _moved_turns(record, move, flips, before, after)
    return None if turns is None else {**moved, "conversations": turns}


def _moved_turns(
    record: Record, move: SquareMove, flips: Sequence[str], before: Sequence[Box], after: Sequence[Box]
) -> Optional[Turns]:
    turns = []
    for turn in record["conversations"]:
        text = _with_moved_boxes(turn["value"], move, before, after)
        text = None if text is None else mirrored_text(text, flips)
        if text is None:
            return None
        turns.append({**turn, "value": text})
    return turns


def _says_where(record: Record, templated: bool) -> bool:
    """Whether a text that is not written again says where something lies: of the template writer's turns, only ``asked``."""
    texts = [record.get("asked", "")] if templated else [turn["value"] for turn in record["conversations"]]
    return any(names_place(replace_terms(text, record["terms"], "x")) for text in texts)


def _stay_in_place(before: Sequence[Box], after: Sequence[Box], move: SquareMove) -> bool:
    """Whether each box is in the part of the square where the mirroring alone puts it."""
    return all(_part(old, move.left_right, move.up_down) == _part(new) for old, new in zip(before, after))


def _part(box: Box, left_right: bool = False, up_down: bool = False) -> tuple[int, int]:
    """Column and row of a box's centre between the borders of thirds and halves; those of the mirrored part where said.

    The part is mirrored and not the box: the words of a box in the very middle are mirrored too.
    """
    x1, y1, x2, y2 = box
    across, down = (bisect(_BORDERS, value / 2) for value in (x1 + x2, y1 + y2))
    last = len(_BORDERS)
    return (last - across if left_right else across), (last - down if up_down else down)


def _with_moved_boxes(text: str, move: SquareMove, before: Sequence[Box], after: Sequence[Box]) -> Optional[str]:
    """The text with its boxes moved; None if they are not written as `format_box` does, or one leaves the square."""
    usual = [decimals for decimals in _DECIMALS if rewrite_boxes(text, partial(_plainly, decimals)) == text]
    if not usual:
        return None
    left = False

    def written(box: Box) -> str:
        nonlocal left
        moved = _moved_box(box, move, before, after)
        left = left or moved is None
        return "" if moved is None else format_box(moved, usual[0])

    moved_text = rewrite_boxes(text, written)
    return None if left else moved_text


def _plainly(decimals: int, box: Box) -> str:
    return "" if is_degenerate(box) else format_box(box, decimals)


def _moved_box(box: Box, move: SquareMove, before: Sequence[Box], after: Sequence[Box]) -> Optional[Box]:
    """Of a written box that is a lesion's the lesion's own after the movement: its rounding is not moved along."""
    if before:
        overlaps = iou_matrix([box], before)[0]
        if overlaps.max() >= _SAME_BOX:
            return after[int(overlaps.argmax())]
    moved = clipped(move.boxes([box])[0])
    return None if is_degenerate(moved) else moved
