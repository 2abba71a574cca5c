"""``umed recipe list | show R | check R | build R --out FILE | review FILE | agreement FILE FILE``.

``list`` and ``show`` are here; the other actions have a module each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from umed_plugin.commands.recipe import agreement, build, check, review
from umed_plugin.terminal.console import console


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``recipe`` and its actions."""
    parser = subparsers.add_parser(
        "recipe",
        help="list, show, check and build data recipes",
        description="A recipe says where a data set's annotations are, how to read them, and under which terms they may be used.",
        epilog="example:\n  umed recipe check brain_tumor_coco --data-root data/brain_tumor_coco",
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    _add_list(actions)
    _add_show(actions)
    check.add_parser(actions)
    build.add_parser(actions)
    review.add_parser(actions)
    agreement.add_parser(actions)


def _add_list(actions: argparse._SubParsersAction[Any]) -> None:
    parser = actions.add_parser(
        "list",
        help="list the shipped recipes",
        description="List the recipes that come with the plugin.",
        epilog="example:\n  umed recipe list",
    )
    parser.set_defaults(run=run_list)


def _add_show(actions: argparse._SubParsersAction[Any]) -> None:
    parser = actions.add_parser(
        "show",
        help="print a recipe's YAML, for example to start your own",
        description="Check a recipe and print its YAML.",
        epilog="example:\n  umed recipe show demo_studies > my_data.yaml",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a YAML file")
    parser.set_defaults(run=run_show)


def run_list(args: argparse.Namespace) -> int:
    """Print a table of the shipped recipes."""
    from rich.table import Table

    from umed_plugin.data.recipes.recipe import load_recipe, shipped_recipes, sources_of

    table = Table("recipe", "classes", "terms", "description")
    for name in shipped_recipes():
        recipe = load_recipe(name)
        terms = "; ".join(dict.fromkeys(source.terms.licence for source in sources_of(recipe)))
        table.add_row(name, ", ".join(recipe.names), terms, recipe.description)
    console(wide_in_pipes=True).print(table)
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print a recipe's YAML as it is in the file."""
    from umed_plugin.data.recipes.recipe import load_recipe

    print(Path(load_recipe(args.recipe).path).read_text(encoding="utf-8"), end="")
    return 0
