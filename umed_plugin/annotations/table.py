"""CSV: one row per box; a row with an empty box marks an image without a lesion."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Optional

from umed_plugin.annotations.base import ANNOTATION_READERS, Annotated, image_folder
from umed_plugin.boxes import Box
from umed_plugin.errors import did_you_mean
from umed_plugin.recipe_faults import Faults
from umed_plugin.recipe_options import SPLITS, Column, CsvOptions


@ANNOTATION_READERS.register("csv")
def read_csv(options: CsvOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read the rows of every file and gather those of the same image and slice."""
    items: list[Annotated] = []
    for split, name in options.files.items():
        path = root / name
        if not path.is_file():
            faults.add(path, "no such annotation file")
            continue
        folder = image_folder(options, root, split, path.parent)
        rows = _rows(path, options.delimiter, faults)
        if rows is None:
            continue
        header = [title.strip() for title in rows[0]] if rows else []
        if _columns_exist(options, header, path, faults):
            items += _Table(options, header, path, folder, split, faults).items(rows[1:])
    return items


def _rows(path: Path, delimiter: str, faults: Faults) -> Optional[list[list[str]]]:
    try:
        # utf-8-sig: a byte-order mark from Excel would hide in the first header.
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        faults.add(
            f"{path}:{line}",
            f"byte 0x{error.object[error.start]:02x} is not UTF-8. Save the file as UTF-8; if it is Latin-1 (Western Europe), "
            f"with: iconv -f LATIN1 -t UTF-8 {path.name} > new.csv",
        )
        return None
    return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))


def _columns_exist(options: CsvOptions, header: list[str], path: Path, faults: Faults) -> bool:
    """Note every column that the recipe names and the file lacks; the slice column may be absent."""
    wanted: list[tuple[str, Column]] = [("only_rows", title) for title in options.only_rows]
    for role, given in options.columns:
        wanted += [
            (f"columns.{role}", one) for one in (given if isinstance(given, list) else [given]) if one is not None
        ]
    good = True
    for role, column in wanted:
        missing = column not in header if isinstance(column, str) else not 0 <= column < len(header)
        if missing and role != "columns.slice":
            close = did_you_mean(str(column), header)
            faults.add(
                path, f"has no column {column!r} (annotations.{role}).{close} It has: {', '.join(header) or 'none'}"
            )
            good = False
    return good


class _Table:
    """One CSV file with its header, for reading row by row."""

    def __init__(
        self, options: CsvOptions, header: list[str], path: Path, folder: Path, split: str, faults: Faults
    ) -> None:
        self.options, self.header, self.path = options, header, path
        self.folder, self.split, self.faults = folder, split, faults

    def items(self, rows: list[list[str]]) -> list[Annotated]:
        gathered: dict[tuple[Path, Optional[int]], Annotated] = {}
        for number, row in enumerate(rows, start=2):
            if not any(cell.strip() for cell in row) or not self._wanted(row):
                continue
            found = self._item(row, f"{self.path}:{number}")
            if found is None:
                continue
            known = gathered.setdefault((found.image, found.slice), found)
            if known is found:
                continue
            if not found.boxes or not known.boxes:
                here, there = ("a box" if item.boxes else "no box" for item in (found, known))
                self.faults.add(
                    found.where,
                    f"gives {found.image.name} {here}, and {known.where} gives it {there}. A row with no box says that the "
                    "image has no lesion and must be its only row. Take out one of the two",
                )
            if (found.split, found.patient) != (known.split, known.patient):
                self.faults.add(found.where, f"patient or split of {found.image.name} differs from {known.where}")
            if found.window and known.window and found.window != known.window:
                self.faults.add(
                    found.where,
                    f"window of {found.image.name} is {found.window}, but {known.window} in {known.where}. "
                    "An image is shown in one window: give all its rows the same, or leave the others empty",
                )
            known.window = known.window or found.window
            known.boxes += found.boxes
            known.classes += found.classes
        return list(gathered.values())

    def _cell(self, row: list[str], column: Optional[Column]) -> str:
        """Text of a cell; empty where the recipe names no column or the row is too short."""
        if column is None or (isinstance(column, str) and column not in self.header):
            return ""
        index = self.header.index(column) if isinstance(column, str) else column
        return row[index].strip() if index < len(row) else ""

    def _wanted(self, row: list[str]) -> bool:
        return all(self._cell(row, title) in values for title, values in self.options.only_rows.items())

    def _item(self, row: list[str], where: str) -> Optional[Annotated]:
        columns = self.options.columns
        file = self._cell(row, columns.file)
        if not file:
            self.faults.add(where, f"column {columns.file!r} is empty; needed: an image file")
            return None
        if self.options.rename is not None:
            file = re.sub(*self.options.rename, file)
        lesion = self.options.only_class or self._cell(row, columns.lesion)
        box = self._box(row, where)
        if box is None:
            return None
        if box and not lesion:
            self.faults.add(where, f"has a box, but column {columns.lesion!r} is empty")
            return None
        if not box and columns.lesion is not None and lesion:
            self.faults.add(
                where, f"names {lesion!r}, but has no box. Give the box, or empty the lesion for a negative"
            )
            return None
        return Annotated(
            self.folder / file,
            box,
            [lesion] * len(box),
            where,
            normalised=self.options.normalised,
            patient=self._cell(row, columns.patient),
            split=self._split(row, where),
            modality=self._cell(row, columns.modality),
            slice=self._slice(row, where),
            window=self._window(row, where),
        )

    def _box(self, row: list[str], where: str) -> Optional[list[Box]]:
        """The row's box in a list, an empty list for a negative, None after a fault."""
        given = self.options.columns.box
        texts = [self._cell(row, one) for one in given] if isinstance(given, list) else _numbers(self._cell(row, given))
        if not any(texts):
            return []
        try:
            a, b, c, d = (float(text) for text in texts)
        except ValueError:
            self.faults.add(where, f"box is {texts}; needed: 4 numbers, or all empty for an image without a lesion")
            return None
        if self.options.convention == "xywh":
            return [(a, b, a + c, b + d)]
        return [(a - c / 2, b - d / 2, a + c / 2, b + d / 2)] if self.options.convention == "cxcywh" else [(a, b, c, d)]

    def _split(self, row: list[str], where: str) -> str:
        text = self._cell(row, self.options.columns.split)
        if self.options.columns.split is None:
            return self.split
        split = self.options.split_values.get(text, text)
        if split not in SPLITS:
            allowed = ", ".join(self.options.split_values or SPLITS)
            self.faults.add(
                where,
                f"split is {text!r}.{did_you_mean(text, SPLITS)} Allowed: {allowed} "
                "(map others with annotations.split_values)",
            )
        return split

    def _slice(self, row: list[str], where: str) -> Optional[int]:
        text = self._cell(row, self.options.columns.slice)
        if not text:
            return None
        if not re.fullmatch(r"\d+(\.0+)?", text):
            self.faults.add(where, f"slice is {text!r}; needed: a whole number from 0, or empty")
            return None
        return int(float(text))

    def _window(self, row: list[str], where: str) -> Optional[tuple[float, float]]:
        text = self._cell(row, self.options.columns.window)
        if not text:
            return None
        try:
            low, high = (float(part) for part in _numbers(text))
        except ValueError:
            self.faults.add(where, f'window is {text!r}; needed: "low, high"')
            return None
        return low, high


def _numbers(text: str) -> list[str]:
    return [part for part in re.split(r"[,;\s]+", text.strip(" []()")) if part]
