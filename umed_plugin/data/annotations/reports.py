"""Reports: studies with a text and no boxes, in R2Gen's JSON (IU X-ray, MIMIC-CXR) or a CSV of image and report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Optional

from pydantic import Field

from umed_plugin.data.annotations.base import Annotated
from umed_plugin.data.annotations.cells import RowCheck, cell_of, columns_exist, last_column, name_of, titled
from umed_plugin.data.annotations.finding import ImageFolders, annotation_file
from umed_plugin.data.recipes.options import Column, HasHeader
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.data.splits import SPLIT_NAMES
from umed_plugin.data.texts import read_json, read_numbered_rows
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
    """Reports without boxes: R2Gen's ``annotation.json`` with lists ``train``, ``val`` (or ``valid``, ``validation``) and
    ``test``, or a CSV (``.csv``).
    """

    yaml_example_ = """
annotations:
  reader: reports
  files: annotation.json
  image_root: images
  views: montage
"""

    reports_only_ = True

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
    header: HasHeader = True

    @property
    def names_split(self) -> bool:
        """True if the file itself names the split: R2Gen's does, a CSV by a column."""
        return self.columns.split is not None or all(not _is_table(name) for name in self.files.values())


def _is_table(name: str) -> bool:
    return name.lower().endswith(".csv")


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
        studies = _of_table(path, options, faults) if _is_table(path.name) else _of_json(path, faults)
        others: Counter[str] = Counter()
        for where, images, report, patient, named in studies:
            item = _item(where, images, report, folders, options, faults)
            if item is not None:
                item.patient, item.split = patient, split or named
                items.append(item)
            others.update([named] if split and named not in ("", split) else [])
        if others:
            held = " and ".join(f"{count} studies of {other}" for other, count in others.items())
            faults.add(
                path,
                f"is read as {split} by annotations.files, and holds {held}. To keep its splits, give the file without a split, "
                f"as files: {name}, and split: {{by: column}}",
            )
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
    if not isinstance(content, dict):
        faults.add(path, f"holds a {type(content).__name__}; needed: lists train, val or test. Is it R2Gen's?")
        return
    if not _names_its_splits(content, path, faults):
        return
    for key, split in SPLIT_NAMES.items():
        for number, study in enumerate(content.get(key) or []):
            where = f"{path} {key}[{number}]"
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
                yield where, listed, report, name_of(study.get("subject_id")), split


def _names_its_splits(content: dict[str, Any], path: Path, faults: Faults) -> bool:
    """Whether all studies are in lists that are named as splits are; False after a fault."""
    if not any(isinstance(content.get(key), list) for key in SPLIT_NAMES):
        faults.add(
            path,
            f"has no list train, val or test; it holds {', '.join(content) or 'nothing'}. Is it R2Gen's annotation.json?",
        )
        return False
    wrong = [key for key, value in content.items() if key not in SPLIT_NAMES and _holds_studies(value)]
    wrong += [key for key in SPLIT_NAMES if not isinstance(content.get(key), (list, type(None)))]
    if wrong:
        faults.add(
            path,
            f"holds {', '.join(map(repr, wrong))}, which would not be read. Needed: lists of studies, each named by one of "
            f"{', '.join(SPLIT_NAMES)}",
        )
    return not wrong


def _holds_studies(value: Any) -> bool:
    listed = value if isinstance(value, list) else []
    return any(isinstance(one, dict) and ("image_path" in one or "report" in one) for one in listed)


def _of_table(path: Path, options: ReportsOptions, faults: Faults) -> Iterator[_Study]:
    columns: ReportColumns = options.columns
    rows: list[tuple[int, list[str]]] = faults.read(read_numbered_rows, path) or []
    header, data = titled(rows, options.header)
    wanted = [(f"annotations.columns.{role}", column) for role, column in columns if column is not None]
    if not header or not columns_exist(wanted, header, path, faults):
        return
    studies: dict[str, tuple[str, list[str], list[str]]] = {}
    check = RowCheck(path, header, last_column(wanted, header), faults, has_header=options.header)
    for number, row in check.filled_rows(data):
        where = f"{path}:{number}"
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
    text = cell_of(row, header, column)
    if column is not None and text not in SPLIT_NAMES:
        faults.add(where, f"split is {text!r} (annotations.columns.split). Allowed: {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES.get(text, "") if column is not None else ""
