"""The table of before and after: metrics of each stage with confidence intervals, and paired differences of stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from umed_plugin.commands.report.run_folder import stage_label
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.recipe import RECIPE
from umed_plugin.evaluation.benchmarks.recipe_scoring import HEADLINE
from umed_plugin.evaluation.results import Evaluation, compare
from umed_plugin.evaluation.tables import direction_note, interval_notes

_ABOUT = {
    "accuracy": ("Accuracy", "share of studies whose answer names exactly the true classes"),
    "mean_iou": ("Mean IoU", "of predicted and true boxes, studies with a lesion"),
    "acc_at_50": ("Acc@0.5", "share of studies with a lesion whose IoU is at least 0.5"),
    "vision_relevance": ("Vision relevance", "attention of the abnormality's name on the lesion"),
    "acc_at_25": ("Acc@0.25", "share of studies with a lesion whose IoU is at least 0.25"),
    "false_box_rate": ("false box rate", "share of studies without a lesion on which a box is drawn"),
    "lesion_iou": ("lesion IoU", "of each lesion and the box that it is matched to"),
    "lesions_found": ("lesions found", "share with IoU of at least 0.5"),
}


def metrics_table(evaluations: Mapping[str, Evaluation]) -> tuple[dict[str, Any] | None, list[str]]:
    """What the page's tables hold, None without an evaluation; and what could not be compared, in words.

    ``heads`` are the column heads: first the ``stages``, then the differences. ``rows`` are the metrics of
    `umed_plugin.evaluation.benchmarks.recipe_scoring.HEADLINE`, ``more`` all further ones. ``exact`` has all numbers unrounded.
    """
    if not evaluations:
        return None, []
    notes, differences = [], {}
    names = list(evaluations)
    pairs = list(zip(names, names[1:]))
    pairs += [(names[0], names[-1])] if len(names) > 2 else []
    for before, after in pairs:
        try:
            difference = compare(evaluations[before], evaluations[after])
        except UmedError as error:
            notes.append(str(error))
            continue
        differences[f"{stage_label(after)} − {stage_label(before)}"] = difference
    stages = [evaluation.metrics for evaluation in evaluations.values()]
    reported = dict.fromkeys(name for metrics in stages for name in metrics)
    first = [name for name in HEADLINE if name in reported]
    table = {
        "about": _about(list(evaluations.values())),
        "notes": _notes(list(evaluations.values()), list(differences.values())),
        "heads": [*map(stage_label, names), *differences],
        "stages": len(names),
        "rows": [_row(name, stages, list(differences.values())) for name in first],
        "more": [_row(name, stages, list(differences.values())) for name in reported if name not in first],
        # To the last digit, for the downloads.
        "exact": {
            "stages": {stage_label(name): evaluation.metrics for name, evaluation in evaluations.items()},
            "differences": differences,
        },
    }
    return table, notes


def _about(evaluations: Sequence[Evaluation]) -> str:
    """How many studies (questions), and what the intervals resample."""
    last = evaluations[-1]
    units = " and ".join(dict.fromkeys(evaluation.unit for evaluation in evaluations))
    resampled = f"Intervals are 95 % confidence intervals, resampled by {units}."
    if last.benchmark != RECIPE.name:
        return f"{len(last.predictions)} questions of {last.benchmark}. {resampled}"
    return f"{len(last.predictions)} studies, {last.metrics['mean_iou']['n']} of them with a lesion. {resampled}"


def _notes(evaluations: Sequence[Evaluation], differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the last stage's intervals and the last difference's are unsure, and what the sign of a difference means."""
    last = evaluations[-1]
    notes = interval_notes(last.metrics, last.unit)
    return [*notes, direction_note(differences[-1])] if differences else notes


def _row(name: str, stages: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A metric's row; its name may end with a group, as in ``accuracy/deeplesion``."""
    base, _, group = name.partition("/")
    title, about = title_of(base)
    n = max(metrics[name]["n"] for metrics in stages if name in metrics)
    measured = [metrics.get(name, {}) for metrics in stages]
    compared = [metrics.get(name, {}) for metrics in differences]
    cells = [cell_of(value) for value in measured]
    cells += [difference_of(value) for value in compared]
    return {
        "title": f"{title}, {group}" if group else title,
        "about": "; ".join(filter(None, [about, f"n = {n}"])),
        "cells": cells,
    }


def title_of(name: str) -> tuple[str, str]:
    """A metric's name for readers, and what it is."""
    return _ABOUT.get(name, (name.replace("_", " "), ""))


def cell_of(measured: Mapping[str, Any]) -> dict[str, str]:
    """A cell of one metric."""
    return _cell(measured.get("value"), measured.get("ci95"))


def difference_of(compared: Mapping[str, Any]) -> dict[str, str]:
    """A cell of a difference: a mark, and whether it is for the better or worse, if its interval excludes 0."""
    cell, interval = _cell(compared.get("difference"), compared.get("ci95"), "+.3f"), compared.get("ci95")
    if interval is None or interval[0] <= 0 <= interval[1]:
        return cell
    is_up = interval[0] > 0
    is_better = is_up != compared.get("lower_is_better", False)
    cell["value"] = ("▲ " if is_up else "▼ ") + cell["value"]
    return {**cell, "trend": "up" if is_better else "down", "verdict": "better" if is_better else "worse"}


def _cell(value: float | None, interval: Sequence[float] | None, form: str = ".3f") -> dict[str, str]:
    """A cell's text."""
    if value is None:
        return {"value": "–", "interval": "", "trend": "", "verdict": ""}
    middle, *ends = (f"{end:{form}}".replace("-", "−") for end in (value, *(interval or ())))
    return {"value": middle, "interval": " to ".join(ends) or "no interval", "trend": "", "verdict": ""}
