"""Images that another CSV lists and a recipe leaves out: ``annotations.leave_out_listed``."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Optional

from umed_plugin.data.annotations.cells import RowCheck, cell_of, columns_exist, last_column, titled
from umed_plugin.data.annotations.finding import annotation_file
from umed_plugin.data.recipes.options import ImageList
from umed_plugin.data.texts import read_numbered_rows
from umed_plugin.faults import Faults


class ListedImages:
    """The names that a CSV lists. Names are compared without their folders.

    Args:
        rule: of the recipe; None lists nothing.
        root: data root.
    """

    def __init__(self, rule: Optional[ImageList], root: Path, faults: Faults) -> None:
        self._rule, self._names, self._met = rule, set(), set()  # type: ignore[var-annotated]
        if rule is None:
            return
        path = annotation_file(root, rule.files, faults)
        rows = faults.read(read_numbered_rows, path, rule.delimiter) if path is not None else None
        if path is None or not rows:
            return
        header, data = titled(rows, rule.header)
        wanted = [("annotations.leave_out_listed.file", rule.file)]
        if not columns_exist(wanted, header, path, faults):
            return
        last, key = last_column(wanted, header), "annotations.leave_out_listed"
        check = RowCheck(path, header, last, faults, rule.delimiter, key, rule.header)
        self._names = {_name(cell_of(row, header, rule.file)) for _, row in check.filled_rows(data)} - {""}

    def reason(self, file: str) -> str:
        """Why an image is left out; empty for one that is not listed."""
        name = _name(file)
        if self._rule is None or name not in self._names:
            return ""
        self._met.add(name)
        return f"listed in {self._rule.files} (annotations.leave_out_listed)"

    def tell(self, faults: Faults) -> None:
        """Say so if the list changes nothing."""
        if self._rule is not None and not self._met:
            faults.no_effect(
                "annotations.leave_out_listed", f"has no effect: {self._rule.files} lists no image of the data"
            )


def _name(file: str) -> str:
    return PurePosixPath(file.replace("\\", "/")).name
