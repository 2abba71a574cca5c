"""The share of one process when several work through the same data, on one machine or on many."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional, TypeVar

from umed_plugin.errors import UsageError

Part = TypeVar("Part")


@dataclass(frozen=True)
class Shard:
    """Share ``index`` of ``count``, counted from 1 as on the command line (``--shard 1/4`` to ``--shard 4/4``).

    Example:
        >>> from umed_plugin.data.shards import Shard
        >>> Shard(2, 3).of("abcdefg")
        ['b', 'e']
    """

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def file_part(self) -> str:
        """The shard in a file's name."""
        return f"shard-{self.index}-of-{self.count}"

    def of(self, parts: Sequence[Part]) -> list[Part]:
        """This share: every ``count``-th part, so that shares are alike where neighbours are."""
        return list(parts[self.index - 1 :: self.count])


def parse_shard(text: str) -> Shard:
    """``--shard I/N``.

    Raises:
        UsageError: it is not two numbers with 1 <= I <= N.
    """
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text!r}: must be I/N with I from 1 to N, such as 1/4, 2/4, 3/4 and 4/4.")
    return Shard(int(match[1]), int(match[2]))


def shard_of_process(environment: Optional[Mapping[str, str]] = None) -> Optional[Shard]:
    """The share of this rank under ``torchrun`` or ``accelerate launch``; None for a single process.

    Args:
        environment: in which launchers set ``RANK`` and ``WORLD_SIZE``; None: that of the process.
    """
    found = os.environ if environment is None else environment
    world = found.get("WORLD_SIZE", "1")
    if "RANK" not in found or not world.isdigit() or int(world) < 2:
        return None
    return Shard(int(found["RANK"]) + 1, int(world))
