"""The weights of rewards: fixed, or along a line over the run. For ``--umed_reward_weights``, and for `CombinedReward` in TRL.

Imports the standard library alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

FORMS = "numbers such as 1,0.5,1, or 0..1 (from 0 at the start of the run to 1 at its end), or 0..1@0.5 (to 1 at half of it)"
_RANGE = re.compile(r"(?P<first>[^.@]*(?:\.\d+)?)\.\.(?P<last>[^@]+?)(?:@(?P<share>.+))?")


@dataclass(frozen=True)
class Weight:
    """The weight of a reward over a run.

    Attributes:
        first: at the first step, or rollout where one feeds several steps, 0 or more.
        last: from the share on, 0 or more.
        share: of the run, in 0-1, at which the weight has reached ``last``.
    """

    first: float
    last: float
    share: float = 1.0

    @classmethod
    def read(cls, text: str) -> Weight:
        """Read ``2``, ``0..1`` or ``0..1@0.5``.

        Raises:
            ValueError: it is none of these.

        Example:
            >>> Weight.read("0..1@0.5").at(0.25), Weight.read("2").at(0.25)
            (0.5, 2.0)
        """
        found = _RANGE.fullmatch(text.strip())
        if found is None:
            return cls(float(text), float(text))
        return cls(float(found["first"]), float(found["last"]), float(found["share"] or 1))

    def at(self, progress: float) -> float:
        """The weight when this share of the run is done, 0-1."""
        return self.first + (self.last - self.first) * min(progress / self.share, 1.0) if self.changes else self.first

    @property
    def changes(self) -> bool:
        """Whether it is not the same over the whole run."""
        return self.first != self.last


def faults(weights: Sequence[Weight], given: str) -> list[str]:
    """What is wrong with the weights of a run, one sentence each; ``given`` names the flag or argument, with its value."""
    values = [value for weight in weights for value in (weight.first, weight.last)]
    shares = [weight.share for weight in weights]
    if any(not math.isfinite(value) or value < 0 for value in values):
        return [f"{given}: all must be 0 or more, and at least one of them above 0."]
    if any(not 0 < share <= 1 for share in shares):
        return [f"{given}: what follows @ is a share of the run, above 0 and at most 1."]
    for progress in sorted({0.0, *shares, 1.0}):
        if not any(weight.at(progress) for weight in weights):
            when = "" if not any(weight.changes for weight in weights) else f" At {progress:.0%} of the run all are 0."
            return [f"{given}: all must be 0 or more, and at least one of them above 0.{when}"]
    return []
