"""Which records are reviewed: all but probes, which are made of the studies that remain after review."""

from __future__ import annotations

import random
from collections.abc import Sequence

from umed_plugin.data.records import Record
from umed_plugin.grounding.answer_types import PROBE


def is_reviewed(record: Record) -> bool:
    """Whether people decide on the record. The text of a probe is an option, and names no box."""
    return bool(record["answer_type"] != PROBE)


def choose(records: Sequence[Record], sample: int | None, seed: int = 0) -> list[Record]:
    """All records set aside, then all others but probes, or a random ``sample`` of them. The same seed gives the same sample."""
    set_aside = [record for record in records if "aside" in record]
    others = [record for record in records if "aside" not in record and is_reviewed(record)]
    if sample is not None and sample < len(others):
        chosen = sorted(random.Random(seed).sample(range(len(others)), sample))
        others = [others[index] for index in chosen]
    return [*set_aside, *others]
