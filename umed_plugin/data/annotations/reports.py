"""Reports: studies with a text and no boxes, in R2Gen's JSON (IU X-ray, MIMIC-CXR) or a CSV of image and report."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Optional

from pydantic import Field

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.annotations.cells import cell_of, columns_exist
from umed_plugin.data.annotations.finding import ImageFolders, annotation_file
from umed_plugin.data.annotations.table import checked_split
from umed_plugin.data.recipes.options import Column
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.data.splits import SPLITS
from umed_plugin.data.texts import read_json, read_rows
from umed_plugin.faults import Faults, StrictModel

# What stands where words were taken out so that nobody can be known by them: XXXX in IU X-ray, ___ in MIMIC-CXR.
_TAKEN_OUT = re.compile(r"\bX{3,}\b|_{2,}")


class ReportColumns(StrictModel):
    """Which column of a CSV holds what. Name a column by its header, or by its number from 0."""

    file: Column = Field("image", description="Image file, relative to ``image_root``.")
    report: Column = Field("report", description="Text of the report.")
    study: Optional[Column] = Field(None, description="Study. Its rows are views of it, and must have the same report.")
    patient: Optional[Column] = Field(None, description="Patient.")
    split: Optional[Column] = Field(None, description="Split, for ``split.by: column``.")


class ReportsOptions(ReaderOptions):
    """Reports without boxes: R2Gen's ``annotation.json`` with lists ``train``, ``val`` and ``test``, or a CSV (``.csv``)."""

    yaml_example_ = """
annotations:
  reader: reports
  files: annotation.json
  image_root: images
  views: montage
"""

    views: Literal["first", "montage"] = Field(
        "first",
        description="What is shown of a study with several images. ``first``: its first image. ``montage``: all of them side by "
        "side, as one image, because LLaVA takes one.",
    )
    taken_out: Literal["keep", "remove"] = Field(
        "keep",
        description="What becomes of ``XXXX`` and ``___``, which stand for words that were taken out. ``keep``, or "
        "``remove`` them, from the answers to train on and from the references alike.",
    )
    columns: ReportColumns = Field(ReportColumns(), description="Columns of a CSV.")

    @property
    def names_split(self) -> bool:
        """True if the file itself names the split: R2Gen's does, a CSV by a column."""
        return self.columns.split is not None or all(not name.endswith(".csv") for name in self.files.values())


# Where it stands, study, images, report, patient, split.
_Study = tuple[str, list[str], str, str, str]


@register_reader("reports", ReportsOptions)
def read_reports(options: ReportsOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read the studies of every file."""
    items: list[Annotated] = []
    for split, name in options.files.items():
        path = annotation_file(root, name, faults)
        if path is None:
            continue
        folders = ImageFolders(options, root, split, path.parent, faults)
        studies = _of_table(path, options, faults) if path.suffix.lower() == ".csv" else _of_json(path, faults)
        for where, images, report, patient, named in studies:
            item = _item(where, images, report, folders, options, faults)
            if item is not None:
                item.patient, item.split = patient, split or named
                items.append(item)
    return items


def _item(
    where: str, images: list[str], report: str, folders: ImageFolders, options: ReportsOptions, faults: Faults
) -> Optional[Annotated]:
    text = _TAKEN_OUT.sub(" ", report) if options.taken_out == "remove" else report
    text = re.sub(r"\s+([.,;:])", r"\1", " ".join(text.split()))
    if not re.search(r"\w", text):
        faults.left_out["studies", "their report is empty"] += 1
        return None
    paths = [folders.find([image]) for image in images]
    if options.views == "first":
        if len(paths) > 1:
            faults.left_out["images", "further views of a study; annotations.views"] += len(paths) - 1
        paths = paths[:1]
    return Annotated(paths[0], [], [], where, report=text, views=tuple(paths[1:]))


def _of_json(path: Path, faults: Faults) -> Iterator[_Study]:
    before = len(faults.messages)
    content: Any = faults.read(read_json, path)
    if len(faults.messages) > before:
        return
    found = [split for split in SPLITS if isinstance(content, dict) and isinstance(content.get(split), list)]
    if not found:
        holds = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        faults.add(
            path, f"has no list train, val or test; it holds {holds or 'nothing'}. Is it R2Gen's annotation.json?"
        )
        return
    for split in found:
        for number, study in enumerate(content[split]):
            where = f"{path} {split}[{number}]"
            images, report = (study.get(key) if isinstance(study, dict) else None for key in ("image_path", "report"))
            listed = [images] if isinstance(images, str) else images
            if (
                not isinstance(report, str)
                or not isinstance(listed, list)
                or not listed
                or not all(isinstance(image, str) and image for image in listed)
            ):
                faults.add(where, "needs a text 'report' and a list 'image_path' of file names. Is it R2Gen's?")
            else:
                yield where, listed, report, str(study.get("subject_id") or ""), split


def _of_table(path: Path, options: ReportsOptions, faults: Faults) -> Iterator[_Study]:
    columns: ReportColumns = options.columns
    rows: list[list[str]] = faults.read(read_rows, path) or []
    header = [title.strip() for title in rows[0]] if rows else []
    wanted = [(f"annotations.columns.{role}", column) for role, column in columns if column is not None]
    if not header or not columns_exist(wanted, header, path, faults):
        return
    studies: dict[str, tuple[str, list[str], list[str]]] = {}
    for number, row in enumerate(rows[1:], start=2):
        where = f"{path}:{number}"
        if not any(cell.strip() for cell in row):
            continue
        image, report = (cell_of(row, header, column) for column in (columns.file, columns.report))
        if not image:
            faults.add(where, f"column {columns.file!r} is empty; needed: an image file")
            continue
        named = [report, cell_of(row, header, columns.patient), _split_of(row, header, where, options, faults)]
        study = cell_of(row, header, columns.study) or where
        first, images, known = studies.setdefault(study, (where, [], named))
        images.append(image)
        if known != named:
            faults.add(where, f"gives study {study!r} another report, patient or split than {first}")
    for where, images, (report, patient, split) in studies.values():
        yield where, images, report, patient, split


def _split_of(row: list[str], header: list[str], where: str, options: ReportsOptions, faults: Faults) -> str:
    column = options.columns.split
    return "" if column is None else checked_split(cell_of(row, header, column), {}, where, faults)
