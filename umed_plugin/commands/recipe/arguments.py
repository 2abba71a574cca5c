"""Arguments that several actions of ``umed recipe`` share."""

from __future__ import annotations

import argparse


def add_recipe_and_root(parser: argparse.ArgumentParser) -> None:
    """Add the recipe and ``--data-root``."""
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a YAML file")
    parser.add_argument(
        "--data-root", metavar="FOLDER", help="folder of the data set (default: the recipe's data_root)"
    )


def add_against(parser: argparse.ArgumentParser, what_happens: str) -> None:
    """Add ``--against``; ``what_happens`` to images that are in both sets."""
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="FOLDER",
        help=f"folder with the images of an evaluation set; images that are also in it are {what_happens}; may be repeated",
    )
