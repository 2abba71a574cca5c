"""Assign images to splits: by patient, with augmented copies kept out of val and test.

A patient's split depends only on the seed and the patient's name. Dividing a sorted list would meet the fractions exactly, but a
patient would change splits when more images are downloaded, and an evaluation would test on images of an earlier training run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.annotations.finding import real_path
from umed_plugin.data.recipes.options import SplitRule
from umed_plugin.data.splits import SPLITS
from umed_plugin.files import text_bytes


def deal_out(items: Sequence[Annotated], rule: SplitRule) -> None:
    """Set the split of every image to that of its patient."""
    for item in items:
        item.split = split_of(item.patient, rule)


def split_of(patient: str, rule: SplitRule) -> str:
    """``train``, ``val`` or ``test``: the hash of seed and patient, in 0-1, selects one of the fractions laid end to end."""
    value, end = _hashed(rule.seed, patient), 0.0
    for split in SPLITS:
        end += rule.fractions.get(split, 0.0)
        if value < end:
            return split
    # The fractions sum to 1 up to rounding error.
    return [split for split in SPLITS if rule.fractions.get(split)][-1]


def without_copies_held_out(items: Sequence[Annotated]) -> tuple[list[Annotated], int]:
    """The items without further copies of a picture in val and test, and the number of items removed.

    The first copy by name that is on disk stays, with all of its slices and phrases.
    """
    held_out = [item for item in items if item.copy_of and item.split in ("val", "test")]
    folders: dict[str, str] = {}
    places = {id(item): real_path(str(item.image), folders) for item in held_out}
    first: dict[tuple[str, str], str] = {}
    for item in sorted(held_out, key=lambda item: (not item.is_there, str(item.image))):
        first.setdefault((item.split, item.copy_of), places[id(item)])
    further = {id(item) for item in held_out if places[id(item)] != first[item.split, item.copy_of]}
    return [item for item in items if id(item) not in further], len(further)


def picked_by_hash(items: Sequence[Annotated], count: int, seed: int) -> list[Annotated]:
    """At most ``count`` items: the same for the same seed, and mostly the same when items are added."""

    def rank(item: Annotated) -> tuple[float, str]:
        name = f"{os.path.relpath(item.image, item.root)}#{item.slice}"
        return _hashed(seed, name), name

    return sorted(items, key=rank)[:count]


def _hashed(seed: int, name: str) -> float:
    """A pseudo-random number in [0, 1) that is the same on every machine."""
    return int(hashlib.sha256(text_bytes(f"{seed}:{name}")).hexdigest()[:13], 16) / 16**13
