"""``umed patches``: every change to another library, and whether it is in force, not needed, or does not fit here."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from umed_plugin.errors import UmedError
from umed_plugin.terminal.console import console as make_console

if TYPE_CHECKING:
    from umed_plugin.patching import Patch


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``patches``."""
    parser = subparsers.add_parser(
        "patches",
        help="list the changes to LLaVA and check that they fit the installed libraries",
        description="Check every change that umed-run makes to another library: whether it is in force with the installed "
        "libraries, not needed, or does not fit. One line says how many; --verbose lists each with its reason and its known "
        "versions. Exit status 1 if one does not fit: training would refuse to start.",
        epilog="examples:\n  umed patches\n  umed patches --verbose",
    )
    parser.add_argument("--verbose", action="store_true", help="list every patch: target, versions, reason")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what does not fit, and one line on all of them; return 1 if a patch does not fit.

    Raises:
        UmedError: the importable ``llava`` is of another project.
    """
    from umed_plugin.patches import ALL
    from umed_plugin.patching.other_projects import other_project

    if (other := other_project()) is not None:
        raise UmedError(str(other))
    here: dict[str, str] = {}
    misfits = []
    for patch in ALL:
        idle_reason = patch.not_needed()
        message = None if idle_reason else _misfit(patch)
        misfits += [message] if message else []
        here[patch.name] = "DOES NOT FIT" if message else f"not needed: {idle_reason}" if idle_reason else "in force"
    console = make_console(wide_in_pipes=True)
    if args.verbose:
        console.print(_table(ALL, here))
    for message in misfits:
        console.print(message, soft_wrap=True)
    in_force = sum(state == "in force" for state in here.values())
    console.print(
        f"{len(ALL)} patches: {in_force} are in force under umed-run, {len(ALL) - in_force - len(misfits)} are not needed with "
        f"these libraries, {len(misfits)} do not fit."
        + (" Training would stop before it starts." if misfits else "")
        + ("" if args.verbose else " --verbose lists them."),
        soft_wrap=True,
    )
    return 1 if misfits else 0


def _table(patches: Sequence[Patch], here: Mapping[str, str]) -> Any:
    """All patches, each with its targets, versions and reason; folded and not cut on a narrow terminal."""
    from rich.table import Table

    table = Table(show_lines=True)
    for title in ("patch", "target", "known", "installed", "here", "why", "delete when"):
        table.add_column(title, overflow="fold")
    for patch in patches:
        versions = (_targets(patch), _known(patch), _installed(patch))
        table.add_row(patch.name, *versions, here[patch.name], patch.why, patch.delete_when)
    return table


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
