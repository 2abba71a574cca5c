"""``umed recipe list | show R | check R | build R --out FILE | review FILE``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from umed_plugin.commands.recipe.review import add_review
from umed_plugin.commands.recipe.write import (
    add_writer_flags,
    decisions_of,
    may_be_sent,
    settings_of,
    tell_forecast,
    with_decisions,
    write_diagnoses,
)


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``recipe`` and its actions."""
    parser = subparsers.add_parser(
        "recipe",
        help="list, show, check and build data recipes",
        description="Recipes say where a data set's annotations are, how to read them and under which terms.",
        epilog="example:\n  umed recipe check brain_tumor_coco --data-root data/brain_tumor_coco",
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    _add_list(actions)
    _add_show(actions)
    _add_check(actions)
    _add_build(actions)
    add_review(actions)


def _add_list(actions: argparse._SubParsersAction[Any]) -> None:
    parser = actions.add_parser(
        "list",
        help="the recipes that come with the plugin",
        description="List the shipped recipes.",
        epilog="example:\n  umed recipe list",
    )
    parser.set_defaults(run=_list)


def _add_show(actions: argparse._SubParsersAction[Any]) -> None:
    parser = actions.add_parser(
        "show",
        help="print a recipe's YAML, to read or to start one's own from",
        description="Print a recipe's YAML after checking it.",
        epilog="example:\n  umed recipe show demo_studies > my_data.yaml",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name, or a YAML file")
    parser.set_defaults(run=_show)


def _add_check(actions: argparse._SubParsersAction[Any]) -> None:
    parser = actions.add_parser(
        "check",
        help="whether the files on disk fit a recipe, and what is in them",
        description="Read every annotation and image; count images, lesions and negatives, and name every fault.",
        epilog="example:\n  umed recipe check brain_tumor_coco --data-root data/brain_tumor_coco",
    )
    _add_recipe_and_root(parser)
    _add_against(parser, "named")
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="write check.html there, with a contact sheet of every source"
    )
    parser.set_defaults(run=_check)


def _add_build(actions: argparse._SubParsersAction[Any]) -> None:
    parser = actions.add_parser(
        "build",
        help="write the training JSON (and PNGs of what LLaVA cannot read)",
        description="Write records as LLaVA's JSON. Images that LLaVA cannot read are rendered beside it, in images/; "
        "train with --data_path FILE --image_folder FOLDER_OF_FILE.",
        epilog="example:\n  umed recipe build brain_tumor_coco --data-root data/brain_tumor_coco --split train "
        "--out built/train.json",
    )
    _add_recipe_and_root(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--image-aspect-ratio",
        default="pad",
        choices=("pad", "square"),
        help="as in the training: boxes are written in 0-1 of that square (default: pad)",
    )
    parser.add_argument(
        "--box-decimals", default=2, type=int, choices=(2, 3), help="of coordinates in text (default: 2)"
    )
    parser.add_argument("--split", choices=("train", "val", "test"), help="only this split (default: all)")
    parser.add_argument("--seed", default=0, type=int, help="of the wording (default: 0)")
    parser.add_argument(
        "--on-bad-image",
        default="stop",
        choices=("stop", "skip"),
        help="stop at missing or unreadable images, or skip and report them (default: stop)",
    )
    _add_against(parser, "left out")
    add_writer_flags(parser)
    parser.set_defaults(run=_build)


def _add_recipe_and_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name, or a YAML file")
    parser.add_argument(
        "--data-root", metavar="FOLDER", help="folder of the data set (default: the recipe's data_root)"
    )


def _add_against(parser: argparse.ArgumentParser, what_happens: str) -> None:
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="FOLDER",
        help=f"folder with the images of an evaluation set: pictures that are in it too are {what_happens}; may be repeated",
    )


def _list(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from umed_plugin.data.checking.report import sources_of
    from umed_plugin.data.recipes.recipe import load_recipe, shipped_recipes

    table = Table("recipe", "classes", "terms", "description")
    for name in shipped_recipes():
        recipe = load_recipe(name)
        terms = "; ".join(dict.fromkeys(source.terms.licence for source in sources_of(recipe)))
        table.add_row(name, ", ".join(recipe.names), terms, recipe.description)
    Console().print(table)
    return 0


def _show(args: argparse.Namespace) -> int:
    from umed_plugin.data.recipes.recipe import load_recipe

    print(Path(load_recipe(args.recipe).path).read_text(encoding="utf-8"), end="")
    return 0


def _check(args: argparse.Namespace) -> int:
    from rich.console import Console

    from umed_plugin.data.checking.check import check_recipe
    from umed_plugin.data.checking.report import print_check, write_report
    from umed_plugin.data.recipes.recipe import load_recipe

    check = check_recipe(load_recipe(args.recipe), data_root=args.data_root, against=args.against, progress=True)
    print_check(check, Console())
    if args.report:
        print(f"written: {write_report(check, args.report)}")
    return 0 if check.ok else 1


def _build(args: argparse.Namespace) -> int:
    from collections import Counter

    from umed_plugin.data.build import build_records
    from umed_plugin.data.recipes.recipe import load_recipe
    from umed_plugin.data.records import save_records

    settings = settings_of(args)
    decisions = decisions_of(args)
    records = build_records(
        load_recipe(args.recipe),
        out_dir=args.out.parent,
        image_aspect_ratio=args.image_aspect_ratio,
        box_decimals=args.box_decimals,
        seed=args.seed,
        split=args.split,
        data_root=args.data_root,
        on_bad_image=args.on_bad_image,
        against=args.against,
        progress=True,
    )
    aside: list[dict[str, Any]] = []
    complete = True
    if settings is not None:
        records = may_be_sent(settings, records, args.out.parent)
        if settings.dry_run:
            tell_forecast(settings, records, args.out.parent)
            return 0
        records, aside, complete = write_diagnoses(settings, records, args.out.parent)
    records = with_decisions(records, aside, decisions, args.out)
    save_records(records, args.out)
    counts = Counter(record["answer_type"] for record in records)
    print(f"{args.out}: {len(records)} records, {counts['grounded']} with lesions, {counts['negative']} without")
    print(
        f"Train with: --data_path {args.out} --image_folder {args.out.parent} "
        f"--image_aspect_ratio {args.image_aspect_ratio}"
    )
    return 0 if complete else 1
