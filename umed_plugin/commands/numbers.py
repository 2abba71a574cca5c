"""Numbers on the command line."""

from __future__ import annotations

from collections.abc import Callable

from umed_plugin.errors import UsageError


def at_least_one(flag: str) -> Callable[[str], int]:
    """What argparse calls for a flag that takes a whole number from 1; it raises a `UsageError` for anything else."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or int(text) < 1:
            raise UsageError(f"{flag} {text!r}: must be a whole number of at least 1.")
        return int(text)

    return read
