"""Numbers on the command line."""

from __future__ import annotations

from collections.abc import Callable

from umed_plugin.errors import UsageError

MOST_SEED = 2**31 - 1  # NumPy takes 32 bits, and each process adds its rank


def at_least_one(flag: str) -> Callable[[str], int]:
    """What argparse calls for a flag that takes a whole number from 1; it raises a `UsageError` for anything else."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or int(text) < 1:
            raise UsageError(f"{flag} {text!r}: must be a whole number of at least 1.")
        return int(text)

    return read


def seed(text: str) -> int:
    """What argparse calls for ``--seed``; it raises a `UsageError` for what no random number generator takes."""
    if not (text.isascii() and text.isdigit()) or int(text) > MOST_SEED:
        raise UsageError(f"--seed {text!r}: must be a whole number from 0 to {MOST_SEED}.")
    return int(text)
