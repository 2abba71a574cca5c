"""The table of before and after: metrics of each stage with confidence intervals, and paired differences of stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from umed_plugin.commands.report.run_folder import stage_label
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.recipe import RECIPE
from umed_plugin.evaluation.benchmarks.recipe_scoring import HEADLINE
from umed_plugin.evaluation.metrics.metric import EXACT
from umed_plugin.evaluation.results import Evaluation, compare
from umed_plugin.evaluation.tables import direction_note, from_fewer, interval_notes, of_fewest

_ABOUT = {
    "accuracy": ("Accuracy", "share of studies whose answer names exactly the true classes"),
    "mean_iou": ("Mean IoU", "of predicted and true boxes, studies with a lesion"),
    "acc_at_50": ("Acc@0.5", "share of studies with a lesion whose IoU is at least 0.5"),
    "vision_relevance": ("Vision relevance", "attention of the abnormality's name on the lesion"),
    "acc_at_25": ("Acc@0.25", "share of studies with a lesion whose IoU is at least 0.25"),
    "false_box_rate": ("false box rate", "share of studies without a lesion on which a box is drawn"),
    "lesion_iou": ("lesion IoU", "of each lesion and the box that it is matched to"),
    "lesions_found": ("lesions found", "share with IoU of at least 0.5"),
    "pointing_game": (
        "pointing game",
        "share of studies with a lesion in which the middle of the first box lies in one",
    ),
    "pointing_game_attention": (
        "pointing game of the attention",
        "share of studies with a lesion in which the patch with most attention of the abnormality's name lies in one",
    ),
    "false_boxes_per_negative": ("false boxes per negative", "mean number of boxes on a study without a lesion"),
    "unread_boxes": ("unread boxes", "mean number of boxes in an answer that have no readable coordinates"),
    "consistent_answers": ("consistent answers", "share that agree with themselves: number, side and names"),
}
# Beginnings of metrics that are 0 where nothing is drawn.
_OF_BOXES = ("mean_iou", "acc_at", "pointing_game", "lesion_iou", "lesions_found")
NEAR_UNIFORM = 1.1  # vision relevance of at most so many times uniform attention is about chance


@dataclass(frozen=True)
class Looked:
    """Vision relevance beside chance, over all studies with a lesion.

    Attributes:
        uniform: what attention that is the same everywhere would have: the mean share of the picture that lesions cover, 0-1.
        times: stage -> its vision relevance as a multiple of ``uniform``.
    """

    uniform: float
    times: Mapping[str, float]

    def warning(self) -> str:
        """What to say if the last stage's attention is about chance; else empty."""
        stage, times = list(self.times.items())[-1]
        if times > NEAR_UNIFORM:
            return ""
        if times == 0:
            return (
                f"Vision relevance of {stage_label(stage)} is 0: no answer names the abnormality, so no attention of its name "
                "could be measured."
            )
        return (
            f"Vision relevance of {stage_label(stage)} is {times:.2f} times that of uniform attention: about chance. A higher "
            "value than before is no sign yet that the model looks at the lesion."
        )


def metrics_table(
    evaluations: Mapping[str, Evaluation], looked: Looked | None = None
) -> tuple[dict[str, Any] | None, list[str]]:
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
    asked = [name for name in reported if any(metrics.get(name, {}).get("n") for metrics in stages)]
    drawn = {stage: answers_with_box(evaluation) for stage, evaluation in evaluations.items()}

    def row(name: str) -> dict[str, Any]:
        return _row(name, evaluations, list(differences.values()), drawn, looked)

    table = {
        "about": _about(evaluations),
        "notes": _notes(evaluations, differences, drawn),
        "heads": [*map(stage_label, names), *differences],
        "stages": len(names),
        "rows": [row(name) for name in first],
        "more": [row(name) for name in asked if name not in first],
        "kinds": _kinds(asked),
        "without_rows": ", ".join(full_title(name) for name in reported if name not in (*asked, *first)),
        # To the last digit, for the downloads.
        "exact": {
            "stages": {stage_label(name): evaluation.metrics for name, evaluation in evaluations.items()},
            "differences": differences,
        },
    }
    return table, notes


def _kinds(names: Sequence[str]) -> str:
    """What the further metrics are of, for the heading that they are folded under."""
    kinds = {"by source": "accuracy/", "by lesion size": "lesion_iou/", "on studies without a lesion": "false_box"}
    found = [kind for kind, start in kinds.items() if any(name.startswith(start) for name in names)]
    return ", ".join(found) or "all others"


def _about(evaluations: Mapping[str, Evaluation]) -> str:
    """How many studies (questions) of how many patients, and what the intervals resample."""
    last = list(evaluations.values())[-1]
    clusters = len({prediction.cluster for prediction in last.predictions})
    units = " and ".join(dict.fromkeys(evaluation.unit for evaluation in evaluations.values()))
    resampled = f"Intervals are 95 % confidence intervals, resampled by {units}."
    asked = {stage_label(stage): len(evaluation.predictions) for stage, evaluation in evaluations.items()}
    if len(set(asked.values())) > 1:
        listed = ", ".join(f"{stage} {count}" for stage, count in asked.items())
        resampled = f"The stages were not asked alike: {listed}. {resampled}"
    if last.benchmark != RECIPE.name:
        return f"{len(last.predictions)} questions of {last.benchmark}. {resampled}"
    patients = f" of {clusters} patients" if last.unit == "patient" else ""
    return f"{len(last.predictions)} studies{patients}{_with_lesion(last)}. {resampled}"


def _with_lesion(evaluation: Evaluation) -> str:
    """How many studies have a lesion. Of a report nothing is known about where its findings lie, so it has no box to count."""
    count, has_reports = evaluation.metrics["mean_iou"]["n"], "findings_f1" in evaluation.metrics
    if has_reports and not count:
        return ""
    return f"; {count} of the studies have a lesion" + (" with a box" if has_reports else "")


def _notes(
    evaluations: Mapping[str, Evaluation],
    compared: Mapping[str, Mapping[str, Any]],
    drawn: Mapping[str, tuple[int, int]],
) -> list[str]:
    """Where intervals are unsure, how often a box was drawn, and what the sign of a difference means."""
    stages = list(evaluations.values())
    last = stages[-1]
    fewest, differences = of_fewest([evaluation.metrics for evaluation in stages]), list(compared.values())
    notes = interval_notes(_sampled(fewest), last.unit)
    for head, difference in compared.items():
        notes += interval_notes(_sampled(from_fewer(difference, fewest, "{}"), f", {head}"), last.unit)
    shown = [*(evaluation.metrics for evaluation in stages), *differences]
    if any(entry.get("interval") == EXACT for metrics in shown for entry in metrics.values()):
        unit = last.unit.replace(", ", " or ")
        notes.append(f'"exact": a Clopper-Pearson interval, since every {unit} scores alike.')
    if any(asked for _, asked in drawn.values()):
        said = ", ".join(f"{stage_label(stage)} in {boxes} of {asked}" for stage, (boxes, asked) in drawn.items())
        notes.append(f"A box is drawn in the studies with a lesion: {said}. An answer without a box has IoU 0.")
    if differences:
        named = {full_title(name): entry for name, entry in differences[-1].items()}
        notes += [direction_note(named) + " Differences are computed before rounding."]
    return notes


def _sampled(entries: Mapping[str, Mapping[str, Any]], what: str = "") -> dict[str, Mapping[str, Any]]:
    """The entries under readers' names, without those whose interval is exact, which the table says itself."""
    return {f"{full_title(name)}{what}": entry for name, entry in entries.items() if entry.get("interval") != EXACT}


def answers_with_box(evaluation: Evaluation) -> tuple[int, int]:
    """Answers that have a box, readable or not, and all answers, of the studies whose boxes are scored."""
    asked = [one for one in evaluation.predictions if "mean_iou" in one.values]
    return sum(bool(one.details.get("boxes")) for one in asked), len(asked)


def _row(
    name: str,
    evaluations: Mapping[str, Evaluation],
    differences: Sequence[Mapping[str, Any]],
    drawn: Mapping[str, tuple[int, int]],
    looked: Looked | None,
) -> dict[str, Any]:
    """A metric's row; its name may end with a group, as in ``accuracy/deeplesion``."""
    stages = [evaluation.metrics for evaluation in evaluations.values()]
    about = [title_of(name.partition("/")[0])[1], f"n = {_counted([metrics.get(name) for metrics in stages])}"]
    cells = [cell_of(metrics.get(name, {})) for metrics in stages]
    for (stage, (boxes, asked)), cell in zip(drawn.items(), cells):
        if asked and not boxes and name.startswith(_OF_BOXES) and name != "pointing_game_attention":
            cell["verdict"] = "; ".join(filter(None, [cell["verdict"], "no box drawn"]))
        if looked is not None and name == "vision_relevance" and stage in looked.times:
            cell["verdict"] = f"{looked.times[stage]:.2f} × uniform"
    if looked is not None and name == "vision_relevance":
        about.append(f"uniform attention has {looked.uniform:.3f}")
    cells += [difference_of(metrics.get(name, {})) for metrics in differences]
    return {"id": name, "title": full_title(name), "about": "; ".join(filter(None, about)), "cells": cells}


def _counted(stages: Sequence[Optional[Mapping[str, Any]]]) -> str:
    """The number of studies that a metric is of: one number, or each stage's where they differ."""
    known = {measured["n"] for measured in stages if measured is not None}
    if len(known) == 1:
        return str(*known)
    return ", ".join("–" if measured is None else str(measured["n"]) for measured in stages)


def full_title(name: str) -> str:
    """The name for readers of a metric that may be of one group."""
    base, _, group = name.partition("/")
    return ", ".join(filter(None, [title_of(base)[0], group]))


def title_of(name: str) -> tuple[str, str]:
    """A metric's name for readers, and what it is."""
    return _ABOUT.get(name, (name.replace("_", " "), ""))


def cell_of(measured: Mapping[str, Any]) -> dict[str, str]:
    """A cell of one metric."""
    return _exact(_cell(measured.get("value"), measured.get("ci95")), measured)


def difference_of(compared: Mapping[str, Any]) -> dict[str, str]:
    """A cell of a difference: a mark, and whether it is for the better or worse, if its interval excludes 0."""
    interval = compared.get("ci95")
    cell = _exact(_cell(compared.get("difference"), interval, "+.3f"), compared)
    if interval is None or interval[0] <= 0 <= interval[1]:
        return cell
    is_up = interval[0] > 0
    is_better = is_up != compared.get("lower_is_better", False)
    cell["value"] = ("▲ " if is_up else "▼ ") + cell["value"]
    return {**cell, "trend": "up" if is_better else "down", "verdict": "better" if is_better else "worse"}


def _exact(cell: dict[str, str], entry: Mapping[str, Any]) -> dict[str, str]:
    """The cell, which says so if its interval is exact and not resampled."""
    return {**cell, "verdict": "exact"} if entry.get("interval") == EXACT else cell


def _cell(value: float | None, interval: Sequence[float] | None, form: str = ".3f") -> dict[str, str]:
    """A cell's text."""
    if value is None:
        return {"value": "–", "interval": "", "trend": "", "verdict": ""}
    middle, *ends = (f"{end:{form}}".replace("-", "−") for end in (value, *(interval or ())))
    return {"value": middle, "interval": " to ".join(ends) or "no interval", "trend": "", "verdict": ""}
