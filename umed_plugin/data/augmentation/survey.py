"""What ``--umed_augment`` does to the records of a run, tried before training: how many are moved, and why the others are not.

A record is tried by the code that augments it, with random numbers of its own. So what is said is what training will do, and
training draws what it would have drawn.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

from umed_plugin.data.augment_rule import AugmentRule, augment_rule_of
from umed_plugin.data.augmentation.study import (
    INVALID,
    mirrorings,
    moved_study,
    moves_more_than_mirrors,
    why_unmoved,
)
from umed_plugin.data.augmentation.texts import StudyText
from umed_plugin.data.records import Record, record_faults
from umed_plugin.files import text_bytes

MOST = 1000  # records that are tried; of more, so many are drawn
_TRIES = 6
NO_IMAGE = "no image"
NEVER = "`augment: {share: 0}`"
FIXED_PLACES = "boxes or coordinates in another form than [0.61, 0.36, 0.92, 0.83]"
ONLY_MIRRORS = "a side in text or class names that cannot be mirrored, and an `augment` that only mirrors"
NONE_FITS = "no movement tried keeps each lesion in the image, and in the place that words say"


@dataclass
class Survey:
    """What was found.

    Attributes:
        count: number of all records of the run.
        tried: of those that were tried.
        moved: of the tried ones that epochs move, with their boxes; ``mirrored`` of them are mirrored too.
        grey: of those that change in grey levels alone.
        reasons: why the others are not moved -> how many, and an example.
    """

    count: int
    tried: int = 0
    moved: int = 0
    mirrored: int = 0
    grey: int = 0
    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)

    def in_words(self) -> str:
        """What is augmented, as sentences."""
        if self.tried < self.count:
            of = f"{self.moved:,} of {self.tried:,} records, drawn from {self.count:,}, are"
        else:
            of = f"{self.moved:,} of {self.count:,} records are"
        mirrored = f"; {self.mirrored:,} of them are mirrored too" if self.mirrored else ""
        sentences = [
            f"augmentation: {of} moved, anew in each epoch, with their boxes and words of side{mirrored}.",
            "The recipe's `augment` says how, or its defaults, which mirror nothing.",
        ]
        if self.reasons:
            same = self.tried - self.moved - self.grey
            kept = f", and {same:,} not at all" if same else ""
            sentences.append(f"Of the others, {self.grey:,} change in grey levels alone{kept}.")
            listed = sorted(self.reasons.items(), key=lambda reason: -reason[1][0])
            parts = (f"{reason} ({number:,}, such as {example})" for reason, (number, example) in listed)
            sentences.append(f"Not moved: {'; '.join(parts)}.")
        if not self.moved:
            sentences.append("So --umed_augment moves nothing. Mend this in the records, or leave the flag out.")
        return " ".join(sentences)


def survey(records: Sequence[Record], seed: int) -> Survey:
    """Try the records, or `MOST` of them, always the same.

    Args:
        records: of the split train.
        seed: of the run.

    Raises:
        UmedError: the ``augment`` of one is not a rule.
    """
    chosen = range(len(records))
    found = Survey(len(records))
    for index in chosen if len(records) <= MOST else sorted(random.Random(seed).sample(chosen, MOST)):
        record = records[index]
        name = str(record.get("id", f"number {index}"))
        _add(found, record, name, random.Random(text_bytes(f"umed_augment_survey:{seed}:{name}")))
    return found


def _add(found: Survey, record: Record, name: str, rng: random.Random) -> None:
    rule = augment_rule_of(record)
    found.tried += 1
    why = NO_IMAGE if "image" not in record else NEVER if rule.share == 0 else why_unmoved(record, rule)
    if why is None:
        why = _tried(found, record, rule, rng)
    if why is None:
        found.moved += 1
        return
    found.grey += why not in (NO_IMAGE, NEVER) and max(rule.contrast, rule.brightness, rule.noise) > 0
    number, example = found.reasons.get(why, (0, ""))
    found.reasons[why] = (number + 1, example or (f"{name}: {record_faults(record)[0]}" if why == INVALID else name))


def _tried(found: Survey, record: Record, rule: AugmentRule, rng: random.Random) -> Optional[str]:
    """Why the record is not moved by any movement tried; None if one fits."""
    text = StudyText(record)
    if text.has_fixed_places:
        return FIXED_PLACES
    flips = mirrorings(record, rule)
    if not flips and not moves_more_than_mirrors(rule):
        return ONLY_MIRRORS
    for number in range(_TRIES):
        # The text may have no mirrored form all the same: then as an epoch that does not mirror.
        study = moved_study(text, rule, rng, () if number % 2 else flips)
        if study.move.mirrors or study.move.resamples:
            found.mirrored += study.move.mirrors
            return None
    return NONE_FITS
