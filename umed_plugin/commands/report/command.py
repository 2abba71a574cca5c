"""``umed report``: one HTML file of a run, and a picture of studies before and after."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from umed_plugin.commands.numbers import at_least_one
from umed_plugin.commands.outputs import check_file
from umed_plugin.errors import UsageError, say
from umed_plugin.terminal.progress import Steps, add_quiet_flag


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``report``."""
    parser = subparsers.add_parser(
        "report",
        help="one HTML file of a run: curves, before and after, studies with boxes and attention",
        description="Write RUN_DIR/report.html: training curves, metrics before and after with confidence intervals, the "
        "held-out studies with true and predicted boxes, attention and answers, and the sampled answers of stage 2 with their "
        "rewards. The file opens without a server and loads nothing. RUN_DIR is a folder of `umed demo` or `umed upgrade`, or "
        "the output folder of a training; the run may be unfinished.",
        epilog="examples:\n  umed report runs/demo\n  umed report runs/demo --picture before_after.png\n"
        "  umed report runs/seed0 runs/seed1 runs/seed2 --index seeds.html",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, nargs="+", help="folder of the run; several get an index page as well"
    )
    parser.add_argument(
        "--index",
        metavar="FILE",
        type=Path,
        help="index page of several runs (default: reports.html above their folders)",
    )
    parser.add_argument(
        "--studies",
        metavar="N",
        type=at_least_one("--studies"),
        default=500,
        help="maximum number of studies in the gallery (default: 500)",
    )
    parser.add_argument(
        "--picture", metavar="FILE", type=Path, help="also draw six studies before and after into this PNG file"
    )
    add_quiet_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the files and say where they are."""
    from umed_plugin.commands.report.before_after import write_before_after
    from umed_plugin.commands.report.page import write_report
    from umed_plugin.commands.report.runs_page import FILE, write_runs_page

    if args.picture and len(args.run_dir) > 1:
        raise UsageError("--picture is of one run. Give one RUN_DIR with it.")
    check_file("--index", args.index, FILE)
    check_file("--picture", args.picture, "before_after.png")
    with Steps(transient=True) as steps:
        shown: list[str] = []

        def advance(what: str, done: int, total: int) -> None:
            if shown[-1:] != [what]:
                steps.begin(what)
                shown.append(what)
            steps.update(done, total)

        written = [write_report(folder, args.studies, advance) for folder in args.run_dir]
        steps.end()
    if len(args.run_dir) > 1 or args.index:
        above = os.path.commonpath([folder.resolve().parent for folder in args.run_dir])
        written.append(write_runs_page(args.run_dir, (args.index or Path(above) / FILE).resolve()))
    if args.picture:
        written.append(write_before_after(args.run_dir[0], args.picture))
    for file in written:
        say(f"written: {file}")
    return 0
