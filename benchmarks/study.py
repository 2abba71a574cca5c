"""A study: arms that train from common starts, for equal processor time, compared pair by pair on held-out studies.

    python benchmarks/study.py benchmarks/studies/few_labels.yaml runs/few_labels --rows docs/results/study

The YAML says which arms there are, for which numbers of labelled studies and which seeds (`study_plan.py`). A finished cell, one
training and its evaluation, is a small JSON under ``OUT/rows``. It is never made again, so a killed study goes on with the same
command. With ``--rows FOLDER`` the rows in that folder count too, and new ones go there: commit it, and the study goes on in
another checkout. There a start checkpoint is trained again only if an unfinished arm needs it. A row of another study in FOLDER
counts too, where all its settings are equal. What their recipes say is among them (`study_recipes.py`).

**Equal time is processor time**, user and system, of the training's process and all that it waited for, start included. Wall time
would count what else the machine does. An arm with ``steps: equal`` takes as many steps of stage 1 as fit into the time that the
arm ``budget`` has taken for the same seed and studies. How long a plain step takes is measured right after that arm, since other
work on the machine lengthens processor time too. The table shows what each arm has really taken.

Writes ``table.md`` and ``figure.png`` to OUT. ``--only`` an arm, ``--seeds``, ``--sizes`` and ``--variants`` choose cells;
``--table`` trains nothing.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

from study_plan import Cell, Study, cells, load_study
from study_rows import Rows
from study_table import draw, markdown
from study_training import Workshop, held

from umed_plugin.errors import UmedError, UsageError, say, unknown_name


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--rows", type=Path, help="folder with finished rows, which new ones are added to")
    parser.add_argument("--seeds", help="comma list (default: the study's)")
    parser.add_argument("--sizes", help="comma list of numbers of labelled studies (default: the study's)")
    parser.add_argument("--variants", help="comma list (default: all)")
    parser.add_argument("--only", action="append", metavar="ARM", help="this arm; repeatable (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, each a process of one thread")
    parser.add_argument("--table", action="store_true", help="print what the rows say, and train nothing")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except UmedError as error:
        say(f"error: {error}", stderr=True)
        sys.exit(1)


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    study, out = load_study(options.study), options.out.resolve()
    rows = Rows(study, (options.rows or out / "rows").resolve())
    wanted = chosen_cells(study, options)
    for cell in wanted:
        if rows.outdated(cell):
            say(f"{cell.name}: its row was made under other settings, and is made anew.")
    if not options.table:
        with held(out):
            make(Workshop(out, study, rows), [cell for cell in wanted if not rows.has(cell)], options.jobs)
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(study, rows, _numbers(options.seeds) or study.seeds)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    draw(study, rows, _numbers(options.seeds) or study.seeds, out / "figure.png")


def chosen_cells(study: Study, options: Any) -> list[Cell]:
    """The cells that the command line asks for, in the order of work.

    Raises:
        UsageError: it names an arm, a variant or a size that the study does not have, or an arm that no chosen variant has.
    """
    arms = options.only or list(study.arms)
    variants = options.variants.split(",") if options.variants else list(study.variants)
    for kind, names, known in (("arm", arms, study.arms), ("variant", variants, study.variants)):
        for name in names:
            if name not in known:
                raise UsageError(unknown_name(kind, name, known))
    seeds, sizes = _numbers(options.seeds) or study.seeds, _numbers(options.sizes) or study.sizes
    if unknown := set(sizes) - set(study.sizes):
        listed = ", ".join(map(str, study.sizes))
        raise UsageError(f"--sizes {min(unknown)}: {study.name} has {listed}. Its table would not show another size.")
    chosen = [cell for cell in cells(study, seeds, sizes) if cell.arm in arms and cell.variant in variants]
    for arm in options.only or ():
        if not any(cell.arm == arm for cell in chosen):
            raise UsageError(_without_arm(study, arm, variants))
    return chosen


def _without_arm(study: Study, arm: str, variants: Sequence[str]) -> str:
    """Why an arm has no cell in these variants."""
    arms = {name: about.arms or list(study.arms) for name, about in study.variants.items()}
    theirs = "; ".join(f"{name} has {', '.join(map(repr, arms[name]))}" for name in variants)
    others = ", ".join(name for name in arms if arm in arms[name]) or "none"
    return f"--only {arm!r}: no variant that is asked for has this arm. {theirs}. Variants that have it: {others}."


def _numbers(written: Optional[str]) -> list[int]:
    try:
        return [int(number) for number in written.split(",")] if written else []
    except ValueError as error:
        raise UsageError(f"{written!r}: needed are whole numbers with commas between them, such as 3,4.") from error


def make(workshop: Workshop, wanted: Sequence[Cell], jobs: int) -> None:
    """Finish the cells, ``jobs`` at a time, in their order. The first one that fails ends the study after those in work."""
    failed = threading.Event()

    def finish(numbered: tuple[int, Cell]) -> None:
        number, cell = numbered
        if failed.is_set():
            return
        say(f"{number} of {len(wanted)}: {cell.name}")
        try:
            workshop.finish(cell)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in [pool.submit(finish, numbered) for numbered in enumerate(wanted, 1)]:
                future.result()
        except BaseException:
            failed.set()
            raise


if __name__ == "__main__":
    main()
