"""What happens to a record in an epoch: drawn by seed, epoch and the record's id alone.

So a resumed run sees what the stopped one would have seen, whatever the number of ranks and data loader workers.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

from umed_plugin.data.augment_rule import AugmentRule, augment_rule_of
from umed_plugin.data.augmentation.texts import FLIPS, StudyText, can_mirror, moved_record
from umed_plugin.data.records import Record, is_plain_item, record_faults, record_geometry, true_boxes
from umed_plugin.files import text_bytes
from umed_plugin.grounding.answer_types import asks_for_boxes
from umed_plugin.grounding.square_move import SquareMove, kept_fraction

# Why records are not moved.
PLAIN = "plain LLaVA items without true boxes"
INVALID = "no valid records"
REPORTS = "reports"
MOVES_NOTHING = "an `augment` that moves nothing"
# A rotation, zoom or shift that leaves less of a lesion's box in the square is drawn anew, so many times.
LEAST_KEPT = 0.75
TRIES = 10


@dataclass(frozen=True)
class GreyLevels:
    """Changes of grey levels in 0-1; the default changes none.

    Attributes:
        gamma: their exponent.
        brightness: they are multiplied by 1 plus this.
        noise: largest standard deviation of Gaussian noise.
        seed: of the noise, in 0 to 2^32 - 1.
    """

    gamma: float = 1.0
    brightness: float = 0.0
    noise: float = 0.0
    seed: int = 0


UNMOVED, UNCHANGED = SquareMove(), GreyLevels()


@dataclass(frozen=True)
class Study:
    """A record as an epoch shows it.

    Attributes:
        record: with moved boxes and text. The image file that it names is the unchanged one.
        move: of the square that the model sees.
        grey: change of its grey levels.
    """

    record: Record
    move: SquareMove = UNMOVED
    grey: GreyLevels = UNCHANGED

    @property
    def changed(self) -> bool:
        """Whether the epoch shows anything but the record itself."""
        return (self.move, self.grey) != (UNMOVED, UNCHANGED)

    def as_json(self) -> dict[str, Any]:
        """The movement, for the record and a log: what `umed_plugin.grounding.square_move.move_of` reads."""
        return {**dataclasses.asdict(self.move), "shift": list(self.move.shift)}


def augmented_study(record: Record, seed: int, epoch: int, name: str | None = None) -> Study:
    r"""The record as one epoch of a run with ``--umed_augment`` shows it.

    Args:
        record: of `umed_plugin.data.records`. A report, or a plain LLaVA item, changes its grey levels only: nobody knows
            what a movement would cut off.
        seed: of the run.
        epoch: counted from 0.
        name: of the record, where it has no id.

    Raises:
        UmedError: the record's ``augment`` is not a rule.

    Example:
        >>> from umed_plugin.data.augmentation.study import augmented_study
        >>> turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "Left: [0.10, 0.40, 0.30, 0.60]."}]
        >>> record = {"id": "a", "image": "a.png", "image_size": [100, 100], "conversations": turns, "split": "train",
        ...           "objects": {"ref": ["cyst"], "bbox": [[10, 40, 30, 60]]}, "terms": {"cyst": ["cyst"]},
        ...           "answer_type": "grounded", "provenance": {"image_aspect_ratio": "pad"},
        ...           "augment": {"flips": ["left_right"], "rotation": 0, "zoom": [1, 1], "shift": 0, "share": 1}}
        >>> mirrored = next(study for study in (augmented_study(record, 0, epoch) for epoch in range(9)) if study.move.mirrors)
        >>> mirrored.record["conversations"][1]["value"]
        'Right: [0.70, 0.40, 0.90, 0.60].'
    """
    rule = augment_rule_of(record)
    rng = random.Random(text_bytes(f"umed_augment:{seed}:{epoch}:{record.get('id', name)}"))
    if rng.random() >= rule.share:
        return Study(record)
    grey = _draw_grey(rule, rng)
    flips = [flip for flip in FLIPS if rng.random() < 0.5 and flip in rule.flips]
    if why_unmoved(record, rule) is not None:
        return Study(record, grey=grey)
    flips = [flip for flip in flips if can_mirror(record, flip)]
    return dataclasses.replace(moved_study(StudyText(record), rule, rng, flips), grey=grey)


def why_unmoved(record: Record, rule: AugmentRule) -> Optional[str]:
    """Why no epoch moves the record, whatever it draws and whatever its text; None if one may."""
    if is_plain_item(record):
        return PLAIN
    if record_faults(record):
        return INVALID
    if not asks_for_boxes(record):
        return REPORTS
    if not rule.flips and not moves_more_than_mirrors(rule):
        return MOVES_NOTHING
    return None


def moves_more_than_mirrors(rule: AugmentRule) -> bool:
    """Whether the rule turns, zooms or shifts."""
    return (rule.rotation, *rule.zoom, rule.shift) != (0, 1, 1, 0)


def mirrorings(record: Record, rule: AugmentRule) -> list[str]:
    """The mirrorings that the rule allows and the record's text can follow, `FLIPS` or some of them."""
    return [flip for flip in FLIPS if flip in rule.flips and can_mirror(record, flip)]


def moved_study(text: StudyText, rule: AugmentRule, rng: random.Random, flips: Sequence[str]) -> Study:
    """The record after the first movement drawn that keeps its lesions and its text true; else only mirrored, or as it is.

    Args:
        text: of a record of which `why_unmoved` is None.
        flips: mirrorings to take, of `mirrorings`.
    """
    record = text.record
    if text.has_fixed_places:
        return Study(record)
    mirrored = SquareMove("left_right" in flips, "up_down" in flips)
    before = record_geometry(record).to_square(true_boxes(record))
    for _ in range(TRIES):
        move = _draw_move(rule, rng, mirrored)
        if any(kept_fraction(box) < LEAST_KEPT for box in move.boxes(before)):
            continue
        moved = moved_record(text, move)
        if moved is not None:
            return Study(moved, move)
    moved = moved_record(text, mirrored) if mirrored.mirrors else None
    return Study(record) if moved is None else Study(moved, mirrored)


def _draw_move(rule: AugmentRule, rng: random.Random, mirrored: SquareMove) -> SquareMove:
    angle = rng.uniform(-rule.rotation, rule.rotation)
    zoom = math.exp(rng.uniform(math.log(rule.zoom[0]), math.log(rule.zoom[1])))
    # A crop may lie anywhere in the square.
    most = rule.shift + max(zoom - 1, 0) / 2
    shift = (rng.uniform(-most, most), rng.uniform(-most, most))
    return dataclasses.replace(mirrored, angle=angle, zoom=zoom, shift=shift)


def _draw_grey(rule: AugmentRule, rng: random.Random) -> GreyLevels:
    gamma = math.exp(rng.uniform(-rule.contrast, rule.contrast))
    brightness = rng.uniform(-rule.brightness, rule.brightness)
    return GreyLevels(gamma, brightness, rule.noise, rng.getrandbits(32))
