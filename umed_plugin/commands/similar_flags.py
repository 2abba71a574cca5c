"""``--similar K`` and ``--similar-from`` of the commands that ask a checkpoint: see `umed_plugin.data.similar`."""

from __future__ import annotations

import argparse

from umed_plugin.errors import UsageError


def add_similar_flags(parser: argparse.ArgumentParser, without: str) -> None:
    """``--similar`` and ``--similar-from``; ``without`` says what happens if the latter is left out."""
    parser.add_argument(
        "--similar",
        "--umed_similar",
        metavar="K",
        type=int,
        default=0,
        help="put the diagnoses of the K most similar training studies before the question, as training with --umed_similar does "
        "(default: 0)",
    )
    parser.add_argument(
        "--similar-from", metavar="RECIPE", help=f"recipe, YAML or JSON of records with these studies ({without})"
    )


def check_similar_flags(args: argparse.Namespace) -> None:
    """Refuse a negative number, and a flag without effect."""
    if args.similar < 0:
        raise UsageError(f"--similar is {args.similar}; needed: 0 or more.")
    if args.similar_from is not None and not args.similar:
        raise UsageError("--similar-from has no effect without --similar K.")
