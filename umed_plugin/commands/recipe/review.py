"""``umed recipe review FILE``: a page on which a person accepts, edits and rejects what was written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_review(actions: argparse._SubParsersAction[Any]) -> None:
    """Add ``review`` to the actions of ``umed recipe``."""
    parser = actions.add_parser(
        "review",
        help="a page to accept, edit and reject built records in a browser",
        description="Write HTML pages with picture, boxes and text of each record; they need no server. What was put aside "
        "beside FILE comes first. Their button downloads the decisions for: umed recipe build ... --decisions FILE",
        epilog="example:\n  umed recipe review built/train.json --sample 300",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="records, as umed recipe build wrote them")
    parser.add_argument("--image-folder", type=Path, metavar="FOLDER", help="of the records (default: FILE's folder)")
    parser.add_argument("--sample", type=int, metavar="N", help="that many records at random beside those put aside")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument("--out", type=Path, metavar="HTML", help="the page (default: FILE with .review.html)")
    parser.set_defaults(run=_review)


def _review(args: argparse.Namespace) -> int:
    from umed_plugin.data.records import load_records
    from umed_plugin.data.writing.review import choose, write_pages
    from umed_plugin.errors import UmedError, UsageError

    if args.sample is not None and args.sample < 0:
        raise UsageError(f"--sample {args.sample}: must be 0 or more.")
    records = load_records(args.file)
    beside = args.file.with_name(f"{args.file.stem}.aside.json")
    if beside.is_file():
        records += load_records(beside)
    if not records:
        raise UmedError(f"{args.file}: holds no records, and there is no {beside.name}; nothing to review.")
    chosen = choose(records, args.sample, args.seed)
    file = args.out or args.file.with_name(f"{args.file.stem}.review.html")
    pages = write_pages(chosen, args.image_folder or args.file.parent, file)
    print(f"{len(chosen)} of {len(records)} records on {len(pages)} pages. They hold images of patients.")
    for page in pages:
        print(f"  {page.resolve().as_uri()}")
    print("Then: umed recipe build ... --decisions FILES_THAT_THE_PAGES_DOWNLOAD")
    return 0
