"""The diagnosis writer as a process of its own, on records that a recipe has built."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.judge_server import SAYS_DROPPED, JudgeServer
from support.umed_runs import environment
from support.writer_server import KEY
from umed_plugin import cli


def command(folder: Path, server: JudgeServer, *more: str) -> list[str]:
    """The words behind ``umed`` that build the recipe of a folder with the writer."""
    flags = ["--writer", "openai", "--model", "the-model", "--base-url", server.url, *more]
    return ["recipe", "build", str(folder / "recipe.yaml"), "--out", str(folder / "out" / "train.json"), *flags]


# All of `umed recipe build` but the reading of images, for which MONAI and torch would be imported anew after every kill.
WRITING = """
import sys
from umed_plugin.cli import build_parser
from umed_plugin.commands.recipe.build import with_decisions
from umed_plugin.commands.recipe.write import write_diagnoses
from umed_plugin.commands.recipe.writer_flags import read_writer_flags
from umed_plugin.data.records import load_records, save_records

args = build_parser().parse_args(sys.argv[1:])
folder = args.out.parent
records, aside, complete = write_diagnoses(read_writer_flags(args), load_records(folder / "built.json"), folder)
save_records(with_decisions(records, aside, [], args.out), args.out)
sys.exit(not complete)
"""


def start(folder: Path, server: JudgeServer, *more: str) -> subprocess.Popen:
    """The writer as a process of its own, on the records in ``out/built.json``."""
    return subprocess.Popen(
        [sys.executable, "-c", SAYS_DROPPED + WRITING, *command(folder, server, *more)],
        env={**environment(), "OPENAI_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build_templates(folder: Path) -> None:
    """Build the recipe with template answers, into ``out/built.json``."""
    out = str(folder / "out" / "built.json")
    assert cli.main(["recipe", "build", str(folder / "recipe.yaml"), "--out", out]) == 0


def ledger_lines(folder: Path) -> list[dict]:
    """Whole lines; a kill may have left a torn one."""
    lines = []
    for line in (folder / "out" / "train.ledger.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
