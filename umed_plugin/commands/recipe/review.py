"""``umed recipe review FILE``: a page on which a person accepts, edits and rejects diagnoses, and moves boxes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umed_plugin.commands.numbers import seed
from umed_plugin.commands.outputs import check_file
from umed_plugin.errors import UmedError, UsageError, note

if TYPE_CHECKING:
    from umed_plugin.data.records import Record
    from umed_plugin.data.writing.decisions import Decision


def add_parser(actions: argparse._SubParsersAction[Any]) -> None:
    """Add ``review`` to the actions of ``umed recipe``."""
    parser = actions.add_parser(
        "review",
        help="write a page to accept, edit and reject built records in a browser",
        description="Write HTML pages with the image, boxes and text of each record; they need no server. Records that were set "
        "aside come first. A button on each page downloads the decisions for: umed recipe build ... --decisions FILE",
        epilog="example:\n  umed recipe review built/train.json --sample 300",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="records that umed recipe build wrote")
    parser.add_argument(
        "--image-folder", type=Path, metavar="FOLDER", help="folder of the images (default: FILE's folder)"
    )
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="number of random records to review besides those set aside (default: all)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the sample (default: 0)")
    parser.add_argument(
        "--disagreements",
        nargs="+",
        type=Path,
        default=[],
        metavar="DECISIONS",
        help="only the records on which these reviewers disagree, with their decisions; what is decided there counts instead",
    )
    parser.add_argument("--out", type=Path, metavar="HTML", help="the page (default: FILE with .review.html)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the review pages."""
    from umed_plugin.commands.recipe.review_page import write_pages
    from umed_plugin.data.records import load_records
    from umed_plugin.data.writing.review import choose

    if args.sample is not None and args.sample < 0:
        raise UsageError(f"--sample {args.sample}: must be 0 or more.")
    if args.sample is not None and args.disagreements:
        raise UsageError("--sample: no effect with --disagreements, which chooses the records.")
    check_file("--out", args.out, "review.html")
    records = load_records(args.file)
    set_aside = args.file.with_name(f"{args.file.stem}.aside.json")
    if set_aside.is_file():
        records += load_records(set_aside)
    if not records:
        raise UmedError(f"{args.file}: has no records, and there is no {set_aside.name}. There is nothing to review.")
    others = _disagreements(args.disagreements, records) if args.disagreements else None
    chosen = (
        choose(records, args.sample, args.seed) if others is None else [one for one in records if one["id"] in others]
    )
    name = "disagreements" if args.disagreements else "review"
    file = args.out or args.file.with_name(f"{args.file.stem}.{name}.html")
    pages = write_pages(chosen, args.image_folder or args.file.parent, file, others)
    links = "".join(f"\n  {page.resolve().as_uri()}" for page in pages)
    where = f"{len(pages)} pages" if len(pages) > 1 else "one page"
    note(f"{len(chosen)} of {len(records)} records on {where}, with images of patients.{links}")
    note("then run: umed recipe build ... --decisions DOWNLOADED_FILES")
    return 0


def _disagreements(files: list[Path], records: list[Record]) -> dict[str, list[Decision]]:
    """Record -> the decisions about its text, where reviewers differ.

    Raises:
        UmedError: they agree on all texts of these records.
    """
    from umed_plugin.data.writing.agreement import measure
    from umed_plugin.data.writing.decisions import answer_of, read_decisions, text_digest
    from umed_plugin.data.writing.review import is_reviewed

    shown = {record["id"]: text_digest(answer_of(record)) for record in records if is_reviewed(record)}
    found = measure(read_decisions(files)).disagreements
    differing = {made[0].record: made for made in found if shown.get(made[0].record) == made[0].shown}
    if not differing:
        past = f" {len(found)} disagreements are about other texts than those of the records." if found else ""
        raise UmedError(f"--disagreements: the reviewers agree on all these records.{past} There is nothing to settle.")
    return differing
