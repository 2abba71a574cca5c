"""``umed demo``: both stages from end to end, on generated studies and a small checkpoint made on the spot."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from umed_plugin.commands.numbers import seed
from umed_plugin.commands.signals import Ended
from umed_plugin.errors import warn
from umed_plugin.terminal.progress import add_quiet_flag


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``demo``."""
    parser = subparsers.add_parser(
        "demo",
        help="run both stages, evaluation and export on generated studies",
        description="Make a small LLaVA-Med-style checkpoint and DICOM, NIfTI and PNG studies, train both stages through "
        "umed-run, evaluate on held-out studies before and after, and export. Takes about 10 minutes on two CPU cores, without "
        "GPU or network. Writes DIR/report.html, DIR/summary.json, DIR/before_after.png and DIR/checkpoint/llava-mistral-umed/.",
        epilog="example:\n  umed demo --out runs/demo --seed 0",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("umed-demo"), help="new folder (default: umed-demo)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of studies, weights and training (default: 0)")
    add_quiet_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    from umed_plugin.commands.demo.pipeline import run_demo
    from umed_plugin.patches import prepare_llava

    prepare_llava()
    try:
        run_demo(args.out, args.seed)
    except (KeyboardInterrupt, Ended):
        warn(f"{args.out}: the demo is not finished. Remove the folder and start it again.")
        raise
    return 0
