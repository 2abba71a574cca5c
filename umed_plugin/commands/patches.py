"""``umed patches``: every change to another library, and whether it is in force, not needed, or does not fit here."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from umed_plugin.terminal.console import console as make_console

if TYPE_CHECKING:
    from umed_plugin.patching import Patch


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``patches``."""
    parser = subparsers.add_parser(
        "patches",
        help="list the changes to LLaVA and check that they fit the installed libraries",
        description="List every change that umed-run makes to another library, with its reason, its known versions, and whether "
        "it is in force with the installed libraries, not needed, or does not fit. Exit status 1 if one does not fit: training "
        "would refuse to start.",
        epilog="example:\n  umed patches",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; return 1 if a patch does not fit."""
    from rich.table import Table

    from umed_plugin.patches import ALL

    table = Table("patch", "target", "known", "installed", "here", "why", "delete when", show_lines=True)
    idle, misfits = 0, []
    for patch in ALL:
        idle_reason = patch.not_needed()
        message = None if idle_reason else _misfit(patch)
        idle += idle_reason is not None
        misfits += [message] if message else []
        here = "DOES NOT FIT" if message else f"not needed: {idle_reason}" if idle_reason else "in force"
        table.add_row(patch.name, _targets(patch), _known(patch), _installed(patch), here, patch.why, patch.delete_when)
    console = make_console(wide_in_pipes=True)
    console.print(table)
    for message in misfits:
        console.print(message)
    console.print(
        f"{len(ALL)} patches: {len(ALL) - idle - len(misfits)} are in force under umed-run, {idle} are not needed with these "
        f"libraries, {len(misfits)} do not fit." + (" Training would stop before it starts." if misfits else "")
    )
    return 1 if misfits else 0


def _misfit(patch: Patch) -> str | None:
    """Why a patch does not fit; LLaVA is imported only if its files do not show that it does."""
    from umed_plugin.patches import prepare_llava
    from umed_plugin.patching import misfit
    from umed_plugin.patching.sources import surely_fits

    if surely_fits(patch):
        return None
    prepare_llava()
    return misfit(patch)


def _targets(patch: Patch) -> str:
    return "\n".join(target.path for target in patch.targets)


def _known(patch: Patch) -> str:
    """Version ranges, one per library."""
    ranges = {target.library: target.versions for target in patch.targets}
    return "\n".join(f"{library} {versions}" for library, versions in ranges.items())


def _installed(patch: Patch) -> str:
    """Distribution and version, one per library."""
    from umed_plugin.patching import installed

    libraries = dict.fromkeys(target.library for target in patch.targets)
    return "\n".join(" ".join(installed(library)) for library in libraries)
