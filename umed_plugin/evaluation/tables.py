"""Metrics for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from umed_plugin.evaluation.metrics.metric import BOOTSTRAP, EXACT, FEW, FEWEST, MAX_UNDEFINED, TOO_FEW, UNDEFINED
from umed_plugin.grounding.dialects import BoxDialect
from umed_plugin.terminal.text import one_line

_SHOWN = 60  # characters of an answer
_NAMED = 8  # metrics in a sentence


def metrics_table(
    title: str,
    metrics: Mapping[str, Mapping[str, Any]],
    differences: Mapping[str, Mapping[str, Any]] | None = None,
    before: str = "the other",
    constants: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """A rich table: one row per metric, with its 95 % interval and n, and the paired difference from another evaluation.

    Args:
        title: of the column of values.
        metrics: name -> value, ci95, n, as an `umed_plugin.evaluation.results.Evaluation` has them.
        differences: name -> difference, ci95, n, as `umed_plugin.evaluation.results.compare` gives them.
        before: name of the other evaluation, which is subtracted.
        constants: name -> value, answer, as `umed_plugin.evaluation.constants.best_constants` gives them.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column("metric")
    table.add_column(title, justify="right")
    table.add_column("n", justify="right")
    if constants:
        table.add_column("without looking")
    if differences is not None:
        table.add_column(f"{title} −\n{before}", justify="right")
    for name, measured in metrics.items():
        cells = [formatted(measured["value"], measured["ci95"]), str(measured["n"])]
        if constants:
            best = constants.get(name)
            cells.append("" if best is None else escape(f"{best['value']:.3f} {one_line(best['answer'])}"))
        if differences is not None:
            difference = differences.get(name, {"difference": None, "ci95": None})
            cells.append(formatted(difference["difference"], difference["ci95"], "+.3f"))
        table.add_row(name, *cells)
    return table


def interval_notes(metrics: Mapping[str, Mapping[str, Any]], unit: str = "image") -> list[str]:
    """Sentences on values and intervals that are missing, exact, or from few clusters; under every table of metrics.

    Args:
        metrics: name -> what `umed_plugin.evaluation.metrics.metric.measure` or ``compare_rows`` gives. Files of earlier versions
            do not say how an interval was computed; they have no sentence.
        unit: what the intervals resample, such as "patient".
    """
    said = [(name, entry.get("interval"), entry.get("units") or 0) for name, entry in metrics.items()]
    exact = [name for name, interval, _ in said if interval == EXACT]
    too_few = [f"{name} ({units})" for name, interval, units in said if interval == TOO_FEW]
    few = [f"{name} ({units})" for name, interval, units in said if interval == BOOTSTRAP and units < FEW]
    undefined = {
        name: entry for name, entry in metrics.items() if entry.get("interval") == UNDEFINED and entry.get("n")
    }
    no_value = [name for name, entry in undefined.items() if entry.get("value", entry.get("difference")) is None]
    no_interval = [name for name in undefined if name not in no_value]
    plural = "images or patients" if "," in unit else f"{unit}s"
    notes = []
    if too_few:
        notes.append(f"Too few {plural} for an interval (fewer than {FEWEST}): {_some(too_few)}.")
    if few:
        notes.append(
            f"Few {plural} (fewer than {FEW}): {_some(few)}. Such an interval is too narrow; take it as a hint, not as proof."
        )
    if exact:
        notes.append(f"Exact intervals (Clopper-Pearson), since all {plural} score alike: {_some(exact)}.")
    if no_value:
        notes.append(f"Undefined here, as a ratio over 0 is: {_some(no_value)}.")
    if no_interval:
        notes.append(
            f"No interval, since more than {MAX_UNDEFINED:.0%} of the draws are undefined, or all draws are the same: "
            f"{_some(no_interval)}."
        )
    return notes


def from_fewer(
    differences: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, Mapping[str, Any]],
    form: str = "difference of {}",
) -> dict[str, Mapping[str, Any]]:
    """The differences that have fewer clusters than the metric itself, for `interval_notes`, which says the others already.

    So it is where only one of two evaluations has most of the studies, or the metric is undefined in the other.

    Args:
        differences: name -> what `umed_plugin.evaluation.results.compare` gives.
        metrics: name -> what `umed_plugin.evaluation.metrics.metric.measure` gives for the later evaluation.
        form: of a difference's name; the braces stand for the metric's.
    """
    own = {name: entry.get("units") or math.inf for name, entry in metrics.items()}
    few = {name: entry for name, entry in differences.items() if (entry.get("units") or 0) < own.get(name, math.inf)}
    return {form.format(name): entry for name, entry in few.items()}


def of_fewest(stages: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Mapping[str, Any]]:
    """Each metric as the stage has it that has the fewest clusters for it; of equal ones the last."""
    found: dict[str, Mapping[str, Any]] = {}
    for metrics in reversed(stages):
        for name, entry in metrics.items():
            known = found.get(name)
            if known is None or (entry.get("units") or math.inf) < (known.get("units") or math.inf):
                found[name] = entry
    return found


def direction_note(differences: Mapping[str, Mapping[str, Any]]) -> str:
    """What the sign of a difference means."""
    less = [name for name, entry in differences.items() if entry.get("lower_is_better") and entry["n"]]
    return "A positive difference is an improvement" + (
        f", except for {_some(less)}: there less is better." if less else "."
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def unread_boxes_line(answers: Sequence[str], dialect: BoxDialect) -> str | None:
    """A sentence for the user if answers hold numbers that were not read as a box, with the first as an example."""
    unread = [found for text in answers if (found := dialect.unread(text))]
    if not unread:
        return None
    shown = ascii(unread[0][0][:_SHOWN]) + (" ..." if len(unread[0][0]) > _SHOWN else "")
    return (
        f"{len(unread)} of {len(answers)} answers hold numbers that were not read as a box, e.g. {shown}; see --boxes. What was "
        "meant as a box and cannot be read counts as a box without area."
    )


def formatted(value: float | None, interval: list[float] | None, form: str = ".3f") -> str:
    """``0.123 [0.100, 0.150]``; ``-`` for what is undefined."""
    if value is None:
        return "-"
    if interval is None:
        return f"{value:{form}}"
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def sources_table(title: str, metrics: Mapping[str, Mapping[str, Any]]) -> Any:
    """Accuracy of each source and their unweighted mean in one row, two decimals, as the UMed-LVLM paper prints MAU's."""
    from rich.table import Table

    sources = [name.partition("/")[2] for name in metrics if name.startswith("accuracy/")]
    table = Table(title="accuracy by source")
    table.add_column("")
    for name in (*sources, "Avg"):
        table.add_column(name, justify="right")
    values = [metrics[f"accuracy/{name}"]["value"] for name in sources] + [metrics["accuracy_average"]["value"]]
    table.add_row(title, *(f"{value:.2f}".lstrip("0") or "0" for value in values))
    return table
