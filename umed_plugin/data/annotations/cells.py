"""Cells of a CSV, by the columns that a recipe names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class RowCheck:
    """Looks whether the rows of a CSV file have as many cells as they need.

    Attributes:
        path: of the file.
        header: titles of the columns.
        last_needed: index of the last column that is read; see `last_column`.
        faults: to which what is wrong is added.
        delimiter: of the file.
        key: of the recipe, under which the delimiter is named; empty for a reader whose delimiter is fixed.
        has_header: False where the titles are only the numbers of the first line's cells.
    """

    path: Path
    header: list[str]
    last_needed: int
    faults: Faults
    delimiter: str = ","
    key: str = ""
    has_header: bool = True

    def filled_rows(self, rows: list[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
        """The rows that are not blank and have no fault, of a file in which a missing cell can be read as an empty one.

        Excel leaves out the empty cells at the end of a row. Where the last row ends early and no line break follows, the file
        is not whole. Where all rows end early, the delimiter is another.
        """
        rows = [(number, row) for number, row in rows if any(cell.strip() for cell in row)]
        if self.first_is_untitled(rows):
            return
        short = [len(row) <= self.last_needed for _, row in rows]
        is_cut = short[-1:] == [True] and not read_text(self.path).endswith(("\n", "\r"))
        may_be_short = len(rows) - is_cut if not all(short) else 0
        for place, (number, row) in enumerate(rows):
            if (short[place] and place < may_be_short) or self.is_whole(number, row):
                yield number, row

    def first_is_untitled(self, rows: list[tuple[int, list[str]]]) -> bool:
        """True, with a fault, if each row has one cell more than the header, as in the tables that R writes."""
        filled = [row for _, row in rows if any(cell.strip() for cell in row)]
        wanted = len(self.header) + 1
        if not self.has_header or not filled or not all(len(row) == wanted and row[-1].strip() for row in filled):
            return False
        self.faults.add(
            self.path,
            f"all rows have {wanted} cells, and the header has {len(self.header)}. If the first column has no title, as in "
            f"R's tables, give it one. Else put text that holds {self.delimiter!r} into quotes",
        )
        return True

    def is_whole(self, number: int, row: list[str]) -> bool:
        """False, with a fault, for a row that ends before a needed column, or that has text behind the header's last column.

        In a row that ends early, a missing box would say that the image has no lesion. In one that is too long, an unquoted
        delimiter has moved the cells behind it.

        Args:
            number: of the row's first line.
            row: its cells.
        """
        titles = "header" if self.has_header else "first line"
        counts = f"has {len(row)} cells, and the {titles} has {len(self.header)}"
        if len(row) <= self.last_needed:
            right = f", and is {self.key}.delimiter right" if self.key else ""
            self.faults.add(f"{self.path}:{number}", f"{counts}. Is the file whole{right}?")
            return False
        if any(cell.strip() for cell in row[len(self.header) :]):
            self.faults.add(f"{self.path}:{number}", f"{counts}. Put text that holds {self.delimiter!r} into quotes")
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
