"""``umed recipe agreement FILE FILE ...``: how far reviewers agree, and where they do not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umed_plugin.terminal.console import console
from umed_plugin.terminal.text import one_line

if TYPE_CHECKING:
    from umed_plugin.data.writing.agreement import Agreement
    from umed_plugin.data.writing.decisions import Decision


def add_parser(actions: argparse._SubParsersAction[Any]) -> None:
    """Add ``agreement`` to the actions of ``umed recipe``."""
    parser = actions.add_parser(
        "agreement",
        help="say how far reviewers agree (kappa), and list the records on which they do not",
        description="Compare the decisions of two or more reviewers about the same texts: Cohen's kappa of each pair, Fleiss' "
        "kappa of all, and each record on which they disagree.",
        epilog="example:\n  umed recipe agreement train.review.A.decisions.json train.review.B.decisions.json",
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="decisions, as downloaded from the pages of umed recipe review",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print reviewers, kappas and disagreements."""
    from umed_plugin.data.writing.agreement import measure
    from umed_plugin.data.writing.decisions import read_decisions

    print_agreement(measure(read_decisions(args.files)))
    return 0


def print_agreement(found: Agreement) -> None:
    """Print a table of the reviewers, one of the pairs, and a line for each disagreement."""
    from rich.table import Table

    from umed_plugin.data.writing.agreement import FEW, KINDS

    terminal = console(wide_in_pipes=True)
    reviewers = Table("reviewer", "decisions", *KINDS)
    for name, counts in found.counts.items():
        reviewers.add_row(one_line(name), str(sum(counts.values())), *(str(counts[kind]) for kind in KINDS))
    pairs = Table("reviewers", "texts of both", "same decision", "Cohen's kappa")
    for pair in found.pairs:
        same = f"{pair.same} ({pair.same / pair.texts:.0%})" if pair.texts else "-"
        names = f"{one_line(pair.first)}, {one_line(pair.second)}"
        pairs.add_row(names, str(pair.texts), same, kappa_in_words(pair.kappa, pair.texts))
    terminal.print(reviewers)
    terminal.print(pairs)
    if len(found.counts) > 2:
        print(f"Fleiss' kappa of all {len(found.counts)} reviewers: {kappa_in_words(found.fleiss, found.texts)}")
    if min(pair.texts for pair in found.pairs) < FEW:
        print(f"Fewer than {FEW} texts in common: too few to tell a kappa from another.")
    print(f"disagreements: {len(found.disagreements)}")
    for made in found.disagreements:
        print(f"  {one_line(made[0].record)}: {'; '.join(_in_words(decision) for decision in made)}")
    if found.disagreements:
        print("settle them with: umed recipe review RECORDS --disagreements FILE FILE ...")


def kappa_in_words(kappa: float | None, texts: int) -> str:
    """Kappa with two decimals and the number of texts, or why there is none."""
    if not texts:
        return "no texts in common"
    if kappa is None:
        return f"undefined: all {texts} decisions are of one kind"
    return f"{kappa:.2f} (n = {texts})"


def _in_words(decision: Decision) -> str:
    from umed_plugin.data.writing.agreement import reviewer_of

    said = f" ({one_line(decision.note)})" if decision.note.strip() else ""
    moved = ", boxes moved" if decision.boxes else ""
    return f"{one_line(reviewer_of(decision))} {decision.kind}{moved}{said}"
