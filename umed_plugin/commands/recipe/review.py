"""``umed recipe review FILE``: a page on which a person accepts, edits and rejects diagnoses."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError, UsageError, note


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
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    parser.add_argument("--out", type=Path, metavar="HTML", help="the page (default: FILE with .review.html)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the review pages."""
    from umed_plugin.data.records import load_records
    from umed_plugin.data.writing.review import choose, write_pages

    if args.sample is not None and args.sample < 0:
        raise UsageError(f"--sample {args.sample}: must be 0 or more.")
    records = load_records(args.file)
    set_aside = args.file.with_name(f"{args.file.stem}.aside.json")
    if set_aside.is_file():
        records += load_records(set_aside)
    if not records:
        raise UmedError(f"{args.file}: has no records, and there is no {set_aside.name}. There is nothing to review.")
    chosen = choose(records, args.sample, args.seed)
    file = args.out or args.file.with_name(f"{args.file.stem}.review.html")
    pages = write_pages(chosen, args.image_folder or args.file.parent, file)
    links = "".join(f"\n  {page.resolve().as_uri()}" for page in pages)
    note(f"{len(chosen)} of {len(records)} records on {len(pages)} pages. The pages hold images of patients.{links}")
    note("then run: umed recipe build ... --decisions DOWNLOADED_FILES")
    return 0
