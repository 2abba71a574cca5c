"""How a source's studies may be augmented: ``augment:`` in a recipe, and in the records that are built with it."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, field_validator

from umed_plugin.errors import UmedError
from umed_plugin.faults import Faults, StrictModel, validated

Flip = Literal["left_right", "up_down"]


class AugmentRule(StrictModel):
    """How ``--umed_augment`` changes the studies of this source in training. Each epoch draws anew."""

    flips: list[Flip] = Field(
        [],
        description="Mirrorings that are allowed, each taken for half of the studies: ``left_right``, ``up_down``. None by "
        "default: mirrored, a chest has its heart on the wrong side. Words of side in the text are turned along.",
    )
    rotation: float = Field(7.0, ge=0, le=45, description="Largest rotation in degrees, both ways.")
    zoom: list[float] = Field(
        [0.9, 1.2],
        description="Smallest and largest zoom. Above 1, a part of the image is cropped out and fills the square. A crop that "
        "loses more than a quarter of a lesion is not taken.",
    )
    shift: float = Field(
        0.05, ge=0, le=0.5, description="Largest shift along each axis, as a share of the square's side."
    )
    contrast: float = Field(
        0.2, ge=0, le=2, description="Grey levels to the power of ``exp(u)``, with ``u`` between minus and plus this."
    )
    brightness: float = Field(
        0.1, ge=0, lt=1, description="Grey levels times ``1 + u``, with ``u`` between minus and plus this."
    )
    noise: float = Field(
        0.02, ge=0, le=1, description="Largest standard deviation of Gaussian noise, with grey levels from 0 to 1."
    )
    share: float = Field(
        0.8,
        ge=0,
        le=1,
        description="Share of the studies that are changed in an epoch. The others are shown as they are.",
    )

    @field_validator("flips")
    @classmethod
    def _named_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("names a mirroring twice")
        return value

    @field_validator("zoom")
    @classmethod
    def _smallest_and_largest(cls, value: list[float]) -> list[float]:
        if len(value) != 2 or not 0.5 <= value[0] <= 1 <= value[1] <= 4:
            raise ValueError("needed: two numbers, the smallest (0.5 to 1) and the largest (1 to 4)")
        return value


def augment_rule_of(record: dict[str, Any]) -> AugmentRule:
    """The rule of a record: its recipe's, or the default one, which mirrors nothing.

    Raises:
        UmedError: the record's ``augment`` is not a rule.
    """
    found = record.get("augment")
    return AugmentRule() if found is None else _parsed(json.dumps(found, sort_keys=True), str(record.get("id")))


def augment_faults(found: Any) -> list[str]:
    """What is wrong with the ``augment`` of a record, one sentence each."""
    faults = Faults()
    if isinstance(found, dict):
        validated(AugmentRule, found, "augment.", faults)
    else:
        faults.add("augment", f"is {type(found).__name__}; needed: an object")
    return faults.messages


@lru_cache(maxsize=256)
def _parsed(text: str, name: str) -> AugmentRule:
    found, faults = json.loads(text), Faults()
    rule = validated(AugmentRule, found, "augment.", faults) if isinstance(found, dict) else None
    if rule is None:
        raise UmedError(f"record {name}: {'; '.join(augment_faults(found))}. Build it again with: umed recipe build")
    return rule
