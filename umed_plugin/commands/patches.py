"""``umed patches``: every change to another library, and whether it fits what is installed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umed_plugin.patching import Patch


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``patches``."""
    parser = subparsers.add_parser(
        "patches",
        help="list the changes to LLaVA and say whether they fit the installed libraries",
        description="List every change that umed-run makes to another library, with the reason, the versions it knows, and "
        "whether it fits what is installed here. Exit status 1 when one does not fit: training would refuse to start.",
        epilog="example:\n  umed patches",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 when a patch does not fit."""
    from rich.console import Console
    from rich.table import Table

    from umed_plugin.patches import ALL
    from umed_plugin.patching import misfit

    table = Table("patch", "target", "known", "installed", "fits", "why", "delete when", show_lines=True)
    misfits = []
    for patch in ALL:
        message = misfit(patch)
        if message:
            misfits.append(message)
        row = [patch.name, _targets(patch), _known(patch), _installed(patch), "no" if message else "yes"]
        table.add_row(*row, patch.why, patch.delete_when)
    # Piped into a file there is no terminal to fit into, and wrapped names could not be searched for.
    console = Console(width=None if Console().is_terminal else 250)
    console.print(table)
    for message in misfits:
        console.print(message, markup=False, highlight=False)
    fitting = len(ALL) - len(misfits)
    console.print(f"{fitting} of {len(ALL)} patches fit." + (" Training under umed-run would stop." if misfits else ""))
    return 1 if misfits else 0


def _targets(patch: Patch) -> str:
    return "\n".join(target.path for target in patch.targets)


def _known(patch: Patch) -> str:
    """Version ranges, one for each library."""
    ranges = {target.library: target.versions for target in patch.targets}
    return "\n".join(f"{library} {versions}" for library, versions in ranges.items())


def _installed(patch: Patch) -> str:
    """Distribution and version, one for each library."""
    from umed_plugin.patching import installed

    libraries = dict.fromkeys(target.library for target in patch.targets)
    return "\n".join(" ".join(installed(library)) for library in libraries)
