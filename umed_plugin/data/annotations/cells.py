"""Cells of a CSV, by the columns that a recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from umed_plugin.data.recipes.options import Column
from umed_plugin.errors import did_you_mean
from umed_plugin.faults import Faults


def columns_exist(wanted: list[tuple[str, Column]], header: list[str], path: Path, faults: Faults) -> bool:
    """False if the file lacks a column that the recipe names; each is added to the faults."""
    good = True
    for role, column in wanted:
        if column not in header if isinstance(column, str) else not 0 <= column < len(header):
            close = did_you_mean(str(column), header)
            faults.add(path, f"has no column {column!r} ({role}).{close} It has: {', '.join(header) or 'none'}")
            good = False
        elif isinstance(column, str) and header.count(column) > 1:
            faults.add(
                path,
                f"has {header.count(column)} columns {column!r} ({role}). Name the one that is meant by its number",
            )
            good = False
    return good


def cell_of(row: list[str], header: list[str], column: Optional[Column]) -> str:
    """Text of a cell; empty where the recipe names no column or the row is too short."""
    if column is None or (isinstance(column, str) and column not in header):
        return ""
    index = header.index(column) if isinstance(column, str) else column
    return row[index].strip() if index < len(row) else ""
