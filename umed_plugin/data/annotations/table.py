"""CSV: one row per box; a row with an empty box marks an image without a lesion. Or labels without boxes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Optional

from umed_plugin.data.annotations.base import Annotated, as_xyxy, in_unit
from umed_plugin.data.annotations.cells import RowCheck, cell_of, columns_exist, last_column, parts_of, titled
from umed_plugin.data.annotations.effects import Applied
from umed_plugin.data.annotations.finding import ImageFolders, Renamed, annotation_file
from umed_plugin.data.annotations.labels import labels_of, split_label
from umed_plugin.data.annotations.listed import ListedImages
from umed_plugin.data.annotations.phrases import checked_phrase
from umed_plugin.data.annotations.table_options import CsvOptions
from umed_plugin.data.recipes.options import Column
from umed_plugin.data.recipes.readers import register_reader
from umed_plugin.data.splits import SPLITS, Split
from umed_plugin.data.texts import read_numbered_rows
from umed_plugin.errors import did_you_mean
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box


@register_reader("csv", CsvOptions)
def read_csv(options: CsvOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read the rows of every file and merge those of the same image and slice."""
    items: list[Annotated] = []
    applied = _rules(options)
    listed = ListedImages(options.leave_out_listed, root, faults)
    for split, name in options.files.items():
        path = annotation_file(root, name, faults)
        rows = faults.read(read_numbered_rows, path, options.delimiter) if path is not None else None
        if path is None or rows is None:
            continue
        header, data = titled(rows, options.header)
        if columns_exist(_wanted_columns(options), header, path, faults):
            folders = ImageFolders(options, root, split, path.parent, faults)
            table = _Table(options, header, path, folders, split, faults, applied)
            table.listed = listed
            items += table.items(data)
    if not faults.messages:
        applied.tell(faults)
        listed.tell(faults)
    return items


def _rules(options: CsvOptions) -> Applied:
    """The rules of the recipe that name values of the file."""
    rules = {f"annotations.only_rows.{title}": values for title, values in options.only_rows.items()}
    rules |= {f"annotations.leave_out_images.{title}": values for title, values in options.leave_out_images.items()}
    rules["annotations.no_finding"] = options.no_finding
    return Applied({**rules, "annotations.split_values": list(options.split_values)})


def _wanted_columns(options: CsvOptions) -> list[tuple[str, Column]]:
    """(recipe key, column) of every column that must exist; the slice column may be absent."""
    wanted: list[tuple[str, Column]] = [("annotations.only_rows", title) for title in options.only_rows]
    wanted += [("annotations.leave_out_images", title) for title in options.leave_out_images]
    if options.phrase is not None:
        wanted.append(("annotations.phrase", options.phrase))
    for role, given in options.columns:
        columns = given if isinstance(given, list) else [given]
        wanted += [
            (f"annotations.columns.{role}", column) for column in columns if column is not None and role != "slice"
        ]
    return wanted


class _Table:
    """One CSV file with its header, read row by row."""

    def __init__(
        self,
        options: CsvOptions,
        header: list[str],
        path: Path,
        folders: ImageFolders,
        split: str,
        faults: Faults,
        applied: Applied,
    ) -> None:
        self.options, self.header, self.path = options, header, path
        self.folders, self.split, self.faults, self.applied = folders, split, faults, applied
        self.names = Renamed(options.rename)
        self.listed = ListedImages(None, path.parent, faults)
        last = last_column(_wanted_columns(options), header)
        self.check = RowCheck(path, header, last, faults, options.delimiter, "annotations", options.header)

    def items(self, rows: list[tuple[int, list[str]]]) -> list[Annotated]:
        merged: dict[tuple[object, ...], Annotated] = {}
        if self.check.first_is_untitled(rows):
            return []
        for number, row in rows:
            if not any(cell.strip() for cell in row) or not self._wanted(row):
                continue
            item = self._item(row, f"{self.path}:{number}") if self.check.is_whole(number, row) else None
            if item is None:
                continue
            first = merged.setdefault((item.image, item.slice, item.reader, item.phrase), item)
            if first is not item:
                (self._check_labels_agree if self.options.labels_only else self._check_agree)(first, item)
                first.window = first.window or item.window
                first.left_out = first.left_out or item.left_out
                first.boxes += item.boxes
                first.classes += item.classes
        _leave_out_whole(merged.values())
        self.names.tell(self.path, self.faults)
        return list(merged.values())

    def _check_agree(self, first: Annotated, item: Annotated) -> None:
        """Note what a later row of an image says against its first row."""
        name = item.image.name
        if not item.boxes or not first.boxes:
            here, there = ("a box" if row.boxes else "no box" for row in (item, first))
            self.faults.add(
                item.where,
                f"gives {name} {here}, and {first.where} gives it {there}. A row with no box says that the "
                "image has no lesion and must be its only row. Remove one of the two",
            )
        self._check_same(first, item)

    def _check_labels_agree(self, first: Annotated, item: Annotated) -> None:
        """Note what a later row of an image without boxes says against its first row."""
        if item.is_negative != first.is_negative:
            here, there = ("no lesion" if row.is_negative else "a label" for row in (item, first))
            self.faults.add(
                item.where, f"gives {item.image.name} {here}, and {first.where} gives it {there}. Remove one of the two"
            )
        self._check_same(first, item)

    def _check_same(self, first: Annotated, item: Annotated) -> None:
        name = item.image.name
        if (item.split, item.patient) != (first.split, first.patient):
            self.faults.add(item.where, f"patient or split of {name} differs from {first.where}")
        if item.window and first.window and item.window != first.window:
            self.faults.add(
                item.where,
                f"window of {name} is {item.window}, but {first.window} in {first.where}. "
                "An image is shown in one window: give all its rows the same, or leave the others empty",
            )

    def _cell(self, row: list[str], column: Optional[Column]) -> str:
        return cell_of(row, self.header, column)

    def _wanted(self, row: list[str]) -> bool:
        wanted = True
        for title, values in self.options.only_rows.items():
            value = self._cell(row, title)
            self.applied.meet(f"annotations.only_rows.{title}", value)
            wanted = wanted and value in values
        if not wanted:
            self.faults.left_out["rows of the CSV", "annotations.only_rows"] += 1
        return wanted

    def _left_out(self, row: list[str]) -> str:
        """Why the row's image is left out whole, or empty."""
        reason = ""
        for title, values in self.options.leave_out_images.items():
            value = self._cell(row, title)
            self.applied.meet(f"annotations.leave_out_images.{title}", value)
            if value in values:
                reason = reason or f"{title} is {value}"
        return reason

    def _item(self, row: list[str], where: str) -> Optional[Annotated]:
        columns = self.options.columns
        file = self._cell(row, columns.file)
        if not file:
            self.faults.add(where, f"column {columns.file!r} is empty; needed: an image file")
            return None
        found = self._labels(row, where) if self.options.labels_only else self._lesion(row, where)
        if found is None:
            return None
        return Annotated(
            self.folders.find(self.names.of(file)),
            *found,
            where,
            normalised=bool(self.options.normalised),
            patient=self._cell(row, columns.patient),
            split=self._split(row, where),
            modality=self._cell(row, columns.modality),
            slice=self._slice(row, where),
            window=self._window(row, where),
            left_out=self._left_out(row) or self.listed.reason(file),
            reader=self._cell(row, columns.reader),
            phrase=self._phrase(row, bool(found[0]), where),
        )

    def _labels(self, row: list[str], where: str) -> Optional[tuple[list[Box], list[str]]]:
        """No box, and the row's labels; None after a fault."""
        text = self.options.only_class or self._cell(row, self.options.columns.lesion)
        texts = split_label(text, self.options.label_separator)
        for label in texts:
            self.applied.meet("annotations.no_finding", label.strip())
        labels = labels_of(texts, self.options.no_finding, where, self.faults)
        return None if labels is None else ([], labels)

    def _lesion(self, row: list[str], where: str) -> Optional[tuple[list[Box], list[str]]]:
        """The row's box in a list and its class in another, empty lists for a negative; None after a fault."""
        columns = self.options.columns
        lesion = self.options.only_class or self._cell(row, columns.lesion)
        box = self._box(row, where)
        if box is None:
            return None
        self.applied.meet("annotations.no_finding", lesion)
        if lesion in self.options.no_finding:
            if box:
                self.faults.add(where, f"says {lesion!r} (annotations.no_finding), but has a box. Empty the box")
                return None
            lesion = ""
        if columns.reader is not None and not self._cell(row, columns.reader):
            self.faults.add(where, f"column {columns.reader!r} is empty; needed: who read the image")
            return None
        if box and not lesion:
            self.faults.add(where, f"has a box, but column {columns.lesion!r} is empty")
            return None
        if not box and columns.lesion is not None and lesion:
            self.faults.add(
                where,
                f"names {lesion!r}, but has no box. Give the box, or empty the lesion for a negative. A value that means no "
                "lesion belongs in annotations.no_finding",
            )
            return None
        return box, [lesion] * len(box)

    def _phrase(self, row: list[str], has_box: bool, where: str) -> str:
        column = self.options.phrase
        if column is None:
            return ""
        text = self._cell(row, column)
        if text and not has_box:
            self.faults.add(where, f"has the phrase {text!r} and no box. Give the box, or remove the row")
            return ""
        return checked_phrase(text, where, column, self.faults) if has_box else ""

    def _box(self, row: list[str], where: str) -> Optional[list[Box]]:
        """The row's box in a list, an empty list for a negative, None after a fault."""
        given = self.options.columns.box
        assert given is not None, "rows without boxes are labels"
        texts = (
            [self._cell(row, column) for column in given]
            if isinstance(given, list)
            else parts_of(self._cell(row, given))
        )
        if not any(texts):
            return []
        try:
            a, b, c, d = (float(text) for text in texts)
        except ValueError:
            self.faults.add(where, f"box is {texts}; needed: 4 numbers, or all empty for an image without a lesion")
            return None
        return [in_unit(as_xyxy((a, b, c, d), self.options.convention), self.options.normalised)]

    def _split(self, row: list[str], where: str) -> str:
        text = self._cell(row, self.options.columns.split)
        if self.options.columns.split is None:
            return self.split
        self.applied.meet("annotations.split_values", text)
        return checked_split(text, self.options.split_values, where, self.faults)

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
            low, high = (float(part) for part in parts_of(text))
        except ValueError:
            low = high = math.nan
        if not -math.inf < low < high < math.inf:  # a NaN is neither
            self.faults.add(where, f'window is {text!r}; needed: "low, high", two numbers of which the first is less')
            return None
        return low, high


def _leave_out_whole(items: Collection[Annotated]) -> None:
    """Leave out every item of an image (or slice) of which a row says so: those of all readers and phrases."""
    reasons: dict[tuple[Path, Optional[int]], str] = {}
    for item in items:
        if item.left_out:
            reasons.setdefault((item.image, item.slice), item.left_out)
    for item in items:
        item.left_out = reasons.get((item.image, item.slice), "")


def checked_split(text: str, values: dict[str, Split], where: str, faults: Faults) -> str:
    """The split that a cell names, by ``split_values`` or itself; a fault is added where it names none."""
    split = values.get(text, text)
    if split not in SPLITS:
        faults.add(
            where,
            f"split is {text!r}.{did_you_mean(text, SPLITS)} Allowed: {', '.join(values or SPLITS)} "
            "(map others with annotations.split_values)",
        )
    return split
