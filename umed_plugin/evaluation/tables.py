"""Metrics for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from umed_plugin.grounding.dialects import BoxDialect

_SHOWN = 60  # characters of an answer


def metrics_table(
    title: str, metrics: Mapping[str, Mapping[str, Any]], differences: Mapping[str, Mapping[str, Any]] | None = None
) -> Any:
    """A rich table: one row per metric, with its 95 % interval and n, and the paired difference from another evaluation.

    Args:
        title: of the column of values.
        metrics: name -> value, ci95, n, as an `umed_plugin.evaluation.results.Evaluation` has them.
        differences: name -> difference, ci95, n, as `umed_plugin.evaluation.results.compare` gives them.
    """
    from rich.table import Table

    table = Table()
    table.add_column("metric")
    table.add_column(title, justify="right")
    table.add_column("n", justify="right")
    if differences is not None:
        table.add_column("difference", justify="right")
    for name, measured in metrics.items():
        cells = [formatted(measured["value"], measured["ci95"]), str(measured["n"])]
        if differences is not None:
            difference = differences.get(name, {"difference": None, "ci95": None})
            cells.append(formatted(difference["difference"], difference["ci95"], "+.3f"))
        table.add_row(name, *cells)
    return table


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
