"""The table of before and after: metrics of each stage with their intervals, and the paired differences of stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from umed_plugin.commands.report.run_folder import stage_label
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.grounded import METRICS, Evaluation, compare

_ABOUT = {
    "accuracy": ("Accuracy", "share of studies with exactly the true classes named"),
    "mean_iou": ("Mean IoU", "of predicted and true boxes, studies with a lesion"),
    "acc_at_50": ("Acc@0.5", "share of studies with a lesion with IoU of at least 0.5"),
    "vision_relevance": ("Vision relevance", "attention of the abnormality's name on the lesion"),
    "acc_at_25": ("Acc@0.25", "share of studies with a lesion with IoU of at least 0.25"),
    "false_box_rate": ("false box rate", "share of studies without a lesion on which a box is drawn"),
    "lesion_iou": ("lesion IoU", "each lesion with the box that it is matched to"),
    "lesions_found": ("lesions found", "share with IoU of at least 0.5"),
}


def metrics_table(evaluations: Mapping[str, Evaluation]) -> tuple[dict[str, Any] | None, list[str]]:
    """What the page's tables hold, None without an evaluation; and what could not be compared, in words.

    ``heads`` are those of the columns, the first ``stages`` of which are stages and the others differences; ``rows`` are of
    `umed_plugin.evaluation.grounded.METRICS`, ``more`` of the further figures that an evaluation has.
    """
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
    figures = [found.get("figures", {}) for found in of_all]
    compared = [found["figures"] for found in differences.values()]
    more = [name for name in dict.fromkeys(name for found in figures for name in found) if name not in METRICS]
    table = {
        "about": _about(evaluations),
        "heads": [*map(stage_label, names), *differences],
        "stages": len(names),
        "rows": [_metric_row(name, of_all, list(differences.values())) for name in METRICS],
        "more": [_figure_row(name, figures, compared) for name in more],
    }
    return table, notes


def _about(evaluations: Mapping[str, Evaluation]) -> str:
    last = list(evaluations.values())[-1].metrics
    said = f"{last.get('n', 0)} studies"
    return f"{said}, {last['n_with_lesion']} of them with a lesion." if "n_with_lesion" in last else f"{said}."


def _metric_row(
    name: str, stages: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    title, about = _ABOUT[name]
    cells = [_cell(found.get(name), found.get(f"{name}_ci95")) for found in stages]
    cells += [_cell(found[name]["difference"], found[name]["ci95"], "+.3f") for found in differences]
    return {"title": title, "about": about, "cells": cells}


def _figure_row(
    name: str, stages: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A row of a figure of `umed_plugin.evaluation.metrics.figures`; its name may end with a group, as in
    ``accuracy/deeplesion``.
    """
    base, _, group = name.partition("/")
    title, about = _ABOUT.get(base, (base.replace("_", " "), ""))
    asked = max(found[name]["n"] for found in stages if name in found)
    said = [found.get(name, {}) for found in stages]
    cells = [_cell(one.get("value"), one.get("ci95")) for one in said]
    cells += [
        _cell(one.get("difference"), one.get("ci95"), "+.3f") for one in (found.get(name, {}) for found in differences)
    ]
    return {
        "title": f"{title}, {group}" if group else title,
        "about": "; ".join(filter(None, [about, f"n = {asked}"])),
        "cells": cells,
    }


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
