"""Writes the report: table, curves and galleries into one HTML file.

The file loads nothing: its Content-Security-Policy forbids it, and lets no script run but its own, known by its hash. Texts of
models and names of files are escaped where the page is made and set as text where it draws, so that they cannot become markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.evaluate import METRICS, Evaluation, compare
from umed_plugin.reporting.curves import charts_of
from umed_plugin.reporting.gallery import candidate_cards, study_cards
from umed_plugin.reporting.run_folder import STAGES, Run, Training, read_run

FILE = "report.html"
STUDIES = 500

_METRICS = {
    "accuracy": ("Accuracy", "share of studies with exactly the true classes named"),
    "mean_iou": ("Mean IoU", "of predicted and true boxes, studies with a lesion"),
    "acc_at_50": ("Acc@0.5", "share of studies with a lesion with IoU of at least 0.5"),
    "vision_relevance": ("Vision relevance", "attention of the abnormality's name on the lesion"),
}


def write_report(
    run_dir: Path | str, most_studies: int = STUDIES, progress: Callable[[str, int, int], None] | None = None
) -> Path:
    """Write ``run_dir/report.html`` and return its path; the file appears whole or not at all.

    Args:
        run_dir: folder of `umed demo`, `umed upgrade` or one training.
        most_studies: in the gallery; the table is of all.
        progress: called with (what is being done, done, in all).

    Raises:
        UmedError: the folder holds nothing to report, or a damaged file.
    """
    run = read_run(run_dir)
    aside, file = run.folder / f"{FILE}.partial", run.folder / FILE
    aside.write_text(render(run, most_studies, progress), encoding="utf-8")
    os.replace(aside, file)
    return file


def render(run: Run, most_studies: int, progress: Callable[[str, int, int], None] | None = None) -> str:
    """The HTML of a run's report."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from jinja2.utils import htmlsafe_json_dumps

    from umed_plugin import __version__

    def said(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    shelf = Path(__file__).parent
    script = (shelf / "report.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(shelf), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    labels = [stage_label(stage) for stage in run.evaluations]
    studies = study_cards(run.evaluations, most_studies, run.folder, said("drawing studies"))
    candidates = candidate_cards(run.candidates, run.folder, said("drawing sampled answers"))
    table, notes = metrics_table(run.evaluations)
    asked = max((len(evaluation.cases) for evaluation in run.evaluations.values()), default=0)
    if len(studies) < asked:
        notes.append(
            f"The gallery has {len(studies)} of the {asked} studies: a third with the largest gains, a third with the worst last "
            "answers, and others at even distances. The table is of all."
        )
    return environment.get_template("report.html").render(
        name=run.folder.name,
        version=__version__,
        style=(shelf / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        notes=notes,
        table=table,
        trainings=[_training(training, said("drawing curves")) for training in run.trainings],
        stages=labels,
        studies=len(studies),
        candidates=len(candidates),
        data=htmlsafe_json_dumps(
            _finite({"stages": labels, "studies": studies, "candidates": candidates}), dumps=_compact
        ),
    )


def stage_label(stage: str) -> str:
    """What people call a stage."""
    return STAGES.get(stage, stage.replace("_", " "))


def metrics_table(evaluations: Mapping[str, Evaluation]) -> tuple[dict[str, Any] | None, list[str]]:
    """(the table's heads and rows, None without an evaluation; what could not be compared, in words)."""
    if not evaluations:
        return None, []
    notes, differences = [], {}
    names = list(evaluations)
    pairs = list(zip(names, names[1:]))
    pairs += [(names[0], names[-1])] if len(names) > 2 else []
    for before, after in pairs:
        try:
            found = compare(evaluations[before], evaluations[after])
        except UmedError as error:
            notes.append(str(error))
            continue
        differences[f"{stage_label(after)} − {stage_label(before)}"] = found
    of_all = [found.metrics for found in evaluations.values()]
    # Benchmarks have metrics of their own; those have no differences here.
    others = dict.fromkeys(key[: -len("_ci95")] for found in of_all for key in found if key.endswith("_ci95"))
    rows = []
    for metric in dict.fromkeys([*METRICS, *others]):
        title, about = _METRICS.get(metric, (metric.replace("_", " "), ""))
        cells = [_cell(found.get(metric), found.get(f"{metric}_ci95")) for found in of_all]
        compared = [found.get(metric, {}) for found in differences.values()]
        cells += [_cell(one.get("difference"), one.get("ci95"), "+.3f") for one in compared]
        rows.append({"title": title, "about": about, "cells": cells})
    heads = [*map(stage_label, names), *differences]
    return {"about": _about(evaluations), "heads": heads, "stages": len(names), "rows": rows}, notes


def _about(evaluations: Mapping[str, Evaluation]) -> str:
    last = list(evaluations.values())[-1].metrics
    said = f"{last.get('n', 0)} studies"
    return f"{said}, {last['n_with_lesion']} of them with a lesion." if "n_with_lesion" in last else f"{said}."


def _cell(value: float | None, interval: Sequence[float] | None, form: str = ".3f") -> dict[str, str]:
    """A cell's text; a difference has a trend where its interval leaves 0 out."""
    if value is None or interval is None:
        return {"value": "–", "interval": "", "trend": ""}
    trend = ""
    if form.startswith("+"):
        trend = "up" if interval[0] > 0 else "down" if interval[1] < 0 else ""
    mark = {"up": "▲ ", "down": "▼ ", "": ""}[trend]
    low, middle, high = (f"{end:{form}}".replace("-", "−") for end in (interval[0], value, interval[1]))
    return {"value": mark + middle, "interval": f"{low} to {high}", "trend": trend}


def _training(training: Training, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    kinds = {"instruction_tuning": "Stage 1, instruction tuning", "rewarding": "Stage 2, rewarding", None: "Training"}
    steps = f"{training.steps} steps"
    if training.steps < training.of_steps:
        steps = f"{training.steps} of {training.of_steps} steps: not finished"
    groups = charts_of(training)
    if progress is not None:
        progress(1, 1)
    about = f"{steps}." if groups else f"{steps}; nothing was logged (see --logging_steps)."
    return {"title": f"{kinds[training.stage]}: {training.name}", "about": about, "groups": groups}


def _compact(value: Any, **_: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    """Numbers with 5 decimals; None for those that JSON cannot hold."""
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
