"""Before and after for the terminal: a table of stages.

How to run: `umed demo` and `umed evaluate` print it; the pages and pictures are in `umed_plugin.commands.report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from umed_plugin.evaluation.grounded import METRICS


def stages_table(stages: Mapping[str, Mapping[str, Any]], comparison: Mapping[str, Any] | None = None) -> Any:
    """A rich table: one row a metric, one column a stage, values with their 95 % intervals.

    Args:
        stages: name -> metrics as `umed_plugin.evaluation.grounded.metrics` gives them.
        comparison: what `umed_plugin.evaluation.grounded.compare` gives for the last two stages; adds a column.
    """
    from rich.table import Table

    table = Table()
    table.add_column("metric")
    for name, found in stages.items():
        table.add_column(f"{name.replace('_', ' ')}\n(n = {found['n']})", justify="right")
    if comparison:
        before, after = list(stages)[-2:]
        table.add_column(f"{after.replace('_', ' ')} -\n{before.replace('_', ' ')}", justify="right")
    for metric in METRICS:
        cells = [_cell(found[metric], found[f"{metric}_ci95"]) for found in stages.values()]
        if comparison:
            cells.append(_cell(comparison[metric]["difference"], comparison[metric]["ci95"], "+.3f"))
        table.add_row(metric, *cells)
    return table


def _cell(value: float | None, interval: Sequence[float] | None, form: str = ".3f") -> str:
    if value is None or interval is None:
        return "-"
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"
