"""Figures for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def figures_table(
    title: str, figures: Mapping[str, Mapping[str, Any]], differences: Mapping[str, Mapping[str, Any]] | None = None
) -> Any:
    """A rich table: one row a figure, with its 95 % interval and n, and the paired difference from another run.

    Args:
        title: of the column of values.
        figures: name -> value, ci95, n, as `umed_plugin.evaluation.metrics.figures.measure` gives them.
        differences: name -> difference, ci95, n, as `umed_plugin.evaluation.metrics.figures.compare_rows` gives them.
    """
    from rich.table import Table

    table = Table()
    table.add_column("figure")
    table.add_column(title, justify="right")
    table.add_column("n", justify="right")
    if differences is not None:
        table.add_column("difference", justify="right")
    for name, found in figures.items():
        cells = [written(found["value"], found["ci95"]), str(found["n"])]
        if differences is not None:
            other = differences.get(name, {"difference": None, "ci95": None})
            cells.append(written(other["difference"], other["ci95"], "+.3f"))
        table.add_row(name, *cells)
    return table


def written(value: float | None, interval: list[float] | None, form: str = ".3f") -> str:
    """``0.123 [0.100, 0.150]``; ``-`` for what is not defined."""
    if value is None:
        return "-"
    if interval is None:
        return f"{value:{form}}"
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def sources_table(title: str, figures: Mapping[str, Mapping[str, Any]]) -> Any:
    """Accuracy of each source and their plain mean in one row, two decimals, as the UMed-LVLM paper prints MAU's."""
    from rich.table import Table

    sources = [name.partition("/")[2] for name in figures if name.startswith("accuracy/")]
    table = Table(title="accuracy by source")
    table.add_column("")
    for name in (*sources, "Avg"):
        table.add_column(name, justify="right")
    values = [figures[f"accuracy/{name}"]["value"] for name in sources] + [figures["accuracy_average"]["value"]]
    table.add_row(title, *(f"{value:.2f}".lstrip("0") or "0" for value in values))
    return table
