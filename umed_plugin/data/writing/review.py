"""Which records are reviewed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from umed_plugin.data.records import Record


def choose(records: Sequence[Record], sample: int | None, seed: int = 0) -> list[Record]:
    """All records set aside, then all others or a random ``sample`` of them. The same seed gives the same sample."""
    set_aside = [record for record in records if "aside" in record]
    others = [record for record in records if "aside" not in record]
    if sample is not None and sample < len(others):
        chosen = sorted(random.Random(seed).sample(range(len(others)), sample))
        others = [others[index] for index in chosen]
    return [*set_aside, *others]
