"""``umed recipe check R``: whether the files on disk match a recipe, and what they hold."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from umed_plugin.commands.outputs import check_folder
from umed_plugin.commands.recipe.arguments import add_against, add_recipe_and_root
from umed_plugin.errors import UmedError, UsageError, note
from umed_plugin.terminal.console import console as make_console
from umed_plugin.terminal.progress import add_quiet_flag


def add_parser(actions: argparse._SubParsersAction[Any]) -> None:
    """Add ``check`` to the actions of ``umed recipe``."""
    parser = actions.add_parser(
        "check",
        help="check that the files on disk match a recipe, and count what they hold",
        description="Read every annotation and image, count images, lesions and negatives, and report every fault.",
        epilog="example:\n  umed recipe check brain_tumor_coco --data-root data/brain_tumor_coco",
    )
    add_recipe_and_root(parser)
    add_against(parser, "reported")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FOLDER",
        help="write check.html there: images with their boxes, filters, histograms, and augmented studies",
    )
    add_quiet_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check a recipe; exit status 1 if there are faults."""
    from umed_plugin.commands.recipe.check_page import write_report
    from umed_plugin.data.checking.check import check_recipe
    from umed_plugin.data.checking.gallery import MOST
    from umed_plugin.data.checking.report import print_check
    from umed_plugin.data.recipes.recipe import load_recipe

    check_folder("--report", args.report)
    try:
        recipe = load_recipe(args.recipe)
    except UsageError:
        raise
    except UmedError as error:
        raise UmedError(
            f"{error}\nThe data was not looked at: its faults are found once the recipe has none."
        ) from error
    check = check_recipe(
        recipe,
        data_root=args.data_root,
        against=args.against,
        progress=True,
        augmented=args.report is not None,
        most_shown=MOST if args.report else 0,
    )
    print_check(check, make_console(wide_in_pipes=True))
    if args.report:
        note(f"report written: {write_report(check, args.report)}")
    return 0 if check.ok else 1
