"""PadChest-GR's grounded reports: findings in sentences, each with several boxes and labels, in fractions of the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from pydantic import Field

from umed_plugin.data.annotations.base import Annotated, four_numbers
from umed_plugin.data.annotations.cells import RowCheck
from umed_plugin.data.annotations.finding import ImageFolders, annotation_file, json_files
from umed_plugin.data.recipes.readers import ReaderOptions, register_reader
from umed_plugin.data.splits import SPLIT_NAMES
from umed_plugin.data.texts import read_numbered_rows
from umed_plugin.faults import Faults
from umed_plugin.grounding.boxes import Box

# Who marked what: the first reader of a study, and the second one, whom only a part of the studies has.
_FIRST, _SECOND = "boxes", "extra_boxes"


class PadchestGrOptions(ReaderOptions):
    """PadChest-GR's JSON of grounded reports. Each label of an abnormal finding is a lesion for each of its boxes. A study whose
    findings are all normal is negative. Of the two readers, ``boxes`` is used, unless ``readers`` says otherwise.
    """

    names_images_ = True
    yaml_example_ = """
annotations:
  reader: padchest_gr
  files: grounded_reports_20240819.json
  table: master_table.csv
  image_root: Padchest_GR_files
"""

    table: Optional[str] = Field(
        None,
        description="The CSV ``master_table.csv``, which names each study's patient (``PatientID``) and split (``split``, for "
        "``split.by: column``).",
    )

    @property
    def names_split(self) -> bool:
        """True if the table names the split."""
        return self.table is not None


@register_reader("padchest_gr", PadchestGrOptions)
def read_padchest_gr(options: PadchestGrOptions, root: Path, faults: Faults) -> list[Annotated]:
    """Read the studies of each file."""
    items: list[Annotated] = []
    studies = _table(options, root, faults)
    for split, path, content in json_files(options, root, faults):
        if not isinstance(content, list):
            faults.add(path, f"holds a {type(content).__name__}; needed: a list of studies. Is it PadChest-GR?")
            continue
        folders = ImageFolders(options, root, split, path.parent, faults)
        for number, study in enumerate(content):
            items += _study(f"{path} study [{number}]", study, split, studies, folders, options, faults)
    return items


def _table(options: PadchestGrOptions, root: Path, faults: Faults) -> Optional[dict[str, tuple[str, str]]]:
    """StudyID -> patient and split; None without a table."""
    if options.table is None:
        return None
    path = annotation_file(root, options.table, faults)
    rows = faults.read(read_numbered_rows, path) if path is not None else None
    header = [title.strip() for title in rows[0][1]] if rows else []
    missing = [title for title in ("StudyID", "PatientID", "split") if title not in header]
    if rows and missing:
        faults.add(path, f"has no column {', '.join(missing)}. It has: {', '.join(header)}")
    if path is None or not rows or missing:
        return {}
    study, patient, split = (header.index(title) for title in ("StudyID", "PatientID", "split"))
    found: dict[str, tuple[str, str]] = {}
    check = RowCheck(path, header, max(study, patient, split), faults)
    for number, row in rows[1:]:
        blank = not any(cell.strip() for cell in row)
        if blank or not check.is_whole(number, row):
            continue
        named = (row[patient].strip(), row[split].strip())
        if named[1] not in SPLIT_NAMES:
            faults.add(f"{path}:{number}", f"split is {named[1]!r}. Allowed: {', '.join(SPLIT_NAMES)}")
        elif found.setdefault(row[study].strip(), named) != named:
            faults.add(f"{path}:{number}", f"gives study {row[study]} another patient or split than a row before it")
    return found


def _study(
    where: str,
    study: Any,
    split: str,
    studies: Optional[dict[str, tuple[str, str]]],
    folders: ImageFolders,
    options: PadchestGrOptions,
    faults: Faults,
) -> list[Annotated]:
    """The study's image as its readers marked it; nothing after a fault."""
    findings = study.get("findings") if isinstance(study, dict) else None
    image = study.get("ImageID") if isinstance(study, dict) else None
    if not isinstance(image, str) or not image or not isinstance(findings, list):
        faults.add(where, "needs a text 'ImageID' and a list 'findings'. Is it PadChest-GR?")
        return []
    item = Annotated(folders.find([image]), [], [], where, normalised=True, split=split, reader=_FIRST)
    second = Annotated(item.image, [], [], where, normalised=True, split=split, reader=_SECOND)
    if studies is not None:
        named = studies.get(str(study.get("StudyID")))
        if named is None:
            faults.add(where, f"study {study.get('StudyID')!r} is not in annotations.table")
            return []
        item.patient, item.split = named[0], SPLIT_NAMES[named[1]]
        second.patient, second.split = item.patient, item.split
    for number, finding in enumerate(findings):
        if not _add_finding(f"{where} finding {number}", finding, item, second, faults):
            return []
    if not item.boxes and not second.boxes:
        item.reader = ""  # a normal report is nobody's in particular
        return [item]
    if options.readers is None:
        if second.boxes:
            faults.left_out["boxes", "extra_boxes, of a second reader; annotations.readers"] += len(second.boxes)
        item.reader = ""
        return [item]
    return [item, second] if second.boxes else [item]


def _add_finding(where: str, finding: Any, item: Annotated, second: Annotated, faults: Faults) -> bool:
    """Add the boxes of one sentence to its readers; False after a fault."""
    if not isinstance(finding, dict) or not isinstance(finding.get("abnormal"), bool):
        faults.add(where, "needs 'abnormal': true or false")
        return False
    labels = finding.get("labels") or []
    boxes = {key: _boxes(finding.get(key)) for key in (_FIRST, _SECOND)}
    if None in boxes.values() or not isinstance(labels, list):
        faults.add(where, "needs lists of boxes [x1, y1, x2, y2] in 0-1, and a list 'labels'")
        return False
    marked = any(boxes.values())
    if marked and (not labels or not finding["abnormal"]):
        faults.add(where, f"has a box, but {'no label' if not labels else 'abnormal is false'}")
        return False
    if finding["abnormal"] and not marked:
        # Seen, but not where: without other boxes the image must not become a negative.
        faults.left_out["findings", "abnormal, but without a box"] += 1
        item.dropped_boxes += 1
    for owner, key in ((item, _FIRST), (second, _SECOND)):
        # Marked by the other reader alone: for this one the image is not negative either.
        owner.dropped_boxes += marked and not boxes[key]
        for box in boxes[key] or []:
            owner.boxes += [box] * len(labels)
            owner.classes += [str(label) for label in labels]
    return True


def _boxes(written: Any) -> Optional[list[Box]]:
    found = [four_numbers(box) for box in written] if isinstance(written, list) else [] if written is None else [None]
    return None if None in found else [box for box in found if box is not None]
