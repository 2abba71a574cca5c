"""An index page over several runs: a table of what was run and what came out, and their curves over one another.

How to run: ``umed report RUN1 RUN2 ...``. Like a report, the file opens without a server and loads nothing.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from umed_plugin import files
from umed_plugin.commands.page_parts import DOCUMENT_STYLES, render_page
from umed_plugin.commands.report.about import about_run
from umed_plugin.commands.report.curves import points_of
from umed_plugin.commands.report.run_folder import Run, Training, read_run, stage_label
from umed_plugin.commands.report.table import cell_of, difference_of, title_of
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.evaluation.benchmarks.recipe_scoring import HEADLINE
from umed_plugin.evaluation.results import compare
from umed_plugin.files.locks import locked

FILE = "reports.html"
_SHOWN = {"started from": "checkpoint", "recipe": "recipe", "seed": "seed"}
_METRICS = ("reward/", "val/", "loss", "kl")  # beginnings of the metrics that are overlaid
# Drawn in these colours, then replaced by the page's own; a dash pattern of its own tells each run apart without colours.
_INK = "#010203"
_COLOURS = tuple(f"#01020{place}" for place in range(4, 10))
_DASHES: tuple[Any, ...] = ("-", (0, (7, 2)), (0, (2, 2)), (0, (7, 2, 2, 2)), (0, (12, 3)), (0, (1, 3)))


def write_runs_page(run_dirs: Sequence[Path], file: Path) -> Path:
    """Write the page of several runs, each of which has its own report beside it.

    Raises:
        UsageError: more runs than can be told apart, or one is given twice.
        UmedError: a folder holds nothing to report.
    """
    runs = [read_run(folder) for folder in run_dirs]
    if len({run.folder for run in runs}) < len(runs):
        raise UsageError("a run is given twice. Give each folder once.")
    shelf = Path(__file__).parent
    names = names_of(runs)
    page = render_page(
        shelf / "runs.html",
        styles=[*DOCUMENT_STYLES, shelf / "report.css"],
        heads=[*_SHOWN.values(), "stage", *(title_of(name)[0] for name in HEADLINE), "last difference of mean IoU"],
        rows=[_row(run, name, place, file) for place, (run, name) in enumerate(zip(runs, names))],
        charts=_charts(runs),
        more=max(0, len(runs) - len(_COLOURS)),
    )
    with locked(file, busy="another index of reports is being written", flag="--index"):
        files.write_text(file, page)
    return file


def names_of(runs: Sequence[Run]) -> list[str]:
    """Names that differ: the folders' own, or as much of their paths as it takes."""
    for parts in range(1, 12):
        names = ["/".join(run.folder.parts[-parts:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


def _row(run: Run, name: str, place: int, file: Path) -> dict[str, Any]:
    facts = dict(about_run(run))
    link = quote(os.path.relpath(run.folder / "report.html", file.parent))
    stage, last = next(reversed(run.evaluations.items()), ("", None))
    metrics = {} if last is None else last.metrics
    cells = [cell_of(metrics.get(metric, {})) for metric in HEADLINE]
    cells.append(_difference(run))
    about = [facts.get(key, "–") for key in _SHOWN]
    return {
        "name": name,
        "link": link,
        "place": place,
        "about": [*about, stage_label(stage) if stage else "–"],
        "cells": cells,
    }


def _difference(run: Run) -> dict[str, str]:
    """Mean IoU of the last stage minus that of the one before."""
    pair = list(run.evaluations.values())[-2:]
    try:
        return difference_of(compare(*pair).get("mean_iou", {}) if len(pair) == 2 else {})
    except UmedError:
        return cell_of({})


def _charts(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A chart for each metric that the last trainings of at least two runs have logged."""
    # By the run's place, which its row in the table has too.
    of_runs = [[one for one in run.trainings if not one.trial] for run in runs[: len(_COLOURS)]]
    trainings = {place: those[-1] for place, those in enumerate(of_runs) if those}
    logged: dict[str, int] = {}
    for training in trainings.values():
        for metric in {name for row in training.log for name in row}:
            logged[metric] = logged.get(metric, 0) + 1
    shared = [metric for metric, count in logged.items() if count > 1]
    wanted = [metric for start in _METRICS for metric in sorted(shared) if metric.startswith(start)]
    return [{"name": metric, "svg": _overlaid(metric, trainings)} for metric in dict.fromkeys(wanted)]


def _overlaid(metric: str, trainings: Mapping[int, Training]) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": metric, "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for place, training in trainings.items():
            points = points_of(metric, training.log)
            if points:
                look = {"color": _COLOURS[place], "linestyle": _DASHES[place], "linewidth": 1.6}
                axes.plot(*zip(*points), **look, marker="o" if len(points) == 1 else None)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.tick_params(colors=_INK, length=3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_INK)
        axes.set_xlabel("step", color=_INK)
        drawn = io.StringIO()
        figure.savefig(
            drawn, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _in_page_colours(drawn.getvalue())


def _in_page_colours(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    head, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]+"', head)
    rest = re.sub(r'<g id="[^"]*"', "<g", rest).replace(_INK, "currentColor")
    for place, colour in enumerate(_COLOURS):
        rest = rest.replace(colour, f"var(--run-{place})")
    return f'<svg {view[0] if view else ""} aria-hidden="true" focusable="false">{rest}'
