"""Before and after for the terminal: a table of stages.

How to run: `umed demo` and `umed upgrade` print it; the pages and pictures are in `umed_plugin.commands.report`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from umed_plugin.evaluation.benchmarks.recipe_scoring import HEADLINE
from umed_plugin.evaluation.tables import direction_note, formatted, from_fewer, interval_notes, of_fewest


def stages_table(stages: Mapping[str, Mapping[str, Any]], comparison: Mapping[str, Any] | None = None) -> Any:
    """A rich table: one row per metric, one column per stage, values with their 95 % intervals.

    Args:
        stages: name -> an evaluation in short, from `umed_plugin.evaluation.benchmarks.recipe_cases.headline`.
        comparison: what `umed_plugin.evaluation.results.compare` gives for the last two stages; adds a column.
    """
    from rich.table import Table

    table = Table()
    table.add_column("metric")
    for name, summary in stages.items():
        table.add_column(f"{name.replace('_', ' ')}\n(n = {summary['n']})", justify="right")
    if comparison:
        before, after = list(stages)[-2:]
        table.add_column(f"{after.replace('_', ' ')} -\n{before.replace('_', ' ')}", justify="right")
    for metric in HEADLINE:
        cells = [formatted(summary[metric], summary[f"{metric}_ci95"]) for summary in stages.values()]
        if comparison:
            difference = comparison.get(metric, {"difference": None, "ci95": None})
            cells.append(formatted(difference["difference"], difference["ci95"], "+.3f"))
        table.add_row(metric, *cells)
    return table


def stages_notes(stages: Mapping[str, Mapping[str, Any]], comparison: Mapping[str, Any] | None = None) -> list[str]:
    """What stands below `stages_table`: what its intervals resample, where they are unsure, and what a sign means."""
    last = list(stages.values())[-1]
    unit = last.get("unit", "patient or image")  # a summary of an earlier version does not say
    fewest = of_fewest([stage.get("intervals", {}) for stage in stages.values()])
    notes = [f"95 % intervals, resampled by {unit}.", *interval_notes(fewest, unit)]
    if comparison:
        headline = {name: comparison[name] for name in HEADLINE if name in comparison}
        notes += interval_notes(from_fewer(headline, fewest), unit)
        notes.append(direction_note(headline))
    return notes
