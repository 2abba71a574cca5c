"""The conversation of an augmented study: boxes and words of side say where things lie in the changed image.

An answer of the template writer is written again from the moved boxes, with the same wording. In any other text, such as a
question of ``looks``, boxes are moved where they stand, and words of side are mirrored. Rotation, zoom and shift change no word
there. They are taken only if every box stays in its part of the image (the same third and the same half, across and down), or no
word says where in the image something lies.

A written box is moved as it stands, right or wrong: the answer of a model must not learn the label. Only one that is a lesion's
own, rounded, is written again from the lesion's.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, Optional

from umed_plugin.data.records import Record, record_geometry, true_boxes
from umed_plugin.data.template_writer import write_conversation
from umed_plugin.errors import UmedError
from umed_plugin.files import text_bytes
from umed_plugin.grounding.boxes import Box, find_boxes, format_box, is_degenerate, rewrite_boxes, round_box
from umed_plugin.grounding.loose_coordinates import has_loose_coordinates
from umed_plugin.grounding.side_words import mirrored_text, names_place, names_side
from umed_plugin.grounding.square_move import SquareMove, clipped
from umed_plugin.grounding.terms import replace_terms

Turns = list[dict[str, Any]]
FLIPS = ("left_right", "up_down")
# A half step of the last decimal, and a hair: boxes of a file are rounded too.
_ROUNDING = 0.51
_DECIMALS = (2, 3)
_TEXTS = ("asked", "phrase")  # texts of a record beside its turns, which repeat them
# "Left" may mean a half or a third of the image.
_BORDERS = (1 / 3, 1 / 2, 2 / 3)


def can_mirror(record: Record, flip: str) -> bool:
    """Whether the record's text, class names included, has a form for the mirrored image."""
    if any(names_side(name, flip) for names in record["terms"].values() for name in names):
        return False
    return all(mirrored_text(text, [flip]) is not None for text in _own_texts(record))


def _own_texts(record: Record) -> list[str]:
    return [part for turn in record["conversations"] for part in _own_parts(record, turn["value"])]


def _own_parts(record: Record, text: str) -> list[str]:
    """A turn's text, in two parts around what `similar` says in it: that is about other studies, which do not move."""
    similar = record.get("similar")
    return text.split(similar, 1) if similar else [text]


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


class StudyText:
    """What a record's text says of places. It is found once, and asked of each movement that is tried.

    Args:
        record: a valid one.

    Attributes:
        templated: from `is_templated`. The turns are then written again after a movement, all but ``asked``.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.templated = is_templated(record)

    @cached_property
    def has_fixed_places(self) -> bool:
        """Whether a text says where something lies in a form that is not moved. Such a record follows no movement."""
        kept = [self.record[name] for name in _TEXTS if name in self.record]
        moved = [] if self.templated else _own_texts(self.record)
        return (
            any(map(find_boxes, kept))
            or any(_decimals_of(text) is None for text in moved)
            or has_loose_coordinates([*kept, *moved])
        )

    @cached_property
    def says_where(self) -> bool:
        """Whether a text that is not written again says in words where something lies."""
        texts = [self.record.get("asked", "")] if self.templated else _own_texts(self.record)
        return any(names_place(replace_terms(text, self.record["terms"], "x")) for text in texts)


def moved_record(text: StudyText, move: SquareMove) -> Optional[Record]:
    """The record after the movement, or None if its text cannot follow.

    Args:
        text: of a record without fixed places, for which `can_mirror` allows the mirrorings of the movement.
        move: of the square.
    """
    record, templated = text.record, text.templated
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
    flips = [flip for flip, taken in zip(FLIPS, (move.left_right, move.up_down)) if taken]
    for name in _TEXTS:
        if name in record:
            moved[name] = mirrored_text(record[name], flips)
    if any(moved[name] is None for name in _TEXTS if name in moved):
        return None
    boxes = _Boxes(move, before, after)

    def strays() -> bool:
        return move.resamples and not boxes.stay_in_place() and text.says_where

    if strays():  # most movements of such a text, and it costs less than its turns
        return None
    turns = _written(moved) if templated else _moved_turns(record, flips, boxes)
    return None if turns is None or strays() else {**moved, "conversations": turns}


class _Boxes:
    """Boxes before and after a movement: those of the lesions, and those of the text as they are met there."""

    def __init__(self, move: SquareMove, before: Sequence[Box], after: Sequence[Box]) -> None:
        self._move = move
        self._lesions = list(zip(before, after))
        self._others: list[tuple[Box, Box]] = []

    def moved(self, written: Box, decimals: int) -> Optional[Box]:
        """The written box after the movement, clipped; None if it leaves the square.

        Of one that is a lesion's own it is the lesion's: its rounding is not moved along.
        """
        own = [pair for pair in self._lesions if _is_rounded(written, pair[0], decimals)]
        if own:
            return min(own, key=lambda pair: _distance(written, pair[0]))[1]
        after = clipped(self._move.boxes([written])[0])
        if is_degenerate(after):
            return None
        self._others.append((written, after))
        return after

    def stay_in_place(self) -> bool:
        """Whether each box is in the part of the square where the mirroring alone puts it."""
        flips = (self._move.left_right, self._move.up_down)
        return all(_part(old, *flips) == _part(new) for old, new in self._lesions + self._others)


def _is_rounded(written: Box, box: Box, decimals: int) -> bool:
    """Whether `written` is the box with so many decimals; of a small one, `round_box` sets equal edges a step apart."""
    return _distance(written, box) <= _ROUNDING / 10**decimals or written == round_box(box, decimals)


def _distance(first: Box, second: Box) -> float:
    """The largest of their coordinates' distances."""
    return max(abs(a - b) for a, b in zip(first, second))


def _moved_turns(record: Record, flips: Sequence[str], boxes: _Boxes) -> Optional[Turns]:
    turns = []
    for turn in record["conversations"]:
        parts = []
        for part in _own_parts(record, turn["value"]):
            text = _with_moved_boxes(part, boxes)
            text = None if text is None else mirrored_text(text, flips)
            if text is None:
                return None
            parts.append(text)
        turns.append({**turn, "value": record.get("similar", "").join(parts)})
    return turns


def _part(box: Box, left_right: bool = False, up_down: bool = False) -> tuple[int, int]:
    """Column and row of a box's centre between the borders of thirds and halves; those of the mirrored part where said.

    The part is mirrored and not the box: the words of a box in the very middle are mirrored too.
    """
    x1, y1, x2, y2 = box
    across, down = (bisect(_BORDERS, value / 2) for value in (x1 + x2, y1 + y2))
    last = len(_BORDERS)
    return (last - across if left_right else across), (last - down if up_down else down)


def _with_moved_boxes(text: str, boxes: _Boxes) -> Optional[str]:
    """The text with its boxes moved; None if they are not written as `format_box` does, or one leaves the square."""
    decimals = _decimals_of(text)
    if decimals is None:
        return None
    left = False

    def written(box: Box) -> str:
        nonlocal left
        moved = boxes.moved(box, decimals)
        left = left or moved is None
        return "" if moved is None else format_box(moved, decimals)

    moved_text = rewrite_boxes(text, written)
    return None if left else moved_text


def _decimals_of(text: str) -> Optional[int]:
    """With how many decimals `format_box` writes each box of the text; None if it writes one in another way."""
    usual = (decimals for decimals in _DECIMALS if rewrite_boxes(text, partial(_plainly, decimals)) == text)
    return next(usual, None)


def _plainly(decimals: int, box: Box) -> str:
    return "" if is_degenerate(box) else format_box(box, decimals)
