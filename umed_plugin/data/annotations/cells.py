"""Cells of a CSV, by the columns that a recipe names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from umed_plugin.data.endings import IMAGE_ENDINGS
from umed_plugin.data.recipes.options import Column
from umed_plugin.data.texts import read_text
from umed_plugin.errors import did_you_mean
from umed_plugin.faults import Faults

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def titled(rows: list[tuple[int, list[str]]], has_header: bool) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The titles of the columns, and the other rows with the numbers of their lines; without a header, titles are 0, 1, 2, ..."""
    if not rows:
        return [], []
    first = rows[0][1]
    titles = [title.strip() for title in first] if has_header else [str(column) for column in range(len(first))]
    return titles, rows[has_header:]


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
        elif isinstance(column, int) and _is_data(header[column], role, column):
            faults.add(
                path,
                f"its first line has {header[column]!r} in column {column} ({role}). If that is data and no title: "
                f"{role.split('.columns')[0].removesuffix('.file')}.header: false. Else give the column another title",
            )
            good = False
    return good


def _is_data(cell: str, role: str, column: int) -> bool:
    """Whether a header's cell is a value. pandas writes the numbers of the columns as titles, which are none."""
    if role.endswith(".file"):
        return cell.lower().endswith(IMAGE_ENDINGS)
    parts = parts_of(cell)
    is_number = bool(parts) and all(_NUMBER.fullmatch(part) for part in parts)
    return is_number and cell != str(column) and role.endswith((".box", ".slice", ".window"))


def last_column(wanted: list[tuple[str, Column]], header: list[str]) -> int:
    """Index of the last of the columns that a recipe names, which all exist; -1 if it names none."""
    return max((header.index(column) if isinstance(column, str) else column for _, column in wanted), default=-1)


def filled_rows(
    rows: list[tuple[int, list[str]]],
    header: list[str],
    last_needed: int,
    path: Path,
    faults: Faults,
    *,
    delimiter: str,
    key: str,
    has_header: bool,
) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank and have no fault, of a file in which a missing cell can be read as an empty one.

    Excel leaves out the empty cells at the end of a row. Where the last row ends early and no line break follows, the file is
    not whole. Where all rows end early, the delimiter is another. The other arguments are those of `row_is_whole`.
    """
    rows = [(number, row) for number, row in rows if any(cell.strip() for cell in row)]
    if has_header and first_is_untitled(rows, header, path, faults, delimiter=delimiter):
        return
    short = [len(row) <= last_needed for _, row in rows]
    is_cut = short[-1:] == [True] and not read_text(path).endswith(("\n", "\r"))
    for place, (number, row) in enumerate(rows):
        is_meant = short[place] and not all(short) and not (is_cut and place == len(rows) - 1)
        where, form = f"{path}:{number}", {"delimiter": delimiter, "key": key}
        if is_meant or row_is_whole(row, header, last_needed, where, faults, has_header=has_header, **form):
            yield number, row


def first_is_untitled(
    rows: list[tuple[int, list[str]]], header: list[str], path: Path, faults: Faults, *, delimiter: str
) -> bool:
    """True, with a fault, if each row has one cell more than the header, as in the tables that R writes."""
    filled = [row for _, row in rows if any(cell.strip() for cell in row)]
    if not filled or any(len(row) != len(header) + 1 for row in filled) or not all(row[-1].strip() for row in filled):
        return False
    faults.add(
        path,
        f"all rows have {len(header) + 1} cells, and the header has {len(header)}. If the first column has no title, as in R's "
        f"tables, give it one. Else put text that holds {delimiter!r} into quotes",
    )
    return True


def row_is_whole(
    row: list[str],
    header: list[str],
    last_needed: int,
    where: str,
    faults: Faults,
    *,
    delimiter: str,
    key: str,
    has_header: bool = True,
) -> bool:
    """False, with a fault, for a row that ends before a needed column, or that has text behind the header's last column.

    In a row that ends early, a missing box would say that the image has no lesion. In one that is too long, an unquoted
    delimiter has moved the cells behind it.

    Args:
        row, header: cells of the row, titles of the columns.
        last_needed: index of the last column that is read; see `last_column`.
        where: file and line.
        delimiter: of the file.
        key: of the recipe, under which the delimiter is named; empty for a reader whose delimiter is fixed.
        has_header: False where the titles are only the numbers of the first line's cells.
    """
    counts = f"has {len(row)} cells, and the {'header' if has_header else 'first line'} has {len(header)}"
    if len(row) <= last_needed:
        faults.add(where, f"{counts}. Is the file whole{f', and is {key}.delimiter right' if key else ''}?")
        return False
    if any(cell.strip() for cell in row[len(header) :]):
        faults.add(where, f"{counts}. Put text that holds {delimiter!r} into quotes")
        return False
    return True


def cell_of(row: list[str], header: list[str], column: Optional[Column]) -> str:
    """Text of a cell; empty where the recipe names no column or the row is too short."""
    if column is None or (isinstance(column, str) and column not in header):
        return ""
    index = header.index(column) if isinstance(column, str) else column
    return row[index].strip() if index < len(row) else ""


def parts_of(text: str) -> list[str]:
    """The texts of the numbers in a cell that holds several: "[12.5, 30; 44 71]"."""
    return [part for part in re.split(r"[,;\s]+", text.strip(" []()")) if part]


def name_of(value: object) -> str:
    """A patient or another name that a JSON field holds; empty for null, and "0" for 0."""
    return "" if value is None else str(value)
